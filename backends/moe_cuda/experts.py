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
from .interpreter import guarded
from .kernels import few, grouped, pairs
from .kernels.align import Tiles, align
from .kernels.combine import combine_rows
from .layout import CudaWeights
from .quant_tuning import Form
from .tuning import Choice, Few, Grouped, Pairs


@guarded
def experts(plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
    """[T, H], weighted, summed and scaled.

    In float32 where shared experts are added to it, in ``plan.dtype`` otherwise.
    """
    dtype = torch.float32 if plan.config.has_shared_experts else plan.dtype
    out = torch.empty(hidden_states.shape, dtype=dtype, device=hidden_states.device)
    tokens = hidden_states.shape[0]
    if tokens:
        x, ids, weights = hidden_states.contiguous(), routing.topk_ids.contiguous(), routing.topk_weights.contiguous()
        run(plan, plan.weights.choices(tokens), x, Routing(weights, ids), out)
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
        tiles = align(routing.topk_ids, plan.config.num_held_experts, choice.rows)
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


Launch = Callable[..., Any]


def _launch(kernel: Any, programs: int | tuple[int, int], *arguments: Any, **constants: Any) -> None:
    kernel[programs if isinstance(programs, tuple) else (programs,)](*arguments, **constants)


def few_products(plan: Plan, choice: Few, x: Tensor, routing: Routing, out: Tensor, launch: Launch = _launch) -> None:
    """Both products and the sum. ``launch`` may compile instead of running (``tune``)."""
    config, weights = plan.config, plan.weights
    tokens, k = routing.topk_ids.shape
    hidden, width = weights.second["H"], weights.second["I"]
    inner = plan.workspace().empty(tokens * k, width, dtype=x.dtype)
    launch(
        few.first_kernel,
        tokens * k * triton.cdiv(width, choice.n1),
        x,
        routing.topk_ids,
        routing.topk_weights,
        weights.w13,
        weights.b13,
        inner,
        tokens * k,
        **weights.first,
        BLOCK_N=choice.n1,
        BLOCK_H=choice.k1,
        PDL=weights.pdl,
        num_warps=choice.warps1,
    )
    chunks = k * triton.cdiv(width, choice.k2)
    launch(
        few.second_kernel,
        tokens * triton.cdiv(hidden, choice.n2),
        inner,
        x,
        routing.topk_ids,
        routing.topk_weights,
        weights.w2,
        weights.b2,
        out,
        tokens,
        ZERO_START=config.num_experts,
        ZERO_STOP=config.num_router_outputs,
        SCALE=config.output_scale,
        **weights.second,
        BLOCK_N=choice.n2,
        BLOCK_I=choice.k2,
        PREFETCH=min(choice.prefetch, chunks),
        UNROLL=chunks <= few.UNROLLED,
        PDL=weights.pdl,
        num_warps=choice.warps2,
        **_dependent(weights),
    )


def pairs_products(plan: Plan, choice: Pairs, x: Tensor, routing: Routing, launch: Launch = _launch) -> Tensor:
    """[T*K, H], weighted; rows of pairs without a held expert are not written."""
    weights = plan.weights
    count = routing.topk_ids.numel()
    hidden, width = weights.second["H"], weights.second["I"]
    workspace = plan.workspace()
    inner = workspace.empty(count, width, dtype=x.dtype)
    parts = workspace.empty(count, hidden, dtype=x.dtype)
    first, second = choice.first, choice.second
    shared = {"ALL": max(pairs.ROWS, triton.next_power_of_2(count)), "UPCAST": weights.upcast, "PDL": weights.pdl}
    launch(
        pairs.first_kernel,
        count * triton.cdiv(width, first.n),
        x,
        routing.topk_ids,
        routing.topk_weights,
        weights.w13,
        weights.b13,
        inner,
        count,
        **weights.first,
        **shared,
        BLOCK_N=first.n,
        BLOCK_K=first.k,
        STAGES=first.stages,
        COLUMNS_FIRST=first.columns_first,
        num_warps=first.warps,
    )
    launch(
        pairs.second_kernel,
        count * triton.cdiv(hidden, second.n),
        inner,
        routing.topk_ids,
        routing.topk_weights,
        weights.w2,
        weights.b2,
        parts,
        count,
        **weights.pairs_second,
        **shared,
        BLOCK_N=second.n,
        BLOCK_K=second.k,
        STAGES=second.stages,
        COLUMNS_FIRST=second.columns_first,
        num_warps=second.warps,
        **_dependent(weights),
    )
    return parts


def grouped_products(
    plan: Plan, choice: Grouped, x: Tensor, routing: Routing, tiles: Tiles, launch: Launch = _launch
) -> Tensor:
    """[T*K, H], weighted; rows of pairs without a held expert are not written."""
    weights = plan.weights
    count = routing.topk_ids.numel()
    hidden, width = weights.second["H"], weights.second["I"]
    table = (tiles.tile_expert, tiles.tile_start, tiles.tile_stop, tiles.num_tiles)
    most = tiles.max_tiles
    workspace = plan.workspace()
    inner = workspace.empty(count, width, dtype=x.dtype)
    parts = workspace.empty(count, hidden, dtype=x.dtype)
    first, second = choice.first, choice.second
    constants = weights.grouped_first
    # One box of gate rows and up rows: they have to lie in two blocks.
    tma = weights.tma and first.tma and constants["GATED"] and constants["ROW"] == 1
    gathered, half = tma and first.gather, first.half and choice.rows >= 32
    x_tiles = x_half_tiles = x
    if gathered:
        # The second product writes over it: by then nobody reads it any more.
        block = min(2048, triton.next_power_of_2(hidden))
        grid = (count, triton.cdiv(hidden, block))
        gather = (x, tiles.order, tiles.tile_stop, tiles.num_tiles, parts, hidden, constants["K"], block)
        launch(grouped.gather_kernel, grid, *gather)
        x_tiles = _rows_of(parts, choice.rows, first.k)
        x_half_tiles = _rows_of(parts, choice.rows // 2, first.k) if half else parts
    programs = _programs(weights, first.programs, most * triton.cdiv(width, first.n))
    launch(
        grouped.first_kernel,
        programs,
        x,
        x_tiles,
        x_half_tiles,
        weights.w13,
        weights.w13_tiles(first.n, first.k) if tma else weights.w13,
        weights.b13,
        inner,
        tiles.order,
        routing.topk_weights,
        *table,
        programs,
        **constants,
        BLOCK_M=choice.rows,
        BLOCK_N=first.n,
        BLOCK_K=first.k,
        STAGES=first.stages,
        GROUP=first.group,
        HALF=half,
        FLATTEN=first.flatten,
        TMA=tma,
        GATHERED=gathered,
        UPCAST=weights.upcast,
        PDL=weights.pdl,
        num_warps=first.warps,
    )
    tma = weights.tma and second.tma
    programs = _programs(weights, second.programs, most * triton.cdiv(hidden, second.n))
    half = second.half and choice.rows >= 32
    launch(
        grouped.second_kernel,
        programs,
        inner,
        _rows_of(inner, choice.rows, second.k) if tma else inner,
        _rows_of(inner, choice.rows // 2, second.k) if tma and half else inner,
        weights.w2,
        weights.w2_tiles(second.n, second.k) if tma else weights.w2,
        weights.b2,
        parts,
        tiles.order,
        routing.topk_weights,
        *table,
        programs,
        **weights.grouped_second,
        BLOCK_M=choice.rows,
        BLOCK_N=second.n,
        BLOCK_K=second.k,
        STAGES=second.stages,
        GROUP=second.group,
        HALF=half,
        FLATTEN=second.flatten,
        TMA=tma,
        UPCAST=weights.upcast,
        PDL=weights.pdl,
        num_warps=second.warps,
        **_dependent(weights),
    )
    return parts


def _dependent(weights: CudaWeights) -> dict[str, Any]:
    # Programmatic dependent launch: the next kernel's prologue overlaps the end of this one.
    return {"launch_pdl": True} if weights.pdl else {}


def _programs(weights: CudaWeights, per_multiprocessor: int, tiles: int) -> int:
    return min(tiles, weights.multiprocessors * per_multiprocessor) if per_multiprocessor else tiles


def _rows_of(tensor: Tensor, rows: int, width: int) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, width])
