"""What decides instead of the logits, or besides them: token ids, custom functions, replayed ids, the caller's gate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoELayer, MoERunner
from moe_core.errors import ConfigError, InputError, RoutingError, WeightsError
from moe_core.routing import route
from moe_core.testing import ROUTER_FAMILIES, SIZES, random_weights

FORCEABLE = [n for n, fields in ROUTER_FAMILIES.items() if not fields.get("hash_routing") and n != "custom"]


def config_of(name: str, **fields: object) -> MoEConfig:
    return MoEConfig(**{**SIZES, **ROUTER_FAMILIES[name], **fields})


# Hash routing.


def hashed(table: Tensor, **fields: object):
    config = config_of("sqrtsoftplus_hash", **fields)
    weights = random_weights(config)
    weights.tid2eid = table
    return config, weights


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_table_may_repeat_experts(backend: str | None) -> None:
    """Zero-initialised tables do: each place counts, so four times expert 0 with weights of one sum is expert 0."""
    config, weights = hashed(torch.tensor([[0, 0, 0, 0], [3, 3, 1, 3], [5, 6, 7, 8]]), routed_scaling_factor=1.0)
    runner, x, ids = MoERunner(config, weights, backend=backend), torch.randn(6, 32), torch.tensor([0, 1, 2, 2, 1, 0])
    routing = route(config, weights, x @ weights.gate_weight.t(), input_ids=ids)
    out = runner(x, input_ids=ids)
    apart = torch.zeros(6, 32)
    for place in range(4):
        given = torch.zeros(6, 4), torch.full((6, 4), -1)
        given[0][:, 0], given[1][:, 0] = routing.topk_weights[:, place], routing.topk_ids[:, place]
        apart += runner(x, topk_weights=given[0], topk_ids=given[1])
    torch.testing.assert_close(out, apart, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.topk_weights.sum(1), torch.ones(6))


@torch.no_grad()
@pytest.mark.parametrize("bad", [-1, -100, 3, 2**40])
def test_a_token_id_outside_the_table_is_an_error_that_names_it(bad: int) -> None:
    config, weights = hashed(torch.tensor([[0, 1, 2, 3]] * 3))
    with pytest.raises(InputError, match=f"{bad}: expected 0 to 2"):
        MoERunner(config, weights)(torch.randn(2, 32), input_ids=torch.tensor([1, bad]))


def test_unchecked_token_ids_read_nothing_outside_and_route_nowhere() -> None:
    config, weights = hashed(torch.tensor([[0, 1, 2, 3]] * 3), check_ids=False)
    routing = route(config, weights, torch.randn(3, 16), input_ids=torch.tensor([-5, 1, 3]))
    assert routing.topk_ids.tolist() == [[-1] * 4, [0, 1, 2, 3], [-1] * 4]
    assert routing.topk_weights[[0, 2]].tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize(
    ("input_ids", "text"),
    [
        (None, "input_ids=None"),
        (torch.zeros(2), "float32"),
        (torch.zeros(2, dtype=torch.bool), "bool"),
        (torch.zeros(3, dtype=torch.int64), "3 ids for 2 tokens"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_bad_input_ids_are_refused(input_ids: Tensor | None, text: str) -> None:
    config, weights = hashed(torch.tensor([[0, 1, 2, 3]] * 3))
    with pytest.raises(InputError, match=text):
        route(config, weights, torch.randn(2, 16), input_ids=input_ids)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (torch.zeros(5, 3, dtype=torch.int64), r"\(5, 3\)"),
        (torch.zeros(5, dtype=torch.int64), r"\(5,\)"),
        (torch.full((5, 4), 16), "16"),
        (torch.full((5, 4), -2), "-2"),
        (torch.zeros(5, 4), "float32"),
        (None, "tid2eid=None"),
    ],
)
def test_a_bad_table_is_refused_at_bind(table: Tensor | None, text: str) -> None:
    config, weights = hashed(table)
    with pytest.raises(WeightsError, match=text):
        MoERunner(config, weights)


@torch.no_grad()
def test_a_layer_that_routes_by_token_id_is_saved_and_loaded() -> None:
    layer, table = MoELayer(config_of("sqrtsoftplus_hash")), torch.randint(0, 16, (9, 4))
    with pytest.raises(WeightsError, match="tid2eid"):
        layer(torch.randn(2, 32), input_ids=torch.tensor([1, 2]))
    layer.tid2eid = table
    x, ids = torch.randn(3, 32), torch.tensor([8, 0, 4])
    out, other = layer(x, input_ids=ids), MoELayer(layer.config)
    assert other.load_state_dict(layer.state_dict()) == ([], [])
    assert torch.equal(other(x, input_ids=ids), out)
    assert torch.equal(other.tid2eid, table)


@pytest.mark.parametrize("name", ["per_expert_scale", "tid2eid", "post_expert_norm_weight", "shared_w2_weight"])
def test_a_tensor_that_the_config_does_not_read_is_refused(name: str) -> None:
    config = config_of("softmax")
    weights = random_weights(config)
    setattr(weights, name, torch.ones(16))
    with pytest.raises(WeightsError, match=f"{name} is present"):
        MoERunner(config, weights)


def test_a_bias_that_a_method_does_not_read_is_refused_at_bind() -> None:
    config, weights = hashed(torch.tensor([[0, 1, 2, 3]] * 3))
    weights.e_score_correction_bias = torch.zeros(16)
    with pytest.raises(ConfigError, match="hash_routing does not read it"):
        MoERunner(config, weights)


# Custom functions.


def custom(function, **fields: object) -> MoEConfig:
    return MoEConfig(**SIZES, custom_routing_function=function, **fields)


def first_four(hidden_states, router_logits, top_k, renormalize):
    return torch.full((router_logits.shape[0], top_k), 0.5), torch.arange(top_k).expand(router_logits.shape[0], -1)


def spoiling(hidden_states, router_logits, top_k, renormalize):
    return first_four(hidden_states, router_logits.mul_(2), top_k, renormalize)


def returning(change):
    return lambda *arguments: change(*first_four(*arguments))


BROKEN = {
    "in place": (spoiling, "in place"),
    "one tensor": (returning(lambda w, i: w), "expected two tensors"),
    "wrong way round": (returning(lambda w, i: (i, w)), "expected float and integer"),
    "bool ids": (returning(lambda w, i: (w, i > 1)), "torch.bool"),
    "too few columns": (returning(lambda w, i: (w[:, :3], i[:, :3])), r"\(2, 3\)"),
    "too few rows": (returning(lambda w, i: (w[:1], i[:1])), r"\(1, 4\)"),
    "id too large": (returning(lambda w, i: (w, i + 13)), "=16"),
    "id too small": (returning(lambda w, i: (w, i - 2)), "=-2"),
    "one twice": (returning(lambda w, i: (w, i // 2)), "distinct"),
    "nan": (returning(lambda w, i: (w * math.nan, i)), "finite weights"),
    "inf": (returning(lambda w, i: (w / 0, i)), "finite weights"),
}


@pytest.mark.parametrize(("function", "text"), BROKEN.values(), ids=BROKEN)
def test_a_custom_function_is_held_to_its_contract(function, text: str) -> None:
    config = custom(function)
    with pytest.raises(RoutingError, match=text):
        route(config, random_weights(config), torch.randn(2, 16))


def test_in_place_changes_never_reach_the_caller_in_inference_mode() -> None:
    """Such tensors count no versions: there the function works on a copy."""
    config = custom(spoiling)
    with torch.inference_mode():
        logits = torch.randn(2, 16)
        before = logits.clone()
        route(config, random_weights(config), logits)
        assert torch.equal(logits, before)


def test_what_a_custom_function_gets_and_what_follows_it() -> None:
    seen = []

    def function(hidden_states, router_logits, top_k, renormalize):
        seen.append((hidden_states, router_logits, top_k, renormalize))
        return first_four(hidden_states, router_logits, top_k, renormalize)

    config = custom(
        function, renormalize=True, router_logit_scale=2.0, routed_scaling_factor=3.0, per_expert_scale=True
    )
    weights, x, logits = random_weights(config), torch.randn(2, 32), torch.randn(2, 16, dtype=torch.bfloat16)
    routing = route(config, weights, logits, hidden_states=x)
    [(hidden_states, given, top_k, renormalize)] = seen
    assert hidden_states is x
    assert torch.equal(given, logits.float() * 2)
    assert (top_k, renormalize) == (4, True)
    torch.testing.assert_close(routing.topk_weights, 1.5 * weights.per_expert_scale[:4].expand(2, -1))


def test_a_custom_function_may_choose_nobody() -> None:
    config = custom(returning(lambda w, i: (w, torch.tensor([[0, -1, -1, 3]] * 2))))
    routing = route(config, random_weights(config), torch.randn(2, 16))
    assert routing.topk_ids.tolist() == [[0, -1, -1, 3]] * 2
    assert routing.topk_weights.tolist() == [[0.5, 0.0, 0.0, 0.5]] * 2


# Replay.


@torch.no_grad()
@pytest.mark.parametrize("name", FORCEABLE)
def test_replaying_what_was_recorded_changes_nothing(name: str) -> None:
    config = config_of(name)
    runner, x = MoERunner(config, random_weights(config)), torch.randn(11, 32)
    with runner.recording(ids=True) as record:
        wanted = runner(x)
    with runner.replaying(record.routed_experts):
        assert torch.equal(runner(x), wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", FORCEABLE)
def test_a_replayed_minus_one_is_left_out(name: str) -> None:
    """Its weight is 0, and a sum or softmax over the chosen experts does not count it."""
    config = config_of(name)
    weights, logits = random_weights(config), torch.randn(5, config.num_router_outputs)
    ids = torch.full((5, config.top_k), -1, dtype=torch.int32)
    nobody = route(config, weights, logits, topk_ids=ids)
    assert nobody.topk_weights.abs().sum() == 0
    ids[:, 0] = torch.arange(5)
    routing = route(config, weights, logits, topk_ids=ids)
    assert torch.isfinite(routing.topk_weights).all()
    assert routing.topk_weights[:, 1:].abs().sum() == 0
    if not config.score_before_topk and config.scoring_func == "softmax":
        assert routing.topk_weights[:, 0].tolist() == [1.0] * 5
    if config.renormalize and config.renorm_clamp_min is None and not config.per_expert_scale:
        torch.testing.assert_close(
            routing.topk_weights[:, 0], torch.full((5,), config.routed_scaling_factor), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (torch.zeros(3, 2, dtype=torch.int32), InputError, r"\(3, 2\)"),
        (torch.zeros(3, dtype=torch.int32), InputError, r"\(3,\)"),
        (torch.zeros(3, 4), InputError, "float32"),
        (torch.full((3, 4), 16), RoutingError, "=16"),
        (torch.full((3, 4), -2), RoutingError, "=-2"),
    ],
)
def test_ids_that_do_not_fit_are_refused_before_the_call(ids: Tensor, error: type[Exception], text: str) -> None:
    config = config_of("softmax")
    with torch.no_grad():
        runner = MoERunner(config, random_weights(config))
    with pytest.raises(error, match=text), runner.replaying([ids]):
        pass


# The caller's own gate.


@torch.no_grad()
@pytest.mark.parametrize(
    ("gate", "text"),
    [
        (lambda x: x, r"\(3, 32\)"),
        (lambda x: x[:, :16].long(), "int64"),
        (lambda x: x[:2, :16], r"\(2, 16\)"),
        (lambda x: (torch.ones(2, 4), torch.zeros(2, 4).int()), "2 rows"),
        (lambda x: None, "NoneType"),
    ],
)
def test_a_gate_that_returns_something_else_is_named(gate, text: str) -> None:
    """A router that handed back hidden states once sent tokens to experts that do not exist, without an error."""
    config = config_of("softmax")
    with pytest.raises(InputError, match=text):
        MoERunner(config, random_weights(config), gate=gate)(torch.randn(3, 32))


@torch.no_grad()
def test_integer_logits_are_refused() -> None:
    config = config_of("softmax")
    with pytest.raises(InputError, match="int64"):
        MoERunner(config, random_weights(config))(torch.randn(3, 32), torch.zeros(3, 16, dtype=torch.int64))
