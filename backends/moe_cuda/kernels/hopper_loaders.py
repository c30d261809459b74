"""What the loading warpgroup of the grouped products for Hopper does, for :mod:`hopper_products` and :mod:`hopper_fp8`.

A step of the sum is 128 bytes of each row: DEPTH elements. It draws pieces of work, says each to the others
(:mod:`moe_cuda.kernels.hopper`) and keeps steps coming as far as these have handed some back.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from .grouped import place
from .hopper import HEIGHT, fence_async_global, say

_HEIGHT = gl.constexpr(HEIGHT)
_BYTES = gl.constexpr(128)  # of a row in a step: the widest row of swizzled shared memory


@gluon.jit
def draw(taken, programs):
    """Which piece of work is next, behind the first of every program."""
    return gl.atomic_add(taken, 1, sem="relaxed") + programs


@gluon.jit
def hand_on(
    t, tiles, tile_expert, tile_start, tile_stop, work, said, heard, nth, BLOCKS: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Says the t-th piece of work, the nth of this program, to the others; tile, block, expert, start and stop."""
    tile, block = place(t, tiles, BLOCKS, GROUP)
    start, stop = gl.load(tile_start + tile), gl.load(tile_stop + tile)
    expert = gl.load(tile_expert + tile)
    say(work, said, heard, nth, block, expert, start, stop)
    return tile, block, expert, start, stop


@gluon.jit
def tell(done, stored, nth):
    """Once all warpgroups have stored their parts of the nth piece of work: it is one more of its tile's."""
    mbarrier.wait(stored.index(nth % 2), (nth // 2) & 1)
    gl.atomic_add(done, 1, sem="release")


@gluon.jit
def wait_for(done, pieces):
    """Until so many were told. Who tells them is on a multiprocessor already, or this kernel would not have begun."""
    while gl.atomic_add(done, 0, sem="acquire") < pieces:
        pass
    fence_async_global()


@gluon.jit
def _load_rows(rows, start, stop, at, a, stage, ready, COLUMNS: gl.constexpr, GROUPS: gl.constexpr):
    """A step of a tile's rows, for the warpgroups that have any; COLUMNS rows of weights are to come too."""
    count = stop - start
    if count <= _HEIGHT:
        mbarrier.expect(ready, (_HEIGHT + COLUMNS) * _BYTES)
    elif GROUPS == 2 or count <= 2 * _HEIGHT:
        mbarrier.expect(ready, (2 * _HEIGHT + COLUMNS) * _BYTES)
    else:
        mbarrier.expect(ready, (3 * _HEIGHT + COLUMNS) * _BYTES)
    for group in gl.static_range(GROUPS):
        to = a.index(stage * GROUPS + group)
        tma.async_copy_global_to_shared(rows, [start + group * _HEIGHT, at], ready, to, count > group * _HEIGHT)


@gluon.jit
def rows_at(x, order, start, stop, H: gl.constexpr, K: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr):
    """Where the first step of ROWS rows lies in x, and which of them there are."""
    IN: gl.constexpr = gl.BlockedLayout([1, DEPTH // 8], [4, 8], [4, 1], [1, 0])  # sixteen bytes a thread
    row = start + gl.arange(0, ROWS, gl.SliceLayout(1, IN))
    pair = gl.load(order + row, mask=row < stop, other=0)
    h = gl.arange(0, DEPTH, gl.SliceLayout(0, IN))
    return x + (pair // K).to(gl.int64)[:, None] * H + h[None, :], (row < stop)[:, None]


@gluon.jit
def copy_rows(to, at, here, some):
    """Gathers them, if there are some."""
    if some:
        async_copy.async_copy_global_to_shared(to, at, mask=here)


@gluon.jit
def load_first(
    x, w13, order, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, work, said, heard, stored,
    programs,
    GROUPS: gl.constexpr, H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr,
    DEPTH: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GATHERED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The operands of gate and of up: BLOCK_N rows of w13 each, and rows of x, gathered on the way where they are not
    GATHERED; counts in num_tiles[1], and if EARLY the pieces of each tile that are done behind num_tiles[2]."""
    BLOCKS: gl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tiles = gl.load(num_tiles)
    step = 0
    nth = 0
    t = gl.program_id(0)
    before = t
    while t < tiles * BLOCKS:
        tile, block, expert, start, stop = hand_on(
            t, tiles, tile_expert, tile_start, tile_stop, work, said, heard, nth, BLOCKS, GROUP
        )
        if not GATHERED:
            at0, here0 = rows_at(x, order, start, stop, H, K, DEPTH, _HEIGHT)
            at1, here1 = rows_at(x, order, start + _HEIGHT, stop, H, K, DEPTH, _HEIGHT)
            if GROUPS == 3:
                at2, here2 = rows_at(x, order, start + 2 * _HEIGHT, stop, H, K, DEPTH, _HEIGHT)
        gate_row = expert * (2 * I) + block * BLOCK_N
        following = t
        for at in range(0, H, DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            if GATHERED:
                _load_rows(x, start, stop, at, a, stage, ready.index(stage), 2 * BLOCK_N, GROUPS)
            else:
                mbarrier.expect(ready.index(stage), 2 * BLOCK_N * _BYTES)
            gate, up = b.index(stage).slice(0, BLOCK_N, 0), b.index(stage).slice(BLOCK_N, BLOCK_N, 0)
            tma.async_copy_global_to_shared(w13, [gate_row, at], ready.index(stage), gate)
            tma.async_copy_global_to_shared(w13, [gate_row + I, at], ready.index(stage), up)
            if not GATHERED:
                copy_rows(a.index(stage * GROUPS), at0 + at, here0, True)
                copy_rows(a.index(stage * GROUPS + 1), at1 + at, here1, start + _HEIGHT < stop)
                if GROUPS == 3:
                    copy_rows(a.index(stage * GROUPS + 2), at2 + at, here2, start + 2 * _HEIGHT < stop)
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
    inner, w2, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, work, said, heard, programs,
    GROUPS: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """The operands of the second product: BLOCK_N rows of w2, and rows of inner, a tile's once its PIECES are there,
    if not 0; counts in num_tiles[2]."""
    BLOCKS: gl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
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
        w_row = expert * H + block * BLOCK_N
        following = t
        for at in range(0, I, DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            _load_rows(inner, start, stop, at, a, stage, ready.index(stage), BLOCK_N, GROUPS)
            tma.async_copy_global_to_shared(w2, [w_row, at], ready.index(stage), b.index(stage))
            if at == 0:
                following = draw(num_tiles + 2, programs)
            step += 1
        nth += 1
        t = following
    say(work, said, heard, nth, 0, 0, 0, 0)
    if PIECES:
        # Whoever waits for the end of this kernel takes that for the end of the one in front too.
        gdc_wait()
