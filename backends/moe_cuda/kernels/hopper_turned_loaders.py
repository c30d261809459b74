"""What the loading warpgroup of :mod:`moe_cuda.kernels.hopper_turned` does."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from .hopper import DEPTH, say
from .hopper_loaders import copy_rows, draw, hand_on, rows_at, tell, wait_for

_DEPTH = gl.constexpr(DEPTH)
_BYTES = gl.constexpr(128)  # of a row in a step


@gluon.jit
def _load_rows(rows, rest_rows, start, count, at, main, rest, ready, MAIN: gl.constexpr, REST: gl.constexpr):
    """A step of a tile's rows, as many quarters of MAIN as it has any of; 128 rows of weights are to come too."""
    PART: gl.constexpr = MAIN // 4
    for parts in gl.static_range(1, 5):
        here = (count > (parts - 1) * PART) & (count <= parts * PART)
        mbarrier.expect(ready, (128 + parts * PART) * _BYTES, here)
    mbarrier.expect(ready, (128 + MAIN + REST) * _BYTES, count > MAIN)
    for part in gl.static_range(4):
        to = main.slice(part * PART, PART)
        tma.async_copy_global_to_shared(rows, [start + part * PART, at], ready, to, count > part * PART)
    tma.async_copy_global_to_shared(rest_rows, [start + MAIN, at], ready, rest, count > MAIN)


@gluon.jit
def load_first(
    x, x_rest, w13, order, tile_expert, tile_start, tile_stop, num_tiles, main, rest, weights, ready, empty, work,
    said, heard, stored, programs,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, GATHERED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The operands of gate and of up, 64 rows of w13 each, and rows of x, gathered on the way where they are not
    GATHERED; counts in num_tiles[1], and if EARLY the pieces of each tile that are done behind num_tiles[2]."""
    BLOCKS: gl.constexpr = I // 64
    PART: gl.constexpr = MAIN // 4
    tiles = gl.load(num_tiles)
    step = 0
    nth = 0
    t = gl.program_id(0)
    before = t
    while t < tiles * BLOCKS:
        tile, block, expert, start, stop = hand_on(
            t, tiles, tile_expert, tile_start, tile_stop, work, said, heard, nth, BLOCKS, GROUP
        )
        count = stop - start
        if not GATHERED:
            at0, here0 = rows_at(x, order, start, stop, H, K, _DEPTH, PART)
            at1, here1 = rows_at(x, order, start + PART, stop, H, K, _DEPTH, PART)
            at2, here2 = rows_at(x, order, start + 2 * PART, stop, H, K, _DEPTH, PART)
            at3, here3 = rows_at(x, order, start + 3 * PART, stop, H, K, _DEPTH, PART)
            at4, here4 = rows_at(x, order, start + MAIN, stop, H, K, _DEPTH, REST)
        eight = (expert * (2 * I) + block * 64) // 8
        following = t
        for at in range(0, H, _DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            if GATHERED:
                _load_rows(
                    x, x_rest, start, count, at, main.index(stage), rest.index(stage), ready.index(stage), MAIN, REST
                )
            else:
                mbarrier.expect(ready.index(stage), 128 * _BYTES)
            in_turn = weights.index(stage)._reinterpret(w13.dtype, [8, 2, 8, _DEPTH], w13.layout)
            tma.async_copy_global_to_shared(w13, [eight, 0, 0, at], ready.index(stage), in_turn)
            if not GATHERED:
                to = main.index(stage)
                copy_rows(to.slice(0, PART), at0 + at, here0, True)
                copy_rows(to.slice(PART, PART), at1 + at, here1, count > PART)
                copy_rows(to.slice(2 * PART, PART), at2 + at, here2, count > 2 * PART)
                copy_rows(to.slice(3 * PART, PART), at3 + at, here3, count > 3 * PART)
                copy_rows(rest.index(stage), at4 + at, here4, count > MAIN)
                async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
            if at == 0:
                following = draw(num_tiles + 1, programs)
            step += 1
        if EARLY and nth > 0:
            # By now the others are at this piece.
            tell(num_tiles + 3 + before, stored, nth - 1)
        before = tile
        nth += 1
        t = following
    say(work, said, heard, nth, 0, 0, 0, 0)
    if EARLY and nth > 0:
        tell(num_tiles + 3 + before, stored, nth - 1)


@gluon.jit
def load_second(
    inner, inner_rest, w2, tile_expert, tile_start, tile_stop, num_tiles, main, rest, weights, ready, empty, work,
    said, heard, programs,
    H: gl.constexpr, I: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    PIECES: gl.constexpr,
):  # fmt: skip
    """The operands of the second product: 128 rows of w2, and rows of inner, a tile's once its PIECES are there, if
    not 0; counts in num_tiles[2]."""
    BLOCKS: gl.constexpr = (H + 127) // 128
    tiles = gl.load(num_tiles)
    step = 0
    nth = 0
    t = gl.program_id(0)
    while t < tiles * BLOCKS:
        tile, block, expert, start, stop = hand_on(
            t, tiles, tile_expert, tile_start, tile_stop, work, said, heard, nth, BLOCKS, GROUP
        )
        if PIECES:
            wait_for(num_tiles + 3 + tile, PIECES)
        w_row = expert * H + block * 128
        following = t
        for at in range(0, I, _DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            _load_rows(
                inner, inner_rest, start, stop - start, at, main.index(stage), rest.index(stage), ready.index(stage),
                MAIN, REST,
            )  # fmt: skip
            tma.async_copy_global_to_shared(w2, [w_row, at], ready.index(stage), weights.index(stage))
            if at == 0:
                following = draw(num_tiles + 2, programs)
            step += 1
        nth += 1
        t = following
    say(work, said, heard, nth, 0, 0, 0, 0)
    if PIECES:
        # Whoever waits for the end of this kernel takes that for the end of the one in front too.
        gdc_wait()
