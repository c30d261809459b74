"""The reference's form for accelerators: no wait for the device, and the same values as the form that waits."""

from __future__ import annotations

import pytest
import torch

from moe_core import MoEConfig, MoELayer, reference
from moe_core.types import Plan, Routing

CONFIGS = {
    "plain": {},
    "biases": {"expert_bias": True, "swiglu_limit": 0.5, "swiglu_alpha": 1.7, "swiglu_beta": 1.0},
    "no gate row": {"gated": False, "activation": "gelu_tanh"},
    "norm behind": {"post_expert_norm_eps": 1e-6},
    "zero experts": {"zero_expert_num": 3, "zero_expert_type": "identity"},
    "weight on the input": {"top_k": 1, "apply_router_weight_on_input": True},
    "every expert": {"top_k": 8},
    "one expert": {"num_experts": 1, "top_k": 1},
    "some held here": {"num_local_experts": 5},
    "none held here": {"num_local_experts": 0},
}
TOKENS = (0, 1, 2, 63, 64, 65, 200)


def layer_of(fields: dict) -> MoELayer:
    return MoELayer(MoEConfig(**{"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 2, **fields}))


@torch.no_grad()
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_blocks_and_runs_agree_to_the_last_bit(fields: dict) -> None:
    layer = layer_of(fields)
    config, weights = layer.config, layer.weights()
    for tokens in TOKENS:
        x = torch.randn(tokens, 32)
        ids = torch.randint(-1, config.num_router_outputs, (tokens, config.top_k))
        for topk_ids in (ids, torch.zeros_like(ids), torch.full_like(ids, -1)):
            want = reference.experts_by_runs(config, weights, x, topk_ids)
            assert torch.equal(reference.experts_in_blocks(config, weights, x, topk_ids), want), tokens


@torch.no_grad()
def test_rows_of_nan_stay_among_themselves() -> None:
    layer = layer_of({})
    x, ids = torch.randn(70, 32), torch.randint(0, 8, (70, 2))
    clean = reference.experts_in_blocks(layer.config, layer.weights(), x, ids)
    x[3] = float("nan")
    out = reference.experts_in_blocks(layer.config, layer.weights(), x, ids)
    others = torch.arange(70) != 3
    assert out[3].isnan().all()
    assert torch.equal(out[others], clean[others])
    layer.w13_weight[5] = float("inf")
    used = (ids == 5) | ~others[:, None]
    out = reference.experts_in_blocks(layer.config, layer.weights(), x, ids)
    assert torch.equal(out[~used], clean[~used]), "an expert that a token did not choose cannot reach it"


@torch.no_grad()
def test_it_needs_no_value_of_the_device() -> None:
    """Tensors on meta have none, so whatever waited for one would fail there."""
    with torch.device("meta"):
        layer = layer_of({"shared_intermediate_size": 40})
        x = torch.empty(9, 32)
        plan = Plan(layer.config, layer.weights(), x.device, x.dtype)
        shared = reference.moe_shared_experts(plan, x)
        routing = reference.moe_gate(plan, x, None, None)
        assert isinstance(routing, Routing)
        out = reference.moe_reduce(plan, routing, reference.moe_experts(plan, x, routing), shared)
    assert (out.shape, out.dtype, out.device.type) == ((9, 32), torch.float32, "meta")
