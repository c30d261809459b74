"""Token-expert pairs grouped by expert, by real counts, and the tiles of rows that a grouped product works through.

Blocks of pairs are counted by one launch and placed by a second, several programs a block; every placing program reads
the counts of all blocks and finds for itself where its pairs go. No atomics whose order could show, so two runs give
the same order, and the same as a stable sort. Few pairs need one launch of one program.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import Kernel

CHUNK = 128
"""Pairs that are ranked at once, by comparing each with each."""
ALONE = 512
"""Up to so many pairs one program counts and places by itself."""
BLOCKS = 128
"""Blocks above that: about one for each multiprocessor of a large GPU, since each program reads all of their counts."""
PART = 2 * CHUNK
"""Pairs of a block that one program places: chunks are placed one after the other, programs beside each other."""


@dataclass(frozen=True)
class Tiles:
    """Which rows a grouped product takes together; int32 tensors, known on the device only.

    Args:
        order: [T*K] flat pair indices t*K+k sorted by expert, stable; pairs without a held expert are not in it, and
            what lies behind the last row of the last tile is uninitialised.
        tile_expert: [max_tiles] the expert of each tile; 0 behind the last tile.
        tile_start, tile_stop: [max_tiles] the rows of ``order`` that each tile covers; 0 and 0 behind the last tile.
        num_tiles: [3 + max_tiles] how many, and a zero for each of two products: from there Hopper's kernels count the
            work that they have handed out, so that tiles serve one call. Behind them a zero for each tile: there
            ``kernels/hopper_loaders.py`` counts how much of its first product is done.
    """

    order: Tensor
    tile_expert: Tensor
    tile_start: Tensor
    tile_stop: Tensor
    num_tiles: Tensor

    @property
    def max_tiles(self) -> int:
        """How many tiles the worst routing of so many pairs needs: what a launch can count on without waiting."""
        return self.tile_expert.shape[0]


def max_tiles(pairs: int, num_experts_held: int, block_m: int) -> int:
    """The bound of :attr:`Tiles.max_tiles`: every expert that is hit adds at most one tile that is not full."""
    return min(pairs, triton.cdiv(pairs, block_m) + min(num_experts_held, pairs)) if num_experts_held else 0


def align(topk_ids: Tensor, num_experts_held: int, block_m: int, *, over: int = 0, pdl: bool = False) -> Tiles:
    """Group pairs by expert and cut each expert's rows into tiles, without waiting for the device.

    Args:
        topk_ids: [T, K] int32; ids outside 0 .. num_experts_held - 1 belong to nobody here.
        block_m: most rows of one tile.
        over: rows that an expert's last tile may have on top of that, instead of one more tile for these alone.
        pdl: launch before the kernel in front has ended, and let the next one in early; the next one has to wait.
    """
    pairs, ids = topk_ids.numel(), topk_ids.reshape(-1).contiguous()
    order = torch.empty_like(ids)
    bound = max_tiles(pairs, num_experts_held, block_m)
    if not bound:
        none = ids.new_empty(0)
        return Tiles(order, none, none, none, ids.new_zeros(3))
    tile_expert, tile_start, tile_stop = (ids.new_empty(bound) for _ in range(3))
    num_tiles = ids.new_empty(3 + bound)
    alone = pairs <= ALONE
    per_block = ALONE if alone else max(PART, triton.next_power_of_2(triton.cdiv(pairs, BLOCKS)))
    blocks = triton.cdiv(pairs, per_block)
    experts = max(32, triton.next_power_of_2(num_experts_held))
    parts = 1 if alone else per_block // PART
    # Behind the counts of whole blocks those in front of each part.
    counts = num_tiles if alone else ids.new_empty(blocks * experts * (1 + parts))
    count, place = _kernels(num_experts_held, experts, per_block, block_m, over, alone, pdl)
    if not alone:
        count((blocks, 1, 1), ids, counts, pairs, blocks)
    grid = (blocks * parts, 1, 1)
    place(grid, ids, counts, order, tile_expert, tile_start, tile_stop, num_tiles, pairs, blocks, bound)
    return Tiles(order, tile_expert, tile_start, tile_stop, num_tiles)


@functools.lru_cache(maxsize=1024)
def _kernels(
    held: int, experts: int, per_block: int, block_m: int, over: int, alone: bool, pdl: bool
) -> tuple[Kernel, Kernel]:
    both = {"HELD": held, "EXPERTS": experts, "PER_BLOCK": per_block, "CHUNK": CHUNK}
    both |= {"PART": per_block if alone else PART, "PDL": pdl}
    place = {**both, "ROWS": 8192 // experts, "BLOCK_M": block_m, "OVER": over, "ALONE": alone}
    return Kernel(count_kernel, both, pdl=pdl), Kernel(place_kernel, place, pdl=pdl)


def align_torch(topk_ids: Tensor, num_experts_held: int, block_m: int, *, over: int = 0) -> Tiles:
    """The twin of :func:`align`; waits for the device, and leaves out what lies behind the last row and tile."""
    ids = topk_ids.reshape(-1).tolist()
    order: list[int] = []
    tiles: list[tuple[int, int, int]] = []
    for expert in range(num_experts_held):
        start = len(order)
        order += [pair for pair, held_by in enumerate(ids) if held_by == expert]
        while start < len(order):
            stop = len(order) if len(order) - start <= block_m + over else start + block_m
            tiles.append((expert, start, stop))
            start = stop
    table = torch.tensor(tiles, dtype=torch.int32, device=topk_ids.device).reshape(-1, 3)
    num_tiles = torch.tensor([len(tiles), 0, 0] + len(tiles) * [0], dtype=torch.int32, device=topk_ids.device)
    return Tiles(torch.tensor(order, dtype=torch.int32, device=topk_ids.device), *table.unbind(1), num_tiles)


@triton.jit
def _count(ids, at, pairs, HELD: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """How many of CHUNK pairs from ``at`` on fall on each expert."""
    pair = at + tl.arange(0, CHUNK)
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
    return tl.histogram(expert, EXPERTS, mask=(expert >= 0) & (expert < HELD))


@triton.jit(do_not_specialize=["pairs", "blocks"])
def count_kernel(
    ids, counts, pairs, blocks, HELD: tl.constexpr, EXPERTS: tl.constexpr, PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts[block, expert] of PER_BLOCK pairs a block, then [block, part, expert] of the parts in front in a block."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    found = tl.zeros([EXPERTS], tl.int32)
    for part in tl.static_range(PER_BLOCK // PART):
        tl.store(counts + (blocks + block * (PER_BLOCK // PART) + part) * EXPERTS + e, found)
        for at in tl.static_range(0, PART, CHUNK):
            found += _count(ids, block * PER_BLOCK + part * PART + at, pairs, HELD, EXPERTS, CHUNK)
    tl.store(counts + block * EXPERTS + e, found)


@triton.jit(do_not_specialize=["pairs", "blocks", "max_tiles"])
def place_kernel(
    ids, counts, order, tile_expert, tile_start, tile_stop, num_tiles, pairs, blocks, max_tiles,
    HELD: tl.constexpr, EXPERTS: tl.constexpr, PER_BLOCK: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, OVER: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """order and tiles from the counts of all blocks; each program places one part's pairs and some of the tiles."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program, programs = tl.program_id(0), tl.num_programs(0)
    block = program // (PER_BLOCK // PART)
    e = tl.arange(0, EXPERTS)
    count = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    if ALONE:
        for at in range(0, PER_BLOCK, CHUNK):
            count += _count(ids, at, pairs, HELD, EXPERTS, CHUNK)
    else:
        for first in range(0, blocks, ROWS):
            row = first + tl.arange(0, ROWS)
            some = tl.load(counts + row[:, None] * EXPERTS + e[None, :], mask=(row < blocks)[:, None], other=0)
            count += tl.sum(some, 0)
            before += tl.sum(tl.where((row < block)[:, None], some, 0), 0)
        before += tl.load(counts + (blocks + program) * EXPERTS + e)
    stop = tl.cumsum(count, 0)
    start = stop - count

    # Tiles: the j-th of every expert at once, since few experts have many.
    tiles = (tl.where(count > OVER, count - OVER, tl.minimum(count, 1)) + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.cumsum(tiles, 0) - tiles
    total = tl.sum(tiles, 0)
    for j in range(program, tl.max(tiles, 0), programs):
        to, exists = first_tile + j, j < tiles
        tl.store(tile_expert + to, e, mask=exists)
        tl.store(tile_start + to, start + j * BLOCK_M, mask=exists)
        tl.store(tile_stop + to, tl.where(j == tiles - 1, stop, start + (j + 1) * BLOCK_M), mask=exists)
    zero = tl.zeros([EXPERTS], tl.int32)
    for first in range(total + program * EXPERTS, max_tiles, programs * EXPERTS):
        empty = first + e < max_tiles
        tl.store(tile_expert + first + e, zero, mask=empty)
        tl.store(tile_start + first + e, zero, mask=empty)
        tl.store(tile_stop + first + e, zero, mask=empty)
    for first in range(program * EXPERTS, 2 + max_tiles, programs * EXPERTS):
        tl.store(num_tiles + 1 + first + e, zero, mask=first + e < 2 + max_tiles)
    if program == 0:
        tl.store(num_tiles, total)

    # Pairs: behind those of the same expert in earlier blocks, earlier chunks, and earlier in the chunk.
    place = start + before
    i = tl.arange(0, CHUNK)
    for at in range(program * PART, (program + 1) * PART, CHUNK):
        expert = tl.load(ids + at + i, mask=at + i < pairs, other=-1)
        held = (expert >= 0) & (expert < HELD)
        expert = tl.where(held, expert, 0)
        earlier = (expert[:, None] == expert[None, :]) & (i[:, None] > i[None, :]) & held[None, :]
        to = tl.gather(place, expert, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(order + to, at + i, mask=held)
        place += tl.histogram(expert, EXPERTS, mask=held)
