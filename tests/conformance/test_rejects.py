"""The kit rejects wrong backends, each by the check that was written for its fault, and says what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moe_core.testing import BackendConformance, registered

from . import wrong as w


class Kit(BackendConformance):
    backend = "wrong"


@dataclass(frozen=True)
class Rejection:
    """``check`` has to fail on ``backend`` with a text that holds ``says``."""

    backend: type[w.Wrong]
    check: str
    says: str


REJECTIONS = [
    Rejection(w.CrashesOnUnknownActivation, "test_answers[float32]", "moe_supports raised"),
    Rejection(w.WrongGroup, "test_ids[group_top2_bias]", "groups, more than topk_group=2"),
    Rejection(w.ForgetsRenormalize, "test_ids[softmax_renorm]", "the sum of a row's weights"),
    Rejection(w.LongIds, "test_ids[softmax]", "int64"),
    Rejection(w.MinusOneIsExpertZero, "test_minus_one[softmax_renorm]", "ids of -1"),
    Rejection(w.StaleRows, "test_minus_one[output_scaled]", ""),
    Rejection(w.BiasedWeights, "test_gate[sigmoid_bias-float32]", "topk_weights from router_logits"),
    Rejection(w.AscendingIds, "test_gate[softmax-float32]", "from router_logits: row 0 chose"),
    Rejection(w.RouterInLowPrecision, "test_gate[softmax-bfloat16]", "from hidden_states"),
    Rejection(w.HighestIdWinsTies, "test_gate_ties[softmax]", "ties: chose"),
    Rejection(w.ForgetsEpsilon, "test_gate_tiny_scores[sigmoid_bias_eps]", "logits around -14"),
    Rejection(w.NanSpreads, "test_gate_bad_logits[nan-zero]", "topk_weights of other rows changed"),
    Rejection(w.ForgetsSharedGate, "test_shared_experts[shared_gate-float32]", "shared experts: relative error"),
    Rejection(w.SwappedGateUp, "test_experts[silu-float32]", "relative error"),
    Rejection(w.IgnoresInterleaving, "test_experts[interleaved-float32]", "relative error"),
    Rejection(w.IgnoresExpertBias, "test_experts[bias-float32]", "relative error"),
    Rejection(w.WeightOnInputForgotten, "test_experts[weight_on_input-float32]", "relative error"),
    Rejection(w.DropsLastToken, "test_experts[relu2-float32]", "relative error"),
    Rejection(w.SharedTwice, "test_reduce[shared-float32]", "relative error"),
    Rejection(w.ScaledTwice, "test_reduce[shared_weights_scaled-float32]", "relative error"),
    Rejection(w.ScalesSharedToo, "test_reduce[shared_output_scaled-float32]", "relative error"),
    Rejection(w.ForgetsAverage, "test_reduce[shared_average-float32]", "relative error"),
    Rejection(w.AlwaysFloat32, "test_reduce[plain-bfloat16]", "dtype torch.float32, not that of the layer"),
    Rejection(w.AlwaysFloat32, "test_layer_dtype[plain-bfloat16]", "stage reduce of backend wrong"),
    Rejection(w.ClampedChunks, "test_edge[tile_plus_one-float32]", "a tail of one row"),
    Rejection(w.NeedsEvenWidth, "test_edge[odd_hidden-float32]", "H odd"),
    Rejection(w.Squeezes, "test_edge[top_1-float32]", "stage experts of backend wrong"),
    Rejection(w.ReadsThePadding, "test_neighbours[inputs]", "NaN beside the inputs"),
    Rejection(w.DenseWithZeros, "test_unchosen_expert", "NaN in an unchosen expert"),
    Rejection(w.ScalesByTheBatch, "test_bad_row", "rows beside one of NaN"),
    Rejection(w.OverwritesItsInput, "test_inputs_unchanged[experts]", "experts changed hidden_states"),
    Rejection(w.OverwritesItsInput, "test_shared_order[after]", "order after"),
    Rejection(w.WeighsInPlace, "test_inputs_unchanged[reduce]", "reduce changed experts' output"),
    Rejection(w.CrashesWithoutTokens, "test_no_tokens[experts]", "max()"),
    Rejection(w.RemembersRouting, "test_layer[plain]", "from topk_weights and topk_ids"),
    Rejection(w.AssumesContiguousIds, "test_layout[transposed]", "routing, transposed"),
    Rejection(w.AssumesContiguousWeights, "test_weight_views", "weights as transposed views"),
    Rejection(w.Squeezes, "test_shape[vector]", "stage experts of backend wrong returned"),
    Rejection(w.DropsLastToken, "test_batch", "rows in another order"),
    Rejection(w.DropsLastToken, "test_chunks[7]", "chunks of 7"),
    Rejection(w.AssumesHiddenSize, "test_latent", "latent experts"),
    Rejection(w.MinusOneIsExpertZero, "test_expert_map", "the sum of two halves"),
    Rejection(w.Alternates, "test_entries", "the op's entry against the Python entry"),
    Rejection(w.DetachesExperts, "test_backward_of_input_alone", "the gradient of hidden_states"),
    Rejection(w.Noisy, "test_same_bits", "the same call again: other bits"),
    Rejection(w.ReusesItsOutput, "test_output_is_new", "a later call changed an earlier result"),
    Rejection(w.ReturnsItsInput, "test_output_is_new", "shares memory with hidden_states"),
    Rejection(w.CachesByIdentity, "test_changed_weights", "after weights changed in place"),
    Rejection(w.ReleasesWhatItReads, "test_consumed_weights[plain]", "backend wrong"),
    Rejection(w.HoardsMemory, "test_memory_kept", "workspace_bytes declares 0"),
    Rejection(w.OneScratchForAll, "test_threads", "thread"),
    Rejection(w.DetachesExperts, "test_backward[plain]", "gradient"),
    Rejection(w.DenseWithZeros, "test_backward_of_unchosen_expert", "gradient"),
    Rejection(w.IgnoresZeroPoints, "test_quantised_edges[int8_zero_32]", "off the dequantised reference"),
    Rejection(w.HighHalfFirst, "test_quantised[int4_row-float32]", "does not compute expert 7"),
    Rejection(w.RoundsNoActivations, "test_quantised[fp8_channel-float32]", "does not compute expert 7"),
    Rejection(w.RoundsNoActivations, "test_quantised_edges[int8_w8a8]", "off the dequantised reference"),
]


@pytest.mark.filterwarnings("ignore::moe_core.runner.FallbackWarning")
@pytest.mark.parametrize("case", REJECTIONS, ids=lambda case: f"{case.backend.__name__}-{case.check}")
def test_a_wrong_backend_is_rejected_by_the_check_for_it(case: Rejection) -> None:
    with registered(case.backend()), pytest.raises((Exception, pytest.fail.Exception)) as caught:
        Kit.checks()[case.check](Kit())
    assert case.says in str(caught.value)


@pytest.mark.parametrize("check", sorted({case.check for case in REJECTIONS}))
def test_the_same_checks_accept_the_right_one(check: str) -> None:
    with registered(w.Wrong()):
        Kit.checks()[check](Kit())


def test_a_backend_that_declares_what_it_does_is_accepted() -> None:
    """The same behaviour with its trait: overwriting its input, and holding memory."""
    with registered(w.OverwritesItsInput(mutates_input=True)):
        Kit.checks()["test_inputs_unchanged[experts]"](Kit())
        Kit.checks()["test_shared_order[after]"](Kit())
    with registered(w.HoardsMemory(workspace_bytes=129 * 32 * 4)):
        Kit.checks()["test_memory_kept"](Kit())
    with registered(w.Noisy(deterministic=False)), pytest.raises(pytest.skip.Exception, match="deterministic=False"):
        Kit.checks()["test_same_bits"](Kit())


def test_every_check_rejects_something() -> None:
    """A check that nothing is known to fail proves nothing; test_usable has its own test in test_kit.py."""
    proven = {case.check.partition("[")[0] for case in REJECTIONS}
    assert {check.partition("[")[0] for check in Kit.checks()} == proven | {"test_usable"}
