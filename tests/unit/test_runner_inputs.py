"""What goes in: shapes that must work, and inputs that must be refused with the value and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_core import MoEConfig, MoELayer, MoERunner, MoEWeights, fused_experts, ops
from moe_core.errors import ConfigError, InputError, MoECoreError, RoutingError, WeightsError
from moe_core.inputs import Common, common_routing, given_routing

USABLE = ["reference", "cpu"]


@pytest.fixture(params=USABLE)
def runner(request: pytest.FixtureRequest, layer: MoELayer) -> MoERunner:
    with torch.no_grad():
        return MoERunner(layer.config, layer.weights(), backend=request.param)


@torch.no_grad()
def test_rows_do_not_depend_on_the_shape_they_come_in(runner: MoERunner) -> None:
    x = torch.randn(6, 32)
    flat = runner(x)
    assert torch.equal(runner(x.view(2, 3, 32)), flat.view(2, 3, 32))
    assert torch.equal(runner(x.t().contiguous().t()), flat)
    assert torch.equal(runner(torch.cat([x, x], dim=1)[:, :32]), flat)
    torch.testing.assert_close(runner(x[0]), flat[0])
    torch.testing.assert_close(runner(x[:1].expand(4, 32)), flat[:1].expand(4, 32))
    torch.testing.assert_close(runner(x[:1]), flat[:1])


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_no_tokens(runner: MoERunner, shape: tuple[int, ...]) -> None:
    assert runner(torch.empty(shape)).shape == shape


@torch.no_grad()
def test_the_input_is_not_changed(runner: MoERunner) -> None:
    x = torch.randn(5, 32)
    before = x.clone()
    out = runner(x)
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


@torch.no_grad()
def test_given_routing_and_given_logits(runner: MoERunner, layer: MoELayer) -> None:
    x = torch.randn(7, 32)
    logits = x @ layer.gate_weight.t()
    torch.testing.assert_close(runner(x, logits), runner(x))
    weights, ids = torch.sort(torch.softmax(logits, -1), dim=-1, descending=True, stable=True)
    weights = weights[:, :2] / weights[:, :2].sum(-1, keepdim=True)
    torch.testing.assert_close(runner(x, topk_weights=weights, topk_ids=ids[:, :2]), runner(x))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", ["eager", "op"])
def test_autocast_changes_no_bit(layer: MoELayer, call: str, grad: bool) -> None:
    """It would compute the router's product in bfloat16, and other experts would be chosen."""
    runner, x = MoERunner(layer.config, layer.weights()), torch.randn(7, 32)
    run = runner if call == "eager" else lambda x: ops.call(runner, x, None, None, None, None)
    with torch.set_grad_enabled(grad):
        want = run(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(x), want)
            assert torch.is_autocast_enabled("cpu")


REFUSED = [
    ("hidden size", lambda r, x: r(x[:, :31]), InputError, "31"),
    ("scalar", lambda r, x: r(x[0, 0]), InputError, "()"),
    ("dtype", lambda r, x: r(x.half()), InputError, "float16"),
    ("device", lambda r, x: r(x.to("meta")), InputError, "meta"),
    ("logits width", lambda r, x: r(x, x), InputError, "[4, 8]"),
    ("ids alone", lambda r, x: r(x, topk_ids=torch.zeros(4, 2).int()), InputError, "topk_weights=None"),
    (
        "ids out of range",
        lambda r, x: r(x, topk_weights=torch.ones(4, 2), topk_ids=torch.full((4, 2), 8)),
        RoutingError,
        "=8",
    ),
    (
        "ids below -1",
        lambda r, x: r(x, topk_weights=torch.ones(4, 2), topk_ids=torch.full((4, 2), -2)),
        RoutingError,
        "=-2",
    ),
    (
        "float ids",
        lambda r, x: r(x, topk_weights=torch.ones(4, 2), topk_ids=torch.zeros(4, 2)),
        InputError,
        "float32",
    ),
    (
        "ids of other tokens",
        lambda r, x: r(x, topk_weights=torch.ones(3, 2), topk_ids=torch.zeros(3, 2).int()),
        InputError,
        "3 rows",
    ),
    (
        "K",
        lambda r, x: r(x, topk_weights=torch.ones(4, 3), topk_ids=torch.zeros(4, 3).int()),
        InputError,
        "top_k = 2",
    ),
]


@torch.no_grad()
@pytest.mark.parametrize(("call", "error", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_bad_input_is_refused(runner: MoERunner, call, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call(runner, torch.randn(4, 32))
    assert isinstance(caught.value, MoECoreError)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"w13_weight": torch.zeros(8, 32, 48)}, "w13_weight has shape (8, 32, 48)"),
        ({"w2_weight": torch.zeros(8, 24, 32)}, "w2_weight has shape"),
        ({"w2_weight": None}, "w2_weight=None"),
        ({"gate_weight": torch.zeros(9, 32)}, "gate_weight has shape (9, 32)"),
        ({"shared_gate_weight": None}, "shared_gate_weight=None"),
        ({"w13_weight": torch.zeros(8, 48, 32, dtype=torch.int8)}, "int8"),
        ({"w2_weight": torch.zeros(8, 32, 24, device="meta")}, "meta"),
        ({"e_score_correction_bias": torch.zeros(8, dtype=torch.bfloat16)}, "float32"),
    ],
)
def test_bad_weights_are_refused(layer: MoELayer, change: dict, text: str) -> None:
    weights = MoEWeights(**{**dict(layer.weights().named_tensors()), **change})
    with pytest.raises(WeightsError) as caught:
        MoERunner(layer.config, weights)
    assert text in str(caught.value)


def test_a_bias_that_the_config_denies_is_an_error() -> None:
    layer = MoELayer(MoEConfig(32, 24, 8, 2, gate_bias=True))
    with pytest.raises(WeightsError, match="gate_bias"):
        MoERunner(MoEConfig(32, 24, 8, 2, gate_bias=False), layer.weights())


def test_weights_of_shared_experts_are_never_dropped(layer: MoELayer) -> None:
    with pytest.raises(WeightsError, match="shared"):
        MoERunner(MoEConfig(32, 24, 8, 2), layer.weights())


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_fused_experts_equals_a_loop_and_honours_expert_map(backend: str) -> None:
    w13, w2, x = torch.randn(4, 48, 32) / 6, torch.randn(4, 32, 24) / 5, torch.randn(5, 32)
    ids = torch.tensor([[0, 3], [2, 1], [-1, 2], [3, 0], [1, -1]])
    weights = torch.rand(5, 2)
    expected = torch.zeros(5, 32)
    for t in range(5):
        for k in range(2):
            if ids[t, k] >= 0:
                gate, up = (w13[ids[t, k]] @ x[t]).chunk(2)
                expected[t] += weights[t, k] * (w2[ids[t, k]] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(fused_experts(x, w13, w2, weights, ids, backend=backend), expected, rtol=1e-5, atol=1e-5)
    halves = torch.zeros(5, 32)
    for mine in ([0, 1], [2, 3]):
        expert_map = torch.full((4,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(2, dtype=torch.int32)
        halves += fused_experts(x, w13[mine], w2[mine], weights, ids, expert_map=expert_map, backend=backend)
    torch.testing.assert_close(halves, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RoutingError, match="4"):
        fused_experts(x, w13, w2, weights, ids + 2, backend=backend)


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="top_k"):
        MoEConfig(32, 24, 8, 9)
    assert issubclass(ConfigError, MoECoreError)


ROUTINGS: dict[str, Any] = {
    "as it should be": lambda w, i: (w, i),
    "no weights": lambda w, i: (None, i),
    "no ids": lambda w, i: (w, None),
    "wide ids": lambda w, i: (w, i.long()),
    "ids that are floats": lambda w, i: (w, i.float()),
    "weights in bfloat16": lambda w, i: (w.bfloat16(), i),
    "one column more": lambda w, i: (torch.cat((w, w[:, :1]), 1), torch.cat((i, i[:, :1]), 1)),
    "one row less": lambda w, i: (w[1:], i[1:]),
    "three dimensions": lambda w, i: (w[None], i[None]),
    "no expert": lambda w, i: (w, i.index_fill(1, torch.tensor([0]), -1)),
    "behind the last": lambda w, i: (w, i.index_fill(1, torch.tensor([1]), 6)),
    "in front of the first": lambda w, i: (w, i.index_fill(1, torch.tensor([1]), -2)),
    "elsewhere": lambda w, i: (w.to("meta"), i),
}


@pytest.mark.parametrize("check", [None, True, False])
@pytest.mark.parametrize("local", [None, 4])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_the_short_way_takes_no_routing_that_the_long_way_refuses(
    kind: str, tokens: int, local: int | None, check: bool | None
) -> None:
    """And what it takes is the same routing; tokens that are as they should be, and few, go that way."""
    config = MoEConfig(8, 4, 6, 2, num_local_experts=local, check_ids=check)
    ids = torch.arange(tokens * 2).reshape(tokens, 2).remainder(4).to(torch.int32)
    given = ROUTINGS[kind](torch.rand(tokens, 2), ids)
    cpu = torch.device("cpu")
    found = common_routing(Common.of(config, cpu), tokens, *given)
    if found is not None:
        wanted = given_routing(config, tokens, *given, cpu)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    elif kind == "as it should be":
        assert tokens == 40 and check is not False
