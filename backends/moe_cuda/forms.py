"""The kernels of the routed experts' three forms, with a layer's constants and a choice's block sizes bound to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from .kernels import few, grouped, pairs
from .launch import Kernel
from .layout import CudaWeights
from .tuning import Few, Grouped, Pairs, Tile


@dataclass(frozen=True)
class Bound:
    """Both products of one form.

    Args:
        first, second: the kernels. columns1, columns2: blocks of columns of each product.
    """

    first: Kernel
    second: Kernel
    columns1: int
    columns2: int


@dataclass(frozen=True)
class BoundGrouped(Bound):
    """With what the grouped form's host side decides by.

    Args:
        tma1, tma2: operands come by the tensor memory accelerator. half1, half2: tiles may have half the rows.
        gather: copies the hidden states into the order of the tiles, ``gather_block`` columns a program.
        loader1, loader2: the kernel is one of ``kernels/hopper_products.py``.
        turned: both are of ``kernels/hopper_turned.py``.
    """

    tma1: bool
    tma2: bool
    half1: bool
    half2: bool
    gather: Kernel | None
    gather_block: int
    loader1: bool
    loader2: bool
    turned: bool


def few_form(weights: CudaWeights, choice: Few) -> Bound:
    """Of ``kernels/few.py``."""
    found = weights.kernels.get(choice)
    if found is None:
        second = {**weights.second, **weights.sum}
        found = weights.kernels[choice] = few_kernels(weights.first, second, choice, weights.pdl)
    return found


def few_kernels(first: dict[str, Any], second: dict[str, Any], choice: Few, pdl: bool, *, alone: bool = False) -> Bound:
    """``kernels/few.py`` for the constants of two products; ``alone``: the first kernel follows no kernel of ours."""
    hidden, width = second["H"], second["I"]
    chunks = second["K"] * triton.cdiv(width, choice.k2)
    blocks1 = {"BLOCK_N": choice.n1, "BLOCK_H": choice.k1, "PDL": pdl}
    blocks2 = {
        "BLOCK_N": choice.n2,
        "BLOCK_I": choice.k2,
        "PREFETCH": min(choice.prefetch, chunks),
        "UNROLL": chunks <= few.UNROLLED,
        "PDL": pdl,
    }
    return Bound(
        Kernel(few.first_kernel, {**first, **blocks1}, num_warps=choice.warps1, pdl=pdl and not alone),
        Kernel(few.second_kernel, {**second, **blocks2}, num_warps=choice.warps2, pdl=pdl),
        triton.cdiv(width, choice.n1),
        triton.cdiv(hidden, choice.n2),
    )


def pairs_form(weights: CudaWeights, choice: Pairs, count: int) -> Bound:
    """Of ``kernels/pairs.py``, for at most so many pairs as the next power of two."""
    most = max(pairs.ROWS, triton.next_power_of_2(count))
    found = weights.kernels.get((choice, most))
    if found is None:
        first, second = choice.first, choice.second
        both = {"ALL": most, "UPCAST": weights.upcast, "PDL": weights.pdl}
        kernels = [
            Kernel(
                kernel,
                {
                    **constants,
                    **both,
                    "BLOCK_N": dot.n,
                    "BLOCK_K": dot.k,
                    "STAGES": dot.stages,
                    "COLUMNS_FIRST": dot.columns_first,
                },
                num_warps=dot.warps,
                pdl=weights.pdl,
            )
            for kernel, constants, dot in (
                (pairs.first_kernel, weights.first, first),
                (pairs.second_kernel, _without(weights.second, "K"), second),
            )
        ]
        columns = triton.cdiv(weights.second["I"], first.n), triton.cdiv(weights.second["H"], second.n)
        found = weights.kernels[choice, most] = Bound(*kernels, *columns)
    return found


def grouped_form(weights: CudaWeights, choice: Grouped, weighted: bool = True) -> BoundGrouped:
    """Of ``kernels/grouped.py``; its rows carry their weights, or whoever sums them sees to that."""
    found = weights.kernels.get((choice, weighted))
    if found is None:
        found = weights.kernels[choice, weighted] = _grouped_form(weights, choice, weighted)
    return found


def _grouped_form(weights: CudaWeights, choice: Grouped, weighted: bool) -> BoundGrouped:
    first, second = choice.first, choice.second
    hidden, width = weights.second["H"], weights.second["I"]
    constants = _without(weights.first, "HELD")
    # One box of gate rows and up rows: they have to lie in two blocks.
    tma1 = weights.tma and first.tma and constants["GATED"] and constants["ROW"] == 1
    tma2 = weights.tma and second.tma
    half1, half2 = (tile.half and choice.rows >= 32 for tile in (first, second))
    loader1 = tma1 and _takes_loader(weights, choice.rows, first, hidden)
    loader2 = tma2 and _takes_loader(weights, choice.rows, second, width)
    gathered = tma1 and first.gather
    # The second product writes over gathered hidden states: then it waits until the first has read them all.
    early = second.early and weights.pdl and not gathered and (choice.turned or (loader1 and loader2))
    pieces = triton.cdiv(width, first.n) if early else 0
    block = min(2048, triton.next_power_of_2(hidden))

    def blocks(tile: Tile, half: bool, tma: bool) -> dict[str, Any]:
        return {
            "BLOCK_M": choice.rows,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "STAGES": tile.stages,
            "GROUP": tile.group,
            "HALF": half,
            "FLATTEN": tile.flatten,
            "TMA": tma,
            "UPCAST": weights.upcast,
            "PDL": weights.pdl,
        }

    of_second = _without(weights.second, "HELD", "K")
    if not weighted:  # a row that has its weight from the input gets none here either
        of_second["WEIGHT_ON_INPUT"] = True
    of_first = {**_without(constants, "GATED", "ROW", "UP"), "GATHERED": gathered, "EARLY": early}
    if choice.turned:
        kernel1 = _turned_kernel("first_kernel", of_first, choice, first, weights.pdl)
    elif loader1:
        kernel1 = _loader_kernel("first_kernel", of_first, choice.rows, first, weights.pdl)
    else:
        blocks1 = {**blocks(first, half1, tma1), "GATHERED": gathered}
        kernel1 = Kernel(grouped.first_kernel, {**constants, **blocks1}, num_warps=first.warps, pdl=weights.pdl)
    if choice.turned:
        kernel2 = _turned_kernel("second_kernel", {**of_second, "PIECES": pieces}, choice, second, weights.pdl)
    elif loader2:
        kernel2 = _loader_kernel("second_kernel", {**of_second, "PIECES": pieces}, choice.rows, second, weights.pdl)
    else:
        blocks2 = {**of_second, **blocks(second, half2, tma2)}
        kernel2 = Kernel(grouped.second_kernel, blocks2, num_warps=second.warps, pdl=weights.pdl)
    return BoundGrouped(
        kernel1,
        kernel2,
        triton.cdiv(width, first.n),
        triton.cdiv(hidden, second.n),
        tma1,
        tma2,
        half1,
        half2,
        Kernel(grouped.gather_kernel, {"H": hidden, "K": constants["K"], "BLOCK": block}) if gathered else None,
        block,
        loader1,
        loader2,
        choice.turned,
    )


def _takes_loader(weights: CudaWeights, rows: int, tile: Tile, depth: int) -> bool:
    if not (weights.loader and tile.loader):
        return False
    from .kernels import hopper

    return rows in hopper.ROWS and depth % hopper.DEPTH == 0


def _loader_kernel(name: str, constants: dict[str, Any], rows: int, tile: Tile, pdl: bool) -> Kernel:
    from .kernels import hopper, hopper_products

    groups = rows // hopper.HEIGHT
    blocks = {"GROUPS": groups, "BLOCK_N": tile.n, "STAGES": tile.stages, "GROUP": tile.group, "PDL": pdl}
    # Of 65536, shared out by 128 threads.
    of_sum, of_load = {2: (232, 40), 3: (160, 32)}[groups]
    registers = {"SUM_REGISTERS": of_sum, "LOAD_REGISTERS": of_load}
    return Kernel(getattr(hopper_products, name), {**constants, **blocks, **registers}, num_warps=4, pdl=pdl)


def _turned_kernel(name: str, constants: dict[str, Any], choice: Grouped, tile: Tile, pdl: bool) -> Kernel:
    from .kernels import hopper_turned

    # Gathering needs registers; of 65536, shared out by 128 threads.
    of_sum, of_load = (232, 40) if constants.get("GATHERED", True) else (216, 72)
    sizes = {"MAIN": choice.rows, "REST": choice.over, "STAGES": tile.stages, "GROUP": tile.group}
    registers = {"SUM_REGISTERS": of_sum, "LOAD_REGISTERS": of_load}
    return Kernel(getattr(hopper_turned, name), {**constants, **sizes, **registers, "PDL": pdl}, num_warps=4, pdl=pdl)


def _without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name not in names}
