"""What the native kernel computes: its layout, every variant, every height of tile, and which bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import Routing, reference
from moe_core.testing.cases import EXPERT_VARIANTS, ROUTER_FAMILIES
from moe_core.testing.tolerances import tolerance
from moe_core.types import Pending, Plan

DTYPES = [torch.float32, torch.bfloat16]
HEIGHTS = [1, 2, 3, 4, 5, 6, 7, 13, 17, 33, 95, 97, 200, 260]
"""Tokens of one expert: each tile alone, pairs, and both sides of a block of rows, in vectors and in tiles."""


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def threads() -> Any:
    """``threads(n)``; the number is what it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_packing_keeps_every_number(make: Any, dtype: torch.dtype, interleaved: bool) -> None:
    """Read back by the layout that panels.h or tiles.h describes, panels hold the weights, and zeros behind them."""
    case = make(dtype, w13_interleaved=interleaved, hidden_size=300)
    w13, w2, _, _ = case.packed.experts.run.tensors
    config, layout = case.config, case.packed.experts.run.layout
    panel, width = layout.width, config.intermediate_size

    def columns(packed: Tensor, first: int = 0, step: int = 1) -> Tensor:
        """Pieces of [panels, k, panel], at most 256 k each, as [E, panels * panel, K]; or tiles of pairs of inputs."""
        experts, rows, depth = packed.shape
        panels = rows // panel
        if layout.tiles:
            tiles = packed.view(experts, -1, depth // 32, 16, layout.together, panel, 2).permute(0, 1, 4, 5, 2, 3, 6)
            return tiles.reshape(experts, panels, panel, depth)[:, first::step].flatten(1, 2)
        pieces = packed.view(experts, -1).split([panels * panel * min(256, depth - k) for k in range(0, depth, 256)], 1)
        packed = torch.cat([piece.reshape(experts, panels, -1, panel) for piece in pieces], dim=2)[:, first::step]
        if dtype is torch.bfloat16:
            packed = packed.unflatten(-1, (panel // 2, 2)).transpose(-1, -2).flatten(-2)
        return packed.transpose(-1, -2).flatten(1, 2)

    plain = case.weights.w13_weight
    gate, up = (plain[:, 0::2], plain[:, 1::2]) if interleaved else plain.chunk(2, dim=1)
    for which, expected in enumerate((gate, up)):
        found = columns(w13, which, 2)
        assert torch.equal(found[:, :width, : config.hidden_size], expected)
        assert not found[:, width:].any() and not found[..., config.hidden_size :].any()
    found = columns(w2)
    assert torch.equal(found[:, : config.hidden_size, :width], case.weights.w2_weight)
    assert not found[:, config.hidden_size :].any() and not found[..., width:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [*EXPERT_VARIANTS, "zero_experts", "output_scaled"])
def test_every_variant(make: Any, variant: str, dtype: torch.dtype) -> None:
    """Odd sizes, some tokens without an expert or with a foreign one."""
    more: dict[str, Any] = {
        "zero_experts": ROUTER_FAMILIES["softmax_bias_zero_experts"],
        "output_scaled": {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
    }
    case = make(dtype, **{**EXPERT_VARIANTS, **more}[variant])
    x, routing = case.hidden(23), case.routing(23)
    routing.topk_ids[3], routing.topk_ids[4:9, 0] = -1, -1
    if variant == "zero_experts":
        routing.topk_ids[9:12, 0] = case.config.num_experts + 1
    assert error(case.run(x, routing), case.expected(x, routing)) <= tolerance(dtype, "experts")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", HEIGHTS)
def test_every_height_of_tile(make: Any, tokens: int, dtype: torch.dtype) -> None:
    """All tokens go to one expert; the inner dimensions need several blocks of k, and the last is not full."""
    case = make(dtype, hidden_size=300, intermediate_size=270, num_experts=2, top_k=1, expert_bias=True)
    x = case.hidden(tokens)
    routing = Routing(torch.rand(tokens, 1), torch.ones(tokens, 1, dtype=torch.int32))
    assert error(case.run(x, routing), case.expected(x, routing)) <= tolerance(dtype, "experts")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_threads_nor_neighbours(make: Any, threads: Any, dtype: torch.dtype) -> None:
    """1, 2 and 3 threads, the same call twice, any part of the batch and each token alone: the same bits."""
    case = make(dtype, hidden_size=300, intermediate_size=270, expert_bias=True)
    x, routing = case.hidden(211), case.routing(211)
    threads(1)
    first = case.run(x, routing)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(case.run(x, routing), first)
        for part in (slice(0, 1), slice(5, 7), slice(9, 40), slice(100, 211)):
            alone = case.run(x[part], Routing(routing.topk_weights[part], routing.topk_ids[part]))
            assert torch.equal(alone, first[part])


def test_a_sum_to_which_nothing_is_added_may_come_rounded(make: Any) -> None:
    """The layer's output without shared experts: the float32 sum in bfloat16, to the bit, in rows of any width."""
    case = make(torch.bfloat16, hidden_size=300, expert_bias=True)
    x, routing = case.hidden(23), case.routing(23)
    plan = Plan(case.config, case.packed, torch.device("cpu"), torch.bfloat16)
    found = reference.moe_reduce(plan, routing, case.packed.experts.routed(plan, x, routing), Pending(None))
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, case.run(x, routing).bfloat16())


def test_foreign_ids_are_not_read(make: Any) -> None:
    """Whatever int32 stands in topk_ids: no expert, no zero expert, nothing added, no crash."""
    case = make(torch.float32, num_local_experts=3)
    x, routing = case.hidden(8), case.routing(8)
    routing.topk_ids[:, 0] = torch.tensor([-1, -2, 3, 4, 5, 2**31 - 1, -(2**31), 1000]).int()
    routing.topk_ids[:, 1] = 1
    alone = Routing(routing.topk_weights.clone(), routing.topk_ids.clone())
    alone.topk_ids[:, 0] = -1
    assert torch.equal(case.run(x, routing), case.run(x, alone))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_at_their_ends(make: Any, activation: str, dtype: torch.dtype) -> None:
    """Where exponentials over- or underflow the reference's values come out, and NaN stays in its row."""
    case = make(dtype, activation=activation, gated=False)
    x, routing = case.hidden(12), case.routing(12)
    x[:10] *= torch.logspace(-12, 4, 10)[:, None].to(dtype)
    x[10] = float("nan")
    found, expected = case.run(x, routing), case.expected(x, routing)
    for row in (*range(10), 11):
        assert error(found[row], expected[row]) <= tolerance(dtype, "experts")
    assert found[10].isnan().all()


def test_memory_beside_the_weights_is_not_read(make: Any) -> None:
    """Transposed views, rows that are a part of longer ones, and NaN in what lies between."""
    case = make(torch.float32)
    x, routing = case.hidden(9), case.routing(9)
    before = case.run(x, routing)
    experts = case.packed.experts
    wide = torch.full((*case.weights.w13_weight.shape[:2], 60), float("nan"))
    wide[..., 7:52] = case.weights.w13_weight
    turned = case.weights.w2_weight.mT.contiguous().mT
    again = type(experts.run).pack(
        experts.run.kernel,
        case.config,
        wide[..., 7:52],
        turned,
        None,
        None,
        lambda matrix, expert: None,
        top_k=case.config.top_k,
    )
    assert torch.equal(again(x, routing.topk_ids, routing.topk_weights), before)
