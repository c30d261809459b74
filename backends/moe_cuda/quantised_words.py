"""Launches of weight-only experts: one row, pairs led by the first of an expert, or sorted tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from moe_core import Routing

from .kernels import few_words, weight_only
from .kernels.align import Tiles
from .quant_tuning import LED, LONGEST, MMA_ROWS, Form, Step

if TYPE_CHECKING:
    from .quantised import Operand, Products


def words(
    plan: Any,
    these: Products,
    form: Form,
    x: Tensor,
    routing: Routing,
    dtype: torch.dtype,
    launch: Callable[..., Any],
    tiles_of: Callable[[Tensor, int, int], Tiles],
) -> Tensor:
    """As :func:`quantised.parts`, which says what is what."""
    count = routing.topk_ids.numel()
    inner = plan.workspace().empty(count, these.first["I"], dtype=x.dtype)
    out = plan.workspace().empty(count, these.first["H"], dtype=dtype)
    if form.rows == MMA_ROWS and mma_fits(these):
        return _mma(these, form, x, routing, inner, out, launch)
    if form.rows == 1 and form.tensor_cores and row_fits(these):
        return _row(these, form, x, routing, inner, out, launch)
    if form.rows == MMA_ROWS or (form.rows == 1 and not few_fits(these)):
        form = LED
    w13, w2, first, second = these.w13, these.w2, form.first, form.second
    stored13, stored2 = _stored(w13), _stored(w2)
    constants13 = {**these.first, **_codes(w13), "PIECES": 1 if w13.whole is None else w13.whole.shape[1]}
    constants2 = {**these.second, **_codes(w2)}
    both = {"BLOCK_M": form.rows, "PACKED": these.packed, "UPCAST": these.upcast, "PDL": these.pdl}
    blocks13, blocks2 = triton.cdiv(these.first["I"], first.n), triton.cdiv(these.first["H"], second.n)
    if form.rows == 1:
        routed = (routing.topk_ids, routing.topk_weights)
        each = {"HELD": these.experts, "PDL": these.pdl}
        step13, step2 = _few(these, first), _few(these, second)
        launch(
            few_words.first_kernel, count * blocks13, _fours(x, w13), *routed, *_wide(stored13), inner, count,
            **constants13, **each, **step13, **dependent(these),
        )  # fmt: skip
        launch(
            few_words.second_kernel, count * blocks2, _fours(inner, w2), *routed, *_wide(stored2), out, count,
            **constants2, **each, **step2, PREFETCH=_ahead(these, second), **dependent(these),
        )  # fmt: skip
        return out
    if form.led:
        ids, weights = routing.topk_ids, routing.topk_weights
        led = {"ALL": max(16, triton.next_power_of_2(count)), "HELD": these.experts, **both}
        step13, step2 = step_of(first) | _order(first), step_of(second) | _order(second)
        kernel, arguments = weight_only.pairs_first_kernel, (x, ids, weights, *stored13, inner, count)
        launch(kernel, count * blocks13, *arguments, **constants13, **led, **step13)
        kernel, arguments = weight_only.pairs_second_kernel, (inner, ids, weights, *stored2, out, count)
        launch(kernel, count * blocks2, *arguments, **constants2, **led, **step2, **dependent(these))
        return out
    tiles = tiles_of(routing.topk_ids, these.experts, form.rows)
    table = table_of(tiles)
    for kernel, source, stored, target, blocks, constants, step, more in (
        (weight_only.tiles_first_kernel, x, stored13, inner, blocks13, constants13, first, {}),
        (weight_only.tiles_second_kernel, inner, stored2, out, blocks2, constants2, second, dependent(these)),
    ):
        programs = programs_of(these, step, tiles, blocks)
        arguments = (source, routing.topk_weights, *stored, target, *table, programs)
        launch(kernel, programs, *arguments, **constants, **both, **step_of(step), SHARE=step.share, **more)
    return out


Product = tuple[int, tuple[Any, ...], int, int, Step, dict[str, Any]]


def _both(these: Products, form: Form, x: Tensor, routing: Routing, inner: Tensor, out: Tensor) -> Iterator[Product]:
    # For the kernels in Gluon: which product, its operands, its columns, what one sums up, and the constants of both.
    weights, ids = routing
    left_out = ("GATED", "ZERO", "WHOLE")
    for nth, source, target, matrix, step, sizes in (
        (1, x, inner, these.w13, form.first, these.first),
        (2, inner, out, these.w2, form.second, these.second),
    ):
        words = matrix.weight.view(torch.int32)
        operands = (source.view(torch.int32), ids, weights, words, matrix.scale, matrix.bias, target, ids.numel())
        constants = {name: value for name, value in {**sizes, **_codes(matrix)}.items() if name not in left_out}
        constants |= {"HELD": these.experts, "PDL": these.pdl, "num_warps": step.warps, **dependent(these)}
        yield nth, operands, target.shape[1], source.shape[1], step, constants


def _mma(
    these: Products,
    form: Form,
    x: Tensor,
    routing: Routing,
    inner: Tensor,
    out: Tensor,
    launch: Callable[..., Any],
) -> Tensor:
    from .kernels import mma_words

    count = routing.topk_ids.numel()
    together = max(32, triton.next_power_of_2(count))
    for nth, operands, columns, _, step, constants in _both(these, form, x, routing, inner, out):
        kernel = mma_words.first_kernel if nth == 1 else mma_words.second_kernel
        high = step.n // (8 * nth)
        launch(
            kernel, count * triton.cdiv(columns, step.n), *operands, **constants, **_order(step), ALL=together,
            CHUNKS=step.k // mma_words.CHUNK, HIGH=high, WIDE=step.warps // high,
        )  # fmt: skip
    return out


def _row(
    these: Products,
    form: Form,
    x: Tensor,
    routing: Routing,
    inner: Tensor,
    out: Tensor,
    launch: Callable[..., Any],
) -> Tensor:
    from .kernels import row_words

    count = routing.topk_ids.numel()
    for nth, operands, columns, summed, step, constants in _both(these, form, x, routing, inner, out):
        kernel = row_words.first_kernel if nth == 1 else row_words.second_kernel
        wide = min(step.warps, max(1, step.k // row_words.WARP))
        high, read = step.warps // wide, wide * row_words.WARP
        pairs = max(1, step.n // (nth * high))
        padded = triton.next_power_of_2(triton.cdiv(summed, read) * read // 8)
        launch(
            kernel, count * triton.cdiv(columns, nth * pairs * high), *operands, **constants, PAIRS=pairs,
            AHEAD=step.stages, HIGH=high, WIDE=wide, PAD=padded,
        )  # fmt: skip
    return out


def row_fits(these: Products) -> bool:
    """As :func:`mma_fits`, of rows that shared memory holds."""
    return mma_fits(these) and max(these.first["H"], these.first["I"]) <= LONGEST


def mma_fits(these: Products) -> bool:
    """Gated bfloat16 layers of four-bit codes around 0, a lane's of which have one scale."""
    return (
        these.packed
        and these.gluon
        and bool(these.first["GATED"])
        and these.first["H"] % 32 == 0
        and these.first["I"] % 32 == 0
        and all(
            each.code in ("e2m1", "int4")
            and each.zero is None
            and each.whole is None
            and each.weight.storage_offset() % 2 == 0
            and each.group % 32 == 0
            # A row of 32 columns of e2m1 has one scale, which is a group of more here.
            and (each.code != "e2m1" or each.group == 32)
            for each in (these.w13, these.w2)
        )
    )


def few_fits(these: Products) -> bool:
    """Rows are whole 32-bit words, and what a lane reads at a time has one scale."""
    both = ((these.w13, these.first["H"]), (these.w2, these.first["I"]))
    return all(
        columns % (_lane(each) // 4) == 0
        and each.weight.storage_offset() % 2 == 0
        and (each.group == 0 or each.group % _lane(each) == 0)
        for each, columns in both
    )


def _lane(these: Operand) -> int:
    # Weights of sixteen bytes.
    return few_words.BYTES * (1 if "int8" in these.code else 2)


def _few(these: Products, step: Step) -> dict[str, Any]:
    return {"BLOCK_N": step.n, "G": step.k // _lane(these.w13), "num_warps": step.warps}


def _ahead(these: Products, step: Step) -> int:
    # Steps of weights that the second product asks for before the first one is done.
    steps = triton.cdiv(these.first["I"], step.k)
    return min(step.stages, steps) if these.pdl and steps <= few_words.UNROLLED else 0


def _wide(stored: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    weight, *more = stored
    assert weight is not None
    return (weight.view(torch.int32), *more)


def _fours(x: Tensor, these: Operand) -> Tensor:
    # bfloat16 as int64 where words hold eight weights and rows begin at their multiples.
    fit = x.dtype is torch.bfloat16 and "int8" not in these.code and x.data_ptr() % 16 == 0
    return x.view(torch.int64) if fit else x


def _stored(these: Operand) -> tuple[Tensor | None, ...]:
    return (these.weight, these.scale, these.zero, these.whole, these.bias)


def _codes(these: Operand) -> dict[str, Any]:
    mx = these.code == "e2m1" and these.whole is None
    return {
        "CODE": these.code,
        "GROUP": these.group,
        "ZERO": these.zero is not None,
        "MX": mx,
        "WHOLE": these.whole is not None,
    }


def step_of(step: Step) -> dict[str, Any]:
    return {"BLOCK_N": step.n, "BLOCK_K": step.k, "STAGES": step.stages, "num_warps": step.warps}


def _order(step: Step) -> dict[str, Any]:
    return {"COLUMNS_FIRST": step.columns_first}


def table_of(tiles: Tiles) -> tuple[Tensor, ...]:
    return (tiles.order, tiles.tile_expert, tiles.tile_start, tiles.tile_stop, tiles.num_tiles)


def dependent(these: Products) -> dict[str, Any]:
    return {"launch_pdl": True} if these.pdl else {}


def programs_of(these: Products, step: Step, tiles: Tiles, blocks: int) -> int:
    most = tiles.max_tiles * blocks
    return min(most, these.multiprocessors * step.programs) if step.programs else most
