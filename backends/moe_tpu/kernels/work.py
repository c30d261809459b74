"""Tiles of the Pallas kernels, and what a call does, counted from its grid and blocks: no compiler looks into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LANES = 128
SUBLANES = 8
VMEM_BYTES = 100 * 2**20
"""Of 128 MiB that a v5e and a v6e have; Mosaic's default would leave no room for two weights of two buffers."""
WEIGHT_BYTES = 64 * 2**20
"""Of these for blocks of weights, all buffers together."""
MOST_SLOTS = 65536
"""Where each row lies is read from the scalar memory, which holds little more than this."""


class Work(NamedTuple):
    """FLOPs of the products, and bytes that blocks move between main and fast memory."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: object) -> Work:
        """Of both."""
        assert isinstance(other, Work)
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def most_visits(rows: int, groups: int, tile: int) -> int:
    """Visits that a routing can need: each tile one, and one more for each boundary inside a tile."""
    return rows // tile + groups - 1


def tile_rows(rows: int, expected: int, groups: int) -> int:
    """Rows in a tile: about those of one group, from 8 (sublanes) to 128 (a side of the MXU).

    Args:
        rows: of the call. expected: of these, those that groups here own; the others belong to nobody.
    """
    each = max(SUBLANES, min(128, 1 << max(0, expected // max(groups, 1) - 1).bit_length()))
    return math.gcd(rows, each)


def tile_columns(inside: int, width: int, halves: int, item: int) -> int:
    """Columns in a tile: as many as let two buffers of the weights fit; of parts, whole tiles if possible."""
    if width % LANES:
        return width
    for unit in (SUBLANES * LANES, LANES):
        for count in range(1, width // unit + 1):
            columns = width // count
            fits = 2 * halves * inside * columns * item <= WEIGHT_BYTES
            if fits and columns * count == width and (count == 1 or columns % unit == 0):
                return columns
    return LANES


def work_of(
    rows: int,
    groups: int,
    inside: int,
    width: int,
    halves: int,
    item: int,
    sizes: Sequence[int] | None = None,
    *,
    expected: int | None = None,
) -> Work:
    """What one call does, from its grid and blocks.

    Args:
        width: columns of the result. halves: 2 for gate and up.
        sizes: rows of each group; None shares out those that are expected evenly, as the count of useful FLOPs does.
        expected: rows that groups here own; None is all of them.
    """
    expected = rows if expected is None else expected
    tile, columns = tile_rows(rows, expected, groups), tile_columns(inside, width, halves, item)
    if sizes is None:
        sizes = [expected // groups + (group < expected % groups) for group in range(groups)]
    visits, loads, end = 0, 0, 0
    last = -1
    for size in sizes:
        if size:
            first, end = end // tile, end + size
            visits += (end - 1) // tile - first + 1
            loads += (end - 1) // tile - first + (first != last)
            last = (end - 1) // tile
    used = sum(size > 0 for size in sizes)
    flops = visits * 2 * tile * inside * width * halves
    weights = used * inside * width * halves * item
    tiles = width // columns
    return Work(flops, weights + tiles * loads * tile * inside * item + loads * tile * width * item)


def fits_parts(inside: int, width: int, item: int) -> bool:
    """Whether the second product can leave each row in one piece, [N, width / 128, 128]: its blocks are whole tiles."""
    columns = tile_columns(inside, width, 1, item)
    return width % LANES == 0 and (columns == width or columns % (SUBLANES * LANES) == 0)


def combine_tokens(tokens: int, k: int, width: int) -> int:
    """Tokens in a tile of the combine: few enough for two buffers of their rows, at least 8 where there are."""
    tile = math.gcd(tokens, 64)
    while tile > 8 and tile * k * width * 4 > 2 * 2**20:
        tile //= 2
    return tile


def combine_work(tokens: int, k: int, width: int, item: int, expected: int | None = None) -> Work:
    """What the combine does: each expected row read once, places and weights, each sum written once in float32."""
    slots = tokens * k
    read = slots if expected is None else expected
    return Work(2 * slots * width, read * width * item + slots * 8 + tokens * width * 4)
