"""The e4m3 products of :mod:`moe_cuda.kernels.w8a8` in blocks of 128 x 128 for Hopper, with a loading warpgroup.

A step of the sum is a block of scales: 128 columns, the widest row of swizzled shared memory. Its products begin anew
in the tensor cores and are added up in float32 beside them, times their two scales, so a warpgroup of 64 rows holds two
sums of 128 columns each (gate and up, or left and right) and one block's products. While one warpgroup adds, the other
one's products go on. As in :mod:`moe_cuda.kernels.hopper` a third warpgroup loads, through barriers in shared memory.
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
from .hopper import HEIGHT, LOADERS, allocate, hear, skip
from .hopper_loaders import load_first, load_second

ROWS = 2 * HEIGHT
"""Of a tile; an expert's last tile of at most half as many keeps one of the two warpgroups idle."""
BLOCK = 128
"""Rows and columns of weights, and columns of activations, that share a scale."""
_HEIGHT, _BLOCK, _BOTH = gl.constexpr(HEIGHT), gl.constexpr(BLOCK), gl.constexpr(2 * BLOCK)
_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BLOCK, 32]))
_OUT8 = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))  # sixteen bytes a thread go to memory
_OUT16 = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


def boxes(tensor: Tensor, rows: int) -> Any:
    """A descriptor of ``tensor`` [..., K] e4m3 as a matrix, whose boxes are ``rows`` high."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return TensorDescriptor(tensor, list(matrix.shape), list(matrix.stride()), [rows, BLOCK], _SHARED)


@gluon.jit
def _add_up(a, b, ready, empty, step, row_scales, left_scales, right_scales, HALF: gl.constexpr, WIDE: gl.constexpr,
            STAGES: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    """Both sums of one half of the rows over WIDE blocks, float32 [64, 128] each, and the number of the next step.

    row_scales [64] and the two others point to the scales of the first block; those of the next follow them.
    """
    left = gl.zeros([_HEIGHT, _BLOCK], gl.float32, _SUM)
    right = gl.zeros([_HEIGHT, _BLOCK], gl.float32, _SUM)
    none = gl.zeros([_HEIGHT, _BLOCK], gl.float32, _SUM)
    of_row, of_left, of_right = gl.load(row_scales), gl.load(left_scales), gl.load(right_scales)
    for block in range(WIDE):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        if FENCE:
            # Asynchronous copies write like ordinary stores; the products read like the accelerator.
            fence_async_shared()
        rows = a.index(2 * stage + HALF)
        columns = b.index(stage).slice(0, _BLOCK, 0).permute((1, 0))
        token = warpgroup_mma(rows, columns, none, use_acc=False, is_async=True)
        # The next block's scales are on their way while this one is multiplied.
        following = min(block + 1, WIDE - 1)
        next_row = gl.load(row_scales + following)
        next_left, next_right = gl.load(left_scales + following), gl.load(right_scales + following)
        part = warpgroup_mma_wait(0, deps=(token,))
        left += part * (of_row * of_left)[:, None]
        columns = b.index(stage).slice(_BLOCK, _BLOCK, 0).permute((1, 0))
        token = warpgroup_mma(rows, columns, none, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(empty.index(stage))
        right += part * (of_row * of_right)[:, None]
        of_row, of_left, of_right = next_row, next_left, next_right
        step += 1
    return left, right, step


@gluon.jit
def _hear(work, said, heard, nth, order, HALF: gl.constexpr):
    """block, expert, start and stop of the nth piece of work for one half of its rows, and their pairs [64].

    Heard while the piece in front is finished, so that nothing waits for the pairs.
    """
    block, expert, start, stop = hear(work, said, heard, nth)
    start += _HEIGHT * HALF
    row = start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, _SUM))
    return block, expert, start, stop, gl.load(order + row, mask=row < stop, other=0)


@gluon.jit
def _codes_of(y):
    """e4m3 codes of the rows of y [64, 128] with a scale each, [64]: the rounding of :mod:`moe_cuda.kernels.w8a8`."""
    # A maximum that hands NaN on, as torch's does.
    bad = gl.sum((y != y).to(gl.int32), 1) > 0
    scale = gl.where(bad, float("nan"), gl.max(gl.abs(y), 1) / 448.0)
    # One division a row; numbers so small that a reciprocal is none are moved up first.
    lift = gl.where(scale < 1e-30, 1.2089258196146292e24, 1.0)
    inverse = 1.0 / gl.where(scale == 0.0, 1.0, scale * lift)
    y = (y * lift[:, None]) * inverse[:, None]
    y = gl.where(y > 448.0, 448.0, gl.where(y < -448.0, -448.0, y))
    return y.to(gl.float8e4nv), scale


@gluon.jit
def _first_half(
    scales, s13, b13, inner, inner_scales, order, topk_weights, a, b, ready, empty, work, said, heard,
    HALF: gl.constexpr, H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = I // _BLOCK
    WIDE: gl.constexpr = H // _BLOCK
    step = 0
    nth = 0
    block, expert, start, stop, pair = _hear(work, said, heard, nth, order, HALF)
    while stop > 0:
        nth += 1
        if start < stop:
            at_row = start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, _SUM))
            gate_scales = s13 + (expert * (2 * BLOCKS) + block) * WIDE
            gate, up, step = _add_up(
                a, b, ready, empty, step, scales + pair // K * WIDE, gate_scales, gate_scales + BLOCKS * WIDE,
                HALF, WIDE, STAGES, True,
            )  # fmt: skip
            next_block, next_expert, next_start, next_stop, next_pair = _hear(work, said, heard, nth, order, HALF)
            weight = 1.0
            if WEIGHT_ON_INPUT:
                weight = gl.load(topk_weights + pair, mask=at_row < stop, other=0.0)[:, None]
            column = block * _BLOCK + gl.arange(0, _BLOCK, gl.SliceLayout(0, _SUM))
            bias_at = (expert.to(gl.int64) * (2 * I) + column)[None, :]
            y = finish(
                gate, up, weight, b13, bias_at, (column < I)[None, :], True, I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT,
                ALPHA, BETA,
            )  # fmt: skip
            rounded, scale = _codes_of(y)
            gl.store(inner_scales + at_row * BLOCKS + block, scale, mask=at_row < stop)
            rounded = gl.convert_layout(rounded, _OUT8)
            row = start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, _OUT8))
            n = block * _BLOCK + gl.arange(0, _BLOCK, gl.SliceLayout(0, _OUT8))
            gl.store(inner + row.to(gl.int64)[:, None] * I + n[None, :], rounded, mask=(row < stop)[:, None])
        else:
            step = skip(ready, empty, step, WIDE, STAGES)
            next_block, next_expert, next_start, next_stop, next_pair = _hear(work, said, heard, nth, order, HALF)
        block, expert, start, stop, pair = next_block, next_expert, next_start, next_stop, next_pair


@gluon.jit(do_not_specialize=["programs"])
def first_kernel(
    codes, scales, w13, s13, b13, inner, inner_scales, order, topk_weights, tile_expert, tile_start, tile_stop,
    num_tiles, programs,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, SUM_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """inner[row] = act(codes[token of row] @ w13[expert]^T) as codes, with scales [rows, I / 128].

    Rows are in the order of ``order``; scales are [tokens, H / 128], s13 [E, 2I / 128, H / 128]; BLOCK divides H and I.
    Counts in num_tiles[1], which has to be zero.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    a, b, ready, empty, work, said, heard, stored = allocate(w13, _BOTH, _BLOCK, STAGES, 2, 1 + LOADERS)
    # Written out: a tuple with a name would make tensors of its constants.
    gl.warp_specialize(
        [
            (_first_half, (
                scales, s13, b13, inner, inner_scales, order, topk_weights, a, b, ready, empty, work, said, heard,
                0, H, I, K, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, STAGES,
            )),
            (_first_half, (
                scales, s13, b13, inner, inner_scales, order, topk_weights, a, b, ready, empty, work, said, heard,
                1, H, I, K, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, STAGES,
            )),
            (load_first, (
                codes, w13, order, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, work, said, heard,
                stored, programs, 2, H, I, K, _BLOCK, _BLOCK, STAGES, GROUP, False, False,
            )),
        ],
        [4, 4],
        [SUM_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _second_half(
    inner_scales, s2, b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard,
    HALF: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    WIDE: gl.constexpr = I // _BLOCK
    TALL: gl.constexpr = H // _BLOCK
    step = 0
    nth = 0
    block, expert, start, stop, pair = _hear(work, said, heard, nth, order, HALF)
    while stop > 0:
        nth += 1
        if start < stop:
            at_row = start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, _SUM))
            weight = gl.to_tensor(1.0)
            if not WEIGHT_ON_INPUT:
                weight = gl.load(topk_weights + pair, mask=at_row < stop, other=0.0)
            row_scales = inner_scales + gl.where(at_row < stop, at_row, start) * WIDE
            left_scales = s2 + (expert * TALL + 2 * block) * WIDE
            # Of an odd number of blocks of rows the last tile has one, and nobody stores its right side.
            right_scales = s2 + (expert * TALL + min(2 * block + 1, TALL - 1)) * WIDE
            left, right, step = _add_up(
                a, b, ready, empty, step, row_scales, left_scales, right_scales, HALF, WIDE, STAGES, False,
            )  # fmt: skip
            next_block, next_expert, next_start, next_stop, next_pair = _hear(work, said, heard, nth, order, HALF)
            to = gl.convert_layout(pair, gl.SliceLayout(1, _OUT16)).to(gl.int64)
            parts_at = parts + to[:, None] * H
            stored = (start + gl.arange(0, _HEIGHT, gl.SliceLayout(1, _OUT16)) < stop)[:, None]
            for side in gl.static_range(2):
                acc = left if side == 0 else right
                column = block * _BOTH + side * _BLOCK
                if BIAS:
                    n = column + gl.arange(0, _BLOCK, gl.SliceLayout(0, _SUM))
                    bias_at = b2 + expert.to(gl.int64) * H + n
                    acc += gl.load(bias_at, mask=n < H, other=0.0).to(gl.float32)[None, :]
                if not WEIGHT_ON_INPUT:
                    acc *= weight[:, None]
                out = gl.convert_layout(acc.to(parts.dtype.element_ty), _OUT16)
                n = column + gl.arange(0, _BLOCK, gl.SliceLayout(0, _OUT16))
                gl.store(parts_at + n[None, :], out, mask=stored & (n < H)[None, :])
        else:
            step = skip(ready, empty, step, WIDE, STAGES)
            next_block, next_expert, next_start, next_stop, next_pair = _hear(work, said, heard, nth, order, HALF)
        block, expert, start, stop, pair = next_block, next_expert, next_start, next_stop, next_pair


@gluon.jit(do_not_specialize=["programs"])
def second_kernel(
    inner, inner_scales, w2, s2, b2, parts, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles,
    programs,
    H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, SUM_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """parts[pair of row] = weight of pair * (inner[row] @ w2[expert]^T + b2[expert]); inner is codes. Counts in
    num_tiles[2], which has to be zero."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    a, b, ready, empty, work, said, heard, _ = allocate(w2, _BOTH, _BLOCK, STAGES, 2, 1)
    gl.warp_specialize(
        [
            (_second_half, (
                inner_scales, s2, b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard, 0, H, I,
                BIAS, WEIGHT_ON_INPUT, STAGES,
            )),
            (_second_half, (
                inner_scales, s2, b2, parts, order, topk_weights, a, b, ready, empty, work, said, heard, 1, H, I,
                BIAS, WEIGHT_ON_INPUT, STAGES,
            )),
            (load_second, (
                inner, w2, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, work, said, heard,
                programs, 2, H, I, _BOTH, _BLOCK, STAGES, GROUP, 0,
            )),
        ],
        [4, 4],
        [SUM_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
