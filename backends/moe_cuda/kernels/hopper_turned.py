"""The grouped products for Hopper turned round: weights times tokens, so that a tile costs about what it holds.

In :mod:`moe_cuda.kernels.hopper_products` an instruction has 64 tokens, filled or not: an expert with 262 pays for 320,
and its last tile for all its weights. Here an instruction's rows are 64 rows of weights and its columns are tokens,
whose number it can have in steps of eight. A tile has up to MAIN tokens, an expert's last one up to REST more. Two
warpgroups multiply, each 64 rows of weights by all tokens of the tile; a third loads. Gate and up rows lie in turn in
shared memory, eight of each, so that a thread that has a gate has its up. All else is as in
:mod:`moe_cuda.kernels.hopper`.
"""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import finish
from .hopper import DEPTH, LOADERS, SHARED, barriers, hand_in, hear
from .hopper_turned_loaders import load_first, load_second

_WIDTHS = {128: (64, 96, 128, 144, 160), 256: (64, 128, 160, 192, 256, 272, 288)}
"""By MAIN: how many tokens instructions are made for. Each is a power of two, or that and a smaller one from 16 on."""
_DEPTH = gl.constexpr(DEPTH)
_MATRIX = gl.constexpr(SHARED)
_IN_TURN = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
_ROWS_OF_WEIGHTS = gl.constexpr(128)


def gate_and_up(w13: Tensor) -> Any:
    """A descriptor of ``w13`` [E, 2I, H], gate rows first, whose boxes are eight times eight gate and eight up rows."""
    experts, rows, hidden = w13.shape
    shape = [experts * rows // 8, 2, 8, hidden]
    strides = [8 * hidden, rows // 2 * hidden, hidden, 1]
    return TensorDescriptor(w13, shape, strides, [8, 2, 8, DEPTH], _IN_TURN)


@gluon.constexpr_function
def _next(width, main):
    """The width behind this one, and 0 behind the last."""
    return next((other for other in _WIDTHS[main] if other > width), 0)


@gluon.constexpr_function
def _power(width):
    """The most of it that is a power of two."""
    return 1 << (width.bit_length() - 1)


@gluon.jit
def _allocate(boxes, MAIN: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    main = gl.allocate_shared_memory(boxes.dtype, [STAGES, MAIN, _DEPTH], _MATRIX)
    rest = gl.allocate_shared_memory(boxes.dtype, [STAGES, REST, _DEPTH], _MATRIX)
    weights = gl.allocate_shared_memory(boxes.dtype, [STAGES, _ROWS_OF_WEIGHTS, _DEPTH], _MATRIX)
    ready, empty, work, said, heard, stored = barriers(STAGES, 2, ARRIVALS)
    return main, rest, weights, ready, empty, work, said, heard, stored


@gluon.jit
def _multiply(
    main, rest, weights, ready, empty, step,
    PART: gl.constexpr, LENGTH: gl.constexpr, MAIN: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr,
    MORE: gl.constexpr, FENCE: gl.constexpr,
):  # fmt: skip
    """weights @ tokens^T over LENGTH elements, for WIDTH tokens and for MORE behind them: [64, WIDTH], [64, MORE]."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    acc = gl.zeros([64, WIDTH], gl.float32, SUM)
    more = acc
    if MORE:
        SUM_MORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, MORE, 16])
        more = gl.zeros([64, MORE], gl.float32, SUM_MORE)
    for at in range(0, LENGTH, _DEPTH):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        if FENCE:
            # Asynchronous copies write like ordinary stores; the products read like the accelerator.
            fence_async_shared()
        rows = weights.index(stage).slice(64 * PART, 64)
        token = warpgroup_mma(rows, main.index(stage).slice(0, WIDTH).permute((1, 0)), acc, is_async=True)
        if MORE:
            if WIDTH == MAIN:
                others = rest.index(stage).slice(0, MORE)
            else:
                others = main.index(stage).slice(WIDTH, MORE)
            second = warpgroup_mma(rows, others.permute((1, 0)), more, is_async=True)
            acc, more = warpgroup_mma_wait(2, deps=(token, second))
        else:
            acc = warpgroup_mma_wait(1, deps=(token,))
        if at > 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += 1
    if MORE:
        acc, more = warpgroup_mma_wait(0, deps=(acc, more))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        more = acc
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return acc, more, step


@gluon.jit
def _store(y, to, order, start, stop, first, last, STRIDE: gl.constexpr, WIDTH: gl.constexpr, HIGH: gl.constexpr,
           SCATTER: gl.constexpr):  # fmt: skip
    """Columns of y [HIGH, WIDTH] to rows of ``to`` from ``start`` on, or to those that ``order`` has there."""
    if WIDTH > 64:
        left, right = y.reshape([HIGH, 2, WIDTH // 2]).permute((0, 2, 1)).split()
        _store(left, to, order, start, stop, first, last, STRIDE, WIDTH // 2, HIGH, SCATTER)
        _store(right, to, order, start + WIDTH // 2, stop, first, last, STRIDE, WIDTH // 2, HIGH, SCATTER)
    else:
        OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HIGH, HIGH // 8], [4, 1], [1, 0])
        rows = gl.convert_layout(y.permute((1, 0)), OUT)
        row = start + gl.arange(0, WIDTH, gl.SliceLayout(1, OUT))
        column = first + gl.arange(0, HIGH, gl.SliceLayout(0, OUT))
        here = (row < stop)[:, None] & (column < last)[None, :]
        if SCATTER:
            row = gl.load(order + row, mask=row < stop, other=0)
        gl.store(to + row.to(gl.int64)[:, None] * STRIDE + column[None, :], rows, mask=here)


@gluon.jit
def _finish_first(
    acc, b13, inner, order, topk_weights, expert, column, start, stop,
    I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr,
    ALPHA: gl.constexpr, BETA: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    gate, up = acc.reshape([4, 2, 8, WIDTH]).permute((0, 2, 3, 1)).split()
    gate, up = gate.reshape([32, WIDTH]), up.reshape([32, WIDTH])
    weight = 1.0
    if WEIGHT_ON_INPUT:
        row = start + gl.arange(0, WIDTH, gl.SliceLayout(0, gate.type.layout))
        pair = gl.load(order + row, mask=row < stop, other=0)
        weight = gl.load(topk_weights + pair, mask=row < stop, other=0.0)[None, :]
    bias_at = (expert.to(gl.int64) * (2 * I) + column + gl.arange(0, 32, gl.SliceLayout(1, gate.type.layout)))[:, None]
    y = finish(gate, up, weight, b13, bias_at, True, True, I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA)
    _store(y.to(inner.dtype.element_ty), inner, order, start, stop, column, I, I, WIDTH, 32, False)


@gluon.jit
def _first_tile(
    b13, inner, order, topk_weights, main, rest, weights, ready, empty, step, block, expert, start, stop,
    PART: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, FENCE: gl.constexpr,
    MAIN: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """A tile of at most TOKENS tokens, or of more by what is made for them."""
    FOLLOWING: gl.constexpr = _next(TOKENS, MAIN)
    if FOLLOWING > 0 and stop - start > TOKENS:
        step = _first_tile(
            b13, inner, order, topk_weights, main, rest, weights, ready, empty, step, block, expert, start, stop,
            PART, H, I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, FENCE, MAIN, STAGES, FOLLOWING,
        )  # fmt: skip
    else:
        WIDTH: gl.constexpr = _power(TOKENS)
        MORE: gl.constexpr = TOKENS - WIDTH
        acc, more, step = _multiply(main, rest, weights, ready, empty, step, PART, H, MAIN, STAGES, WIDTH, MORE, FENCE)
        column = block * 64 + PART * 32
        _finish_first(
            acc, b13, inner, order, topk_weights, expert, column, start, stop,
            I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, WIDTH,
        )  # fmt: skip
        if MORE:
            _finish_first(
                more, b13, inner, order, topk_weights, expert, column, start + WIDTH, stop,
                I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, MORE,
            )  # fmt: skip
    return step


@gluon.jit
def _first_part(
    b13, inner, order, topk_weights, main, rest, weights, ready, empty, work, said, heard, stored,
    PART: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, FENCE: gl.constexpr,
    MAIN: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    step = 0
    nth = 0
    block, expert, start, stop = hear(work, said, heard, nth)
    while stop > 0:
        step = _first_tile(
            b13, inner, order, topk_weights, main, rest, weights, ready, empty, step, block, expert, start, stop,
            PART, H, I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, FENCE, MAIN, STAGES, _next(0, MAIN),
        )  # fmt: skip
        if EARLY:
            hand_in(stored, nth)
        nth += 1
        block, expert, start, stop = hear(work, said, heard, nth)


@gluon.jit(do_not_specialize=["programs"])
def first_kernel(
    x, x_rest, w13, b13, inner, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, MAIN: gl.constexpr,
    REST: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SUM_REGISTERS: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr, GATHERED: gl.constexpr, EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """inner[row] = act(x[token of row] @ w13[expert]^T), rows in the order of ``order``, x's too if GATHERED (then x
    and x_rest are its boxes); tiles of up to MAIN + REST rows. Counts in num_tiles[1], and if EARLY tells the second
    product behind num_tiles[2] what it may read; all that has to be zero."""
    if PDL:
        if not EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if EARLY:
            # The second product reads the table of tiles without waiting.
            gdc_launch_dependents()
    main, rest, weights, ready, empty, work, said, heard, stored = _allocate(
        w13, MAIN, REST, STAGES, 1 if GATHERED else 1 + LOADERS
    )
    gl.warp_specialize(
        [
            (_first_part, (
                b13, inner, order, topk_weights, main, rest, weights, ready, empty, work, said, heard, stored, 0, H, I,
                BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, not GATHERED, MAIN, STAGES, EARLY,
            )),
            (_first_part, (
                b13, inner, order, topk_weights, main, rest, weights, ready, empty, work, said, heard, stored, 1, H, I,
                BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, not GATHERED, MAIN, STAGES, EARLY,
            )),
            (load_first, (
                x, x_rest, w13, order, tile_expert, tile_start, tile_stop, num_tiles, main, rest, weights, ready,
                empty, work, said, heard, stored, programs, H, I, K, MAIN, REST, STAGES, GROUP, GATHERED, EARLY,
            )),
        ],
        [4, 4],
        [SUM_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _weights_of(order, topk_weights, start, stop, WIDTH: gl.constexpr):
    # Early, a few a thread: their pairs are then near when the rows are stored.
    row = start + gl.arange(0, WIDTH, gl.BlockedLayout([1], [32], [4], [0]))
    pair = gl.load(order + row, mask=row < stop, other=0)
    return gl.load(topk_weights + pair, mask=row < stop, other=0.0)


@gluon.jit
def _finish_second(
    acc, weight, b2, parts, order, expert, column, start, stop,
    H: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    if BIAS:
        n = column + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(b2 + expert.to(gl.int64) * H + n, mask=n < H, other=0.0).to(gl.float32)[:, None]
    if not WEIGHT_ON_INPUT:
        acc *= gl.convert_layout(weight, gl.SliceLayout(0, acc.type.layout))[None, :]
    _store(acc.to(parts.dtype.element_ty), parts, order, start, stop, column, H, H, WIDTH, 64, True)


@gluon.jit
def _second_tile(
    b2, parts, order, topk_weights, main, rest, weights, ready, empty, step, block, expert, start, stop,
    PART: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    MAIN: gl.constexpr, STAGES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    FOLLOWING: gl.constexpr = _next(TOKENS, MAIN)
    if FOLLOWING > 0 and stop - start > TOKENS:
        step = _second_tile(
            b2, parts, order, topk_weights, main, rest, weights, ready, empty, step, block, expert, start, stop,
            PART, H, I, BIAS, WEIGHT_ON_INPUT, MAIN, STAGES, FOLLOWING,
        )  # fmt: skip
    else:
        WIDTH: gl.constexpr = _power(TOKENS)
        MORE: gl.constexpr = TOKENS - WIDTH
        weight = _weights_of(order, topk_weights, start, stop, WIDTH)
        others = weight
        if MORE:
            others = _weights_of(order, topk_weights, start + WIDTH, stop, MORE)
        acc, more, step = _multiply(main, rest, weights, ready, empty, step, PART, I, MAIN, STAGES, WIDTH, MORE, False)
        column = block * 128 + PART * 64
        _finish_second(acc, weight, b2, parts, order, expert, column, start, stop, H, BIAS, WEIGHT_ON_INPUT, WIDTH)
        if MORE:
            _finish_second(
                more, others, b2, parts, order, expert, column, start + WIDTH, stop, H, BIAS, WEIGHT_ON_INPUT, MORE
            )
    return step


@gluon.jit
def _second_part(
    b2, parts, order, topk_weights, main, rest, weights, ready, empty, work, said, heard,
    PART: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    MAIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    nth = 0
    block, expert, start, stop = hear(work, said, heard, nth)
    while stop > 0:
        step = _second_tile(
            b2, parts, order, topk_weights, main, rest, weights, ready, empty, step, block, expert, start, stop,
            PART, H, I, BIAS, WEIGHT_ON_INPUT, MAIN, STAGES, _next(0, MAIN),
        )  # fmt: skip
        nth += 1
        block, expert, start, stop = hear(work, said, heard, nth)


@gluon.jit(do_not_specialize=["programs"])
def second_kernel(
    inner, inner_rest, w2, b2, parts, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, MAIN: gl.constexpr,
    REST: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SUM_REGISTERS: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr, PIECES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """parts[pair of row] = weight of pair * (inner[row] @ w2[expert]^T + b2[expert]); tiles of up to MAIN + REST rows.
    Counts in num_tiles[2], which has to be zero. If PIECES (of a tile, in the first product), it begins while that
    still runs."""
    if PDL:
        gdc_launch_dependents()
        if not PIECES:
            gdc_wait()
    main, rest, weights, ready, empty, work, said, heard, _ = _allocate(w2, MAIN, REST, STAGES, 1)
    gl.warp_specialize(
        [
            (_second_part, (
                b2, parts, order, topk_weights, main, rest, weights, ready, empty, work, said, heard, 0, H, I, BIAS,
                WEIGHT_ON_INPUT, MAIN, STAGES,
            )),
            (_second_part, (
                b2, parts, order, topk_weights, main, rest, weights, ready, empty, work, said, heard, 1, H, I, BIAS,
                WEIGHT_ON_INPUT, MAIN, STAGES,
            )),
            (load_second, (
                inner, inner_rest, w2, tile_expert, tile_start, tile_stop, num_tiles, main, rest, weights, ready,
                empty, work, said, heard, programs, H, I, MAIN, REST, STAGES, GROUP, PIECES,
            )),
        ],
        [4, 4],
        [SUM_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
