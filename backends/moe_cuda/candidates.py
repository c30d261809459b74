"""What ``moe-core tune cuda`` tries: starts for every form, and which of their parts vary."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from . import tuning
from .tuning import Choice, Dot, Few, Grouped, Pairs, Shape, Tile

Axes = dict[str, list[Any]]
"""Which part of a choice -> what may stand there; parts are searched one after the other."""


def candidates(shape: Shape, tokens: int, loader: bool) -> list[tuple[Choice, Axes]]:
    """A start for every form worth trying, and what to vary; ``loader``: the GPU runs ``kernels/hopper.py``."""
    found: list[tuple[Choice, Axes]] = []
    rows = tokens * shape.top_k / shape.num_experts
    if tokens <= 2 * tuning.FEW_TOKENS:
        found.append((Few(16, 256, 4, 4, 256, 4), _few_axes()))
    if tokens > 1 and tokens * shape.top_k <= tuning.PAIRS_AT_MOST and rows <= 32:
        sizes = [(16, 256, 4, 3), (32, 128, 4, 3), (32, 128, 4, 5), (32, 256, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3)]
        sizes += [(64, 64, 4, 6), (32, 128, 2, 4)]
        dots = [Dot(*size, order) for size, order in itertools.product(sizes, (False, True))]
        wide = [*dots, Dot(128, 64, 4, 4), Dot(128, 64, 4, 4, True), Dot(128, 64, 4, 6, True)]
        found.append((Pairs(Dot(32, 128, 4, 5, True), Dot(64, 128, 4, 3)), {"first": dots, "second": wide}))
    for height in (16, 32, 64, 128):
        if height / 4 <= max(rows, 4) and (rows <= height * 3 or height == 128) and tokens > 2 * tuning.FEW_TOKENS:
            first, second = _tiles(height)
            found.append((Grouped(height, first[0], second[0]), {"first": first, "second": second}))
    if loader and tokens > 2 * tuning.FEW_TOKENS:
        for height in (128, 192):
            first, second = _loader_tiles(height, 1), _loader_tiles(height, 2)
            found.append((Grouped(height, first[0], second[0]), {"first": first, "second": second}))
        found += _turned(rows)
    return found


def neighbours(choice: Choice, loader: bool) -> list[tuple[Choice, Axes]]:
    """``choice`` and what differs little from it: for a GPU much like the one that it was found on."""
    if isinstance(choice, Few):
        axes = _few_axes()
        near1 = [v for v in axes["first"] if max(_apart(v["n1"], choice.n1), _apart(v["k1"], choice.k1)) <= 1]
        near2 = [v for v in axes["second"] if max(_apart(v["n2"], choice.n2), _apart(v["k2"], choice.k2)) <= 1]
        return [(choice, {"first": [{}, *near1], "second": near2})]
    if isinstance(choice, Pairs):
        return [(choice, {part: _near_dots(getattr(choice, part)) for part in ("first", "second")})]
    found = [(choice, {"first": _near_tiles(choice.first), "second": _near_tiles(choice.second, second=True)})]
    if loader and choice.turned:
        return found
    if loader and choice.rows >= 128:
        for height in (128, 192):
            first, second = _loader_tiles(height, 1), _loader_tiles(height, 2)
            found.append((Grouped(height, first[0], second[0]), {"first": first[:6], "second": second[:6]}))
    return found


def _apart(size: int, other: int) -> float:
    return abs(math.log2(size / other))


def _near_dots(dot: Dot) -> list[Any]:
    stages = (dot.stages, dot.stages + 1, max(2, dot.stages - 1))
    return [dataclasses.replace(dot, stages=s, columns_first=c) for s in stages for c in (False, True)]


def _near_tiles(tile: Tile, second: bool = False) -> list[Any]:
    groups = sorted({max(1, tile.group // 2), tile.group, tile.group * 2})
    stages = (tile.stages,) if tile.loader else (tile.stages, tile.stages + 1, max(2, tile.stages - 1))
    near = [dataclasses.replace(tile, stages=s, group=g) for s in stages for g in groups]
    if second and tile.loader:  # only a second product may begin before another has ended
        near += [dataclasses.replace(other, early=not other.early) for other in near]
    # What it was found with comes first.
    return sorted(near, key=lambda other: other != tile)


def _loader_tiles(height: int, width: int) -> list[Any]:
    # As many stages as shared memory has room for, and one less.
    stages = ((128, 4), (128, 3), (64, 6)) if height == 128 else ((128, 3), (64, 5))
    # Only the first product has rows to gather, and only the second may begin before another has ended.
    option = {1: "gather", 2: "early"}[width]
    sizes = itertools.product(stages, (8, 4, 16, 2, 1), (False, True))
    return [
        Tile(width * n, 64, 8, stages, 1, group, half=True, loader=True, **{option: chosen})
        for (n, stages), group, chosen in sizes
    ]


def _turned(rows: float) -> list[tuple[Choice, Axes]]:
    # For experts of about so many rows: where a tile would be mostly empty it has nothing to win.
    found: list[tuple[Choice, Axes]] = []
    for height, stages in ((128, 6), (256, 4)):
        if height / 2 <= rows:
            first = [
                Tile(64, 64, 8, stages, 1, group, gather=gather, loader=True)
                for group, gather in itertools.product((1, 2, 4, 8), (False, True))
            ]
            second = [
                Tile(128, 64, 8, stages, 1, group, loader=True, early=early)
                for group, early in itertools.product((1, 2, 4, 8), (True, False))
            ]
            found.append((Grouped(height, first[0], second[0], turned=True), {"first": first, "second": second}))
    return found


def _few_axes() -> Axes:
    first = [
        (n, k, warps)
        for n, k, warps in itertools.product((1, 2, 4, 8, 16, 32), (256, 512, 1024), (2, 4, 8))
        if 8 <= n * k // (32 * warps) <= 32
    ]
    # Sixteen bytes a thread and chunk.
    second = [
        (n, k, warps)
        for n, k, warps in itertools.product((1, 2, 4, 8), (128, 256, 512), (1, 2, 4, 8))
        if n * k // (32 * warps) == 8
    ]
    return {
        "first": [dict(zip(("n1", "k1", "warps1"), values, strict=True)) for values in first],
        "second": [
            dict(zip(("n2", "k2", "warps2", "prefetch"), (*values, early), strict=True))
            for values, early in itertools.product(second, (2, 4))
        ],
    }


def _tiles(height: int) -> tuple[list[Any], list[Any]]:
    if height <= 32:
        sizes = [(64, 128, 4, 3), (32, 128, 4, 4), (64, 64, 4, 5), (128, 64, 4, 4), (128, 128, 8, 3), (64, 128, 4, 4)]
        both = [Tile(*size) for size in sizes]
        return both, [*both, Tile(128, 64, 4, 3), Tile(64, 256, 4, 2)]
    if height == 64:
        first = [Tile(64, 64, 4, 4), Tile(64, 128, 4, 3), Tile(128, 64, 4, 3), Tile(128, 64, 4, 4), Tile(64, 64, 4, 3)]
        first += [Tile(128, 64, 8, 4, programs, 8) for programs in (0, 1)]
        second = [Tile(128, 64, 4, 4), Tile(128, 128, 4, 3), Tile(64, 128, 4, 3), Tile(256, 64, 8, 4)]
        second += [Tile(128, 64, 4, 4, 0, 8), Tile(256, 64, 4, 3, 0, 8), Tile(128, 64, 4, 4, 2, 8, flatten=True)]
        return first, second
    first = [
        Tile(128, 64, 8, stages, 1, group, half)
        for stages, group, half in itertools.product((3, 4), (8, 16), (True, False))
    ]
    first += [
        Tile(128, 64, 8, stages, 1, 16, half, flatten, gather=True)
        for stages, half, flatten in itertools.product((3, 4), (True, False), (False, True))
    ]
    first += [Tile(128, 128, 8, 2, 1, 16, half, gather=gather) for gather in (False, True) for half in (True, False)]
    first += [Tile(128, 64, 8, 3, 0, 16, half=True), Tile(64, 64, 4, 3, 2, 16, half=True)]
    second = [
        Tile(256, 64, 8, stages, 1, 16, half, flatten)
        for stages, half, flatten in itertools.product((3, 4), (True, False), (False, True))
    ]
    second += [
        Tile(128, 64, warps, 4, programs, 16, half, flatten)
        for (warps, programs), half, flatten in itertools.product(((8, 1), (4, 2)), (True, False), (False, True))
    ]
    second += [Tile(128, 128, 8, 3, 1, 16, half=True), Tile(256, 128, 8, 2, 1, 16), Tile(256, 64, 8, 4, 1, 32)]
    return first, second
