"""The grouped products of :mod:`moe_cuda.kernels.grouped` for Hopper, out of the pieces of ``kernels/hopper.py``."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import finish
from .hopper import DEPTH, HEIGHT, LOADERS, OUT, allocate, hand_in, hear, multiply, skip
from .hopper_loaders import load_first, load_second

_HEIGHT, _DEPTH = gl.constexpr(HEIGHT), gl.constexpr(DEPTH)


@gluon.jit
def _first_part(
    b13, inner, order, topk_weights, a, b, ready, empty, work, said, heard, stored,
    PART: gl.constexpr, GROUPS: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GATHERED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    # An instruction's columns: all, but half of them where three warpgroups have too few registers for that.
    WIDTH: gl.constexpr = 2 * BLOCK_N if GROUPS == 2 or BLOCK_N <= 64 else BLOCK_N
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    step = 0
    nth = 0
    block, expert, start, stop = hear(work, said, heard, nth)
    while stop > 0:
        start += _HEIGHT * PART
        if start < stop:
            both = gl.zeros([_HEIGHT, 2 * BLOCK_N], gl.float32, SUM)
            both, step = multiply(both, a, b, ready, empty, step, PART, GROUPS, H, STAGES, not GATHERED)
            gate, up = both.reshape([_HEIGHT, 2, BLOCK_N]).permute((0, 2, 1)).split()
            weight = 1.0
            if WEIGHT_ON_INPUT:
                weighted = start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, gate.type.layout))
                pair = gl.load(order + weighted, mask=weighted < stop, other=0)
                weight = gl.load(topk_weights + pair, mask=weighted < stop, other=0.0)[:, None]
            column = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gate.type.layout))
            bias_at = (expert.to(gl.int64) * (2 * I) + column)[None, :]
            y = finish(
                gate, up, weight, b13, bias_at, (column < I)[None, :], True, I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT,
                ALPHA, BETA,
            )  # fmt: skip
            y = gl.convert_layout(y.to(inner.dtype.element_ty), OUT)
            row = start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, OUT))
            n = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUT))
            to = inner + row.to(gl.int64)[:, None] * I + n[None, :]
            gl.store(to, y, mask=(row < stop)[:, None] & (n < I)[None, :])
        else:
            step = skip(ready, empty, step, H // _DEPTH, STAGES)
        if EARLY:
            hand_in(stored, nth)
        nth += 1
        block, expert, start, stop = hear(work, said, heard, nth)


@gluon.jit(do_not_specialize=["programs"])
def first_kernel(
    x, w13, b13, inner, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, programs,
    GROUPS: gl.constexpr, H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SUM_REGISTERS: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr, GATHERED: gl.constexpr, EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """inner[row] = act(x[token of row] @ w13[expert]^T), rows in the order of ``order``, x's too if GATHERED; tiles of
    GROUPS * HEIGHT rows, H a multiple of DEPTH. Counts in num_tiles[1], and if EARLY tells the second product
    behind num_tiles[2] what it may read; all that has to be zero."""
    if PDL:
        if not EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if EARLY:
            # The second product reads the table of tiles without waiting.
            gdc_launch_dependents()
    a, b, ready, empty, work, said, heard, stored = allocate(
        w13, 2 * BLOCK_N, _DEPTH, STAGES, GROUPS, 1 if GATHERED else 1 + LOADERS
    )
    # Written out: a tuple with a name would make tensors of its constants.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_first_part, (
                    b13, inner, order, topk_weights, a, b, ready, empty, work, said, heard, stored, 0, GROUPS, H, I,
                    BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, BLOCK_N, STAGES, GATHERED, EARLY,
                )),
                (_first_part, (
                    b13, inner, order, topk_weights, a, b, ready, empty, work, said, heard, stored, 1, GROUPS, H, I,
                    BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, BLOCK_N, STAGES, GATHERED, EARLY,
                )),
                (load_first, (
                    x, w13, order, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, work, said, heard,
                    stored, programs, GROUPS, H, I, K, BLOCK_N, _DEPTH, STAGES, GROUP, GATHERED, EARLY,
                )),
            ],
            [4, 4],
            [SUM_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_first_part, (
                    b13, inner, order, topk_weights, a, b, ready, empty, work, said, heard, stored, 0, GROUPS, H, I,
                    BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, BLOCK_N, STAGES, GATHERED, EARLY,
                )),
                (_first_part, (
                    b13, inner, order, topk_weights, a, b, ready, empty, work, said, heard, stored, 1, GROUPS, H, I,
                    BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, BLOCK_N, STAGES, GATHERED, EARLY,
                )),
                (_first_part, (
                    b13, inner, order, topk_weights, a, b, ready, empty, work, said, heard, stored, 2, GROUPS, H, I,
                    BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, BLOCK_N, STAGES, GATHERED, EARLY,
                )),
                (load_first, (
                    x, w13, order, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, work, said, heard,
                    stored, programs, GROUPS, H, I, K, BLOCK_N, _DEPTH, STAGES, GROUP, GATHERED, EARLY,
                )),
            ],
            [4, 4, 4],
            [SUM_REGISTERS, SUM_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip


@gluon.jit
def _second_part(
    b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard,
    PART: gl.constexpr, GROUPS: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = BLOCK_N if GROUPS == 2 or BLOCK_N <= 128 else BLOCK_N // 2
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    SIDE: gl.constexpr = BLOCK_N // 2
    step = 0
    nth = 0
    block, expert, start, stop = hear(work, said, heard, nth)
    while stop > 0:
        start += _HEIGHT * PART
        if start < stop:
            # What the end needs is on its way while the sum is made, as far as there are registers for it.
            if not WEIGHT_ON_INPUT:
                weighted = start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, SUM))
                pair = gl.load(order + weighted, mask=weighted < stop, other=0)
                weight = gl.load(topk_weights + pair, mask=weighted < stop, other=0.0)
            row = start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, OUT))
            if GROUPS == 2:
                to_pair = gl.load(order + row, mask=row < stop, other=0)
            acc = gl.zeros([_HEIGHT, BLOCK_N], gl.float32, SUM)
            acc, step = multiply(acc, a, b, ready, empty, step, PART, GROUPS, I, STAGES, False)
            if BIAS:
                column = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUM))
                bias_at = b2 + expert.to(gl.int64) * H + column
                acc += gl.load(bias_at, mask=column < H, other=0.0).to(gl.float32)[None, :]
            if not WEIGHT_ON_INPUT:
                acc *= weight[:, None]
            if GROUPS == 3:
                to_pair = gl.load(order + row, mask=row < stop, other=0)
            here = (row < stop)[:, None]
            n = block * BLOCK_N + gl.arange(0, SIDE, gl.SliceLayout(0, OUT))
            to = parts + to_pair.to(gl.int64)[:, None] * H + n[None, :]
            # One side after the other: the way through shared memory to wide stores takes half as much of it.
            left, right = acc.reshape([_HEIGHT, 2, SIDE]).permute((0, 2, 1)).split()
            left = gl.convert_layout(left.to(parts.dtype.element_ty), OUT)
            gl.store(to, left, mask=here & (n < H)[None, :])
            right = gl.convert_layout(right.to(parts.dtype.element_ty), OUT)
            gl.store(to + SIDE, right, mask=here & (n + SIDE < H)[None, :])
        else:
            step = skip(ready, empty, step, I // _DEPTH, STAGES)
        nth += 1
        block, expert, start, stop = hear(work, said, heard, nth)


@gluon.jit(do_not_specialize=["programs"])
def second_kernel(
    inner, w2, b2, parts, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, programs,
    GROUPS: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SUM_REGISTERS: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr, PIECES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """parts[pair of row] = weight of pair * (inner[row] @ w2[expert]^T + b2[expert]); tiles of GROUPS * HEIGHT rows, I
    a multiple of DEPTH. Counts in num_tiles[2], which has to be zero. If PIECES (of a tile, in the first product), it
    begins while that still runs."""
    if PDL:
        gdc_launch_dependents()
        if not PIECES:
            gdc_wait()
    a, b, ready, empty, work, said, heard, _ = allocate(w2, BLOCK_N, _DEPTH, STAGES, GROUPS, 1)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_second_part, (
                    b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard, 0, GROUPS, H, I, BIAS,
                    WEIGHT_ON_INPUT, BLOCK_N, STAGES,
                )),
                (_second_part, (
                    b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard, 1, GROUPS, H, I, BIAS,
                    WEIGHT_ON_INPUT, BLOCK_N, STAGES,
                )),
                (load_second, (
                    inner, w2, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, work, said, heard,
                    programs, GROUPS, H, I, BLOCK_N, _DEPTH, STAGES, GROUP, PIECES,
                )),
            ],
            [4, 4],
            [SUM_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_second_part, (
                    b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard, 0, GROUPS, H, I, BIAS,
                    WEIGHT_ON_INPUT, BLOCK_N, STAGES,
                )),
                (_second_part, (
                    b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard, 1, GROUPS, H, I, BIAS,
                    WEIGHT_ON_INPUT, BLOCK_N, STAGES,
                )),
                (_second_part, (
                    b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard, 2, GROUPS, H, I, BIAS,
                    WEIGHT_ON_INPUT, BLOCK_N, STAGES,
                )),
                (load_second, (
                    inner, w2, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, work, said, heard,
                    programs, GROUPS, H, I, BLOCK_N, _DEPTH, STAGES, GROUP, PIECES,
                )),
            ],
            [4, 4, 4],
            [SUM_REGISTERS, SUM_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
