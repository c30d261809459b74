"""The routed experts on a GPU: one of three forms, by the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_core import ExpertsOut, Routing
from moe_core.types import Plan

from . import quantised
from .forms import BoundGrouped, few_form, grouped_form, pairs_form
from .interpreter import guarded
from .kernels.align import Tiles, align
from .kernels.combine import combine_rows
from .launch import Kernel
from .quant_tuning import Form
from .tuning import Choice, Few, Grouped, Pairs


@guarded
def experts(plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
    """[T, H], weighted, summed and scaled.

    In float32 where shared experts are added to it, in ``plan.dtype`` otherwise. [T, K, H] under ``plan.leave_sum`` in
    the grouped form, whose sum is a kernel of its own.
    """
    tokens = hidden_states.shape[0]
    choice = plan.weights.choices(tokens) if tokens else None
    x, ids, weights = hidden_states.contiguous(), routing.topk_ids.contiguous(), routing.topk_weights.contiguous()
    routing = Routing(weights, ids)
    if plan.leave_sum and isinstance(choice, Grouped) and not plan.config.zero_expert_num:
        tiles = _aligned(plan, choice, ids)
        parts = grouped_products(plan, choice, x, routing, tiles, weighted=False)
        return ExpertsOut(parts.view(*ids.shape, -1), False)
    dtype = torch.float32 if plan.config.has_shared_experts else plan.dtype
    out = torch.empty(hidden_states.shape, dtype=dtype, device=hidden_states.device)
    if choice is not None:
        run(plan, choice, x, routing, out)
    return ExpertsOut(out, True)


def run(plan: Plan, choice: Choice | Form, x: Tensor, routing: Routing, out: Tensor) -> None:
    """``experts`` of at least one token in a given form, into ``out`` [T, H]."""
    if isinstance(choice, Form):
        parts = quantised.parts(plan, plan.weights.routed, choice, x, routing, x.dtype)
    elif isinstance(choice, Few):
        few_products(plan, choice, x, routing, out)
        return
    elif isinstance(choice, Pairs):
        parts = pairs_products(plan, choice, x, routing)
    else:
        tiles = _aligned(plan, choice, routing.topk_ids)
        parts = grouped_products(plan, choice, x, routing, tiles)
    config = plan.config
    combine_rows(
        parts,
        routing.topk_ids,
        routing.topk_weights,
        out,
        weighted=True,
        limit=config.num_held_experts,
        hidden_states=x,
        zero_experts=(config.num_experts, config.num_router_outputs),
        scale=config.output_scale,
        pdl=plan.weights.pdl,
    )


def _aligned(plan: Plan, choice: Grouped, topk_ids: Tensor) -> Tiles:
    return align(topk_ids, plan.config.num_held_experts, choice.rows, over=choice.over, pdl=plan.weights.pdl)


Launch = Callable[..., None]
"""(kernel, grid, *arguments): launches, or compiles only (``tune``)."""


def few_products(
    plan: Plan, choice: Few, x: Tensor, routing: Routing, out: Tensor, launch: Launch = Kernel.__call__
) -> None:
    """Both products and the sum."""
    weights, (topk_weights, topk_ids) = plan.weights, routing
    form = few_form(weights, choice)
    tokens, pairs = topk_ids.shape[0], topk_ids.numel()
    inner = plan.workspace().empty(pairs, weights.second["I"], dtype=x.dtype)
    grid = (pairs * form.columns1, 1, 1)
    launch(form.first, grid, x, topk_ids, topk_weights, weights.w13, weights.b13, inner, pairs)
    grid = (tokens * form.columns2, 1, 1)
    launch(form.second, grid, inner, x, topk_ids, topk_weights, weights.w2, weights.b2, out, tokens)


def pairs_products(plan: Plan, choice: Pairs, x: Tensor, routing: Routing, launch: Launch = Kernel.__call__) -> Tensor:
    """[T*K, H], weighted; rows of pairs without a held expert are not written."""
    weights, (topk_weights, topk_ids) = plan.weights, routing
    count = topk_ids.numel()
    form = pairs_form(weights, choice, count)
    inner, parts = _workspace(plan, count, x.dtype)
    routed = (topk_ids, topk_weights)
    launch(form.first, (count * form.columns1, 1, 1), x, *routed, weights.w13, weights.b13, inner, count)
    launch(form.second, (count * form.columns2, 1, 1), inner, *routed, weights.w2, weights.b2, parts, count)
    return parts


def grouped_products(
    plan: Plan,
    choice: Grouped,
    x: Tensor,
    routing: Routing,
    tiles: Tiles,
    launch: Launch = Kernel.__call__,
    weighted: bool = True,
) -> Tensor:
    """[T*K, H], weighted or not; rows of pairs without a held expert are not written."""
    weights = plan.weights
    form = grouped_form(weights, choice, weighted)
    inner, parts = _workspace(plan, routing.topk_ids.numel(), x.dtype)
    table = (tiles.order, routing.topk_weights, tiles.tile_expert, tiles.tile_start, tiles.tile_stop, tiles.num_tiles)
    programs = _programs(plan, choice.first.programs, tiles.max_tiles * form.columns1)
    operands = _first_operands(plan, form, choice, x, tiles, inner, parts, launch)
    launch(form.first, (programs, 1, 1), *operands, *table, programs)
    second, rows = choice.second, choice.rows
    if form.turned:
        operands = (*_boxes(inner, choice), weights.loader_tiles("w2", second.n), weights.b2, parts)
    elif form.loader2:
        from .kernels import hopper

        operands = (hopper.boxes(inner, hopper.HEIGHT), weights.loader_tiles("w2", second.n), weights.b2, parts)
    else:
        inner_tiles = _rows_of(inner, rows, second.k) if form.tma2 else inner
        inner_half_tiles = _rows_of(inner, rows // 2, second.k) if form.tma2 and form.half2 else inner
        w2 = weights.w2_tiles(second.n, second.k) if form.tma2 else weights.w2
        operands = (inner, inner_tiles, inner_half_tiles, weights.w2, w2, weights.b2, parts)
    programs = _programs(plan, second.programs, tiles.max_tiles * form.columns2)
    launch(form.second, (programs, 1, 1), *operands, *table, programs)
    return parts


def _first_operands(
    plan: Plan,
    form: BoundGrouped,
    choice: Grouped,
    x: Tensor,
    tiles: Tiles,
    inner: Tensor,
    parts: Tensor,
    launch: Launch,
) -> tuple[Any, ...]:
    # What the first kernel of a grouped form takes in front of the table of tiles.
    weights, first = plan.weights, choice.first
    x_tiles = x_half_tiles = x
    if form.gather is not None:
        # The second product writes over it: by then nobody reads it any more.
        grid = (parts.shape[0], triton.cdiv(parts.shape[1], form.gather_block), 1)
        launch(form.gather, grid, x, tiles.order, tiles.tile_stop, tiles.num_tiles, parts)
        if form.turned:
            return *_boxes(parts, choice), weights.gate_and_up(), weights.b13, inner
        if form.loader1:
            from .kernels import hopper

            rows = hopper.boxes(parts, hopper.HEIGHT)
            return rows, weights.loader_tiles("w13", first.n), weights.b13, inner
        x_tiles = _rows_of(parts, choice.rows, first.k)
        x_half_tiles = _rows_of(parts, choice.rows // 2, first.k) if form.half1 else parts
    if form.turned:
        return x, x, weights.gate_and_up(), weights.b13, inner
    if form.loader1:
        return x, weights.loader_tiles("w13", first.n), weights.b13, inner
    w13 = weights.w13_tiles(first.n, first.k) if form.tma1 else weights.w13
    return x, x_tiles, x_half_tiles, weights.w13, w13, weights.b13, inner


def _workspace(plan: Plan, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # [T*K, I] and [T*K, H]
    lease = plan.workspace()
    second = plan.weights.second
    return lease.empty(count, second["I"], dtype=dtype), lease.empty(count, second["H"], dtype=dtype)


def _programs(plan: Plan, per_multiprocessor: int, tiles: int) -> int:
    if per_multiprocessor:
        return min(tiles, plan.weights.multiprocessors * per_multiprocessor)
    # Where other ranks hold experts, most programs of the worst case would find nothing to do; if more rows than this
    # rank's share come after all, a program takes more than one tile.
    held, everywhere = plan.config.num_held_experts, plan.config.num_experts
    return tiles if held >= everywhere else triton.cdiv(tiles * held, everywhere)


def _boxes(rows: Tensor, choice: Grouped) -> tuple[Any, Any]:
    # Quarters of a tile, and what an expert's last one has on top: for ``kernels/hopper_turned.py``.
    from .kernels import hopper

    return hopper.boxes(rows, choice.rows // 4), hopper.boxes(rows, choice.over)


def _rows_of(tensor: Tensor, rows: int, width: int) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, width])
