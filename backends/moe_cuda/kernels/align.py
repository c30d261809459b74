"""Token-expert pairs grouped by expert, by real counts, and the tiles of rows that a grouped product works through.

Blocks of pairs are counted by one launch and placed by a second; every placing program reads the whole count matrix and
finds for itself where its pairs go. No atomics whose order could show, so two runs give the same order, and the same as
a stable sort. Few pairs need one launch of one program.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Kernel

CHUNK = 128
"""Pairs that are ranked at once, by comparing each with each."""
ALONE = 512
"""Up to so many pairs one program counts and places by itself."""
BLOCKS = 128
"""Programs above that: about one for each multiprocessor of a large GPU, since each reads all of their counts."""


@dataclass(frozen=True)
class Tiles:
    """Which rows a grouped product takes together; int32 tensors, known on the device only.

    Args:
        order: [T*K] flat pair indices t*K+k sorted by expert, stable; pairs without a held expert are not in it, and
            what lies behind the last row of the last tile is uninitialised.
        tile_expert: [max_tiles] the expert of each tile; 0 behind the last tile.
        tile_start, tile_stop: [max_tiles] the rows of ``order`` that each tile covers; 0 and 0 behind the last tile.
        num_tiles: [1].
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


def align(topk_ids: Tensor, num_experts_held: int, block_m: int) -> Tiles:
    """Group pairs by expert and cut each expert's rows into tiles, without waiting for the device.

    Args:
        topk_ids: [T, K] int32; ids outside 0 .. num_experts_held - 1 belong to nobody here.
        block_m: most rows of one tile.
    """
    pairs, ids = topk_ids.numel(), topk_ids.reshape(-1).contiguous()
    order = torch.empty_like(ids)
    bound = max_tiles(pairs, num_experts_held, block_m)
    if not bound:
        none = ids.new_empty(0)
        return Tiles(order, none, none, none, ids.new_zeros(1))
    tile_expert, tile_start, tile_stop = (ids.new_empty(bound) for _ in range(3))
    num_tiles = ids.new_empty(1)
    alone = pairs <= ALONE
    per_block = ALONE if alone else max(2 * CHUNK, triton.next_power_of_2(triton.cdiv(pairs, BLOCKS)))
    blocks = triton.cdiv(pairs, per_block)
    experts = max(32, triton.next_power_of_2(num_experts_held))
    counts = num_tiles if alone else ids.new_empty(blocks * experts)
    count, place = _kernels(num_experts_held, experts, per_block, block_m, alone)
    grid = (blocks, 1, 1)
    if not alone:
        count(grid, ids, counts, pairs)
    place(grid, ids, counts, order, tile_expert, tile_start, tile_stop, num_tiles, pairs, blocks, bound)
    return Tiles(order, tile_expert, tile_start, tile_stop, num_tiles)


@functools.lru_cache(maxsize=1024)
def _kernels(held: int, experts: int, per_block: int, block_m: int, alone: bool) -> tuple[Kernel, Kernel]:
    both = {"HELD": held, "EXPERTS": experts, "PER_BLOCK": per_block, "CHUNK": CHUNK}
    place = {**both, "ROWS": 8192 // experts, "BLOCK_M": block_m, "ALONE": alone}
    return Kernel(count_kernel, both), Kernel(place_kernel, place)


def align_torch(topk_ids: Tensor, num_experts_held: int, block_m: int) -> Tiles:
    """The twin of :func:`align`; waits for the device, and leaves out what lies behind the last row and tile."""
    ids = topk_ids.reshape(-1).tolist()
    order: list[int] = []
    tiles: list[tuple[int, int, int]] = []
    for expert in range(num_experts_held):
        start = len(order)
        order += [pair for pair, held_by in enumerate(ids) if held_by == expert]
        while start < len(order):
            stop = min(start + block_m, len(order))
            tiles.append((expert, start, stop))
            start = stop
    table = torch.tensor(tiles, dtype=torch.int32, device=topk_ids.device).reshape(-1, 3)
    num_tiles = torch.tensor([len(tiles)], dtype=torch.int32, device=topk_ids.device)
    return Tiles(torch.tensor(order, dtype=torch.int32, device=topk_ids.device), *table.unbind(1), num_tiles)


@triton.jit
def _count(ids, at, pairs, HELD: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """How many of CHUNK pairs from ``at`` on fall on each expert."""
    pair = at + tl.arange(0, CHUNK)
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
    return tl.histogram(expert, EXPERTS, mask=(expert >= 0) & (expert < HELD))


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    ids, counts, pairs, HELD: tl.constexpr, EXPERTS: tl.constexpr, PER_BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """counts[block, expert] of PER_BLOCK pairs a block."""
    block = tl.program_id(0)
    found = tl.zeros([EXPERTS], tl.int32)
    for at in range(block * PER_BLOCK, (block + 1) * PER_BLOCK, CHUNK):
        found += _count(ids, at, pairs, HELD, EXPERTS, CHUNK)
    tl.store(counts + block * EXPERTS + tl.arange(0, EXPERTS), found)


@triton.jit(do_not_specialize=["pairs", "blocks", "max_tiles"])
def place_kernel(
    ids, counts, order, tile_expert, tile_start, tile_stop, num_tiles, pairs, blocks, max_tiles,
    HELD: tl.constexpr, EXPERTS: tl.constexpr, PER_BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """order and tiles from the counts of all blocks; each block places its own pairs and some of the tiles."""
    block = tl.program_id(0)
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
    stop = tl.cumsum(count, 0)
    start = stop - count

    # Tiles: the j-th of every expert at once, since few experts have many.
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.cumsum(tiles, 0) - tiles
    total = tl.sum(tiles, 0)
    for j in range(block, tl.max(tiles, 0), blocks):
        to, exists = first_tile + j, j < tiles
        tl.store(tile_expert + to, e, mask=exists)
        tl.store(tile_start + to, start + j * BLOCK_M, mask=exists)
        tl.store(tile_stop + to, tl.where(j == tiles - 1, stop, start + (j + 1) * BLOCK_M), mask=exists)
    zero = tl.zeros([EXPERTS], tl.int32)
    for first in range(total + block * EXPERTS, max_tiles, blocks * EXPERTS):
        empty = first + e < max_tiles
        tl.store(tile_expert + first + e, zero, mask=empty)
        tl.store(tile_start + first + e, zero, mask=empty)
        tl.store(tile_stop + first + e, zero, mask=empty)
    if block == 0:
        tl.store(num_tiles, total)

    # Pairs: behind those of the same expert in earlier blocks, earlier chunks, and earlier in the chunk.
    place = start + before
    i = tl.arange(0, CHUNK)
    for at in range(block * PER_BLOCK, (block + 1) * PER_BLOCK, CHUNK):
        expert = tl.load(ids + at + i, mask=at + i < pairs, other=-1)
        held = (expert >= 0) & (expert < HELD)
        expert = tl.where(held, expert, 0)
        earlier = (expert[:, None] == expert[None, :]) & (i[:, None] > i[None, :]) & held[None, :]
        to = tl.gather(place, expert, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(order + to, at + i, mask=held)
        place += tl.histogram(expert, EXPERTS, mask=held)
