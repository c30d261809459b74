"""Routed experts for many tokens: two persistent grouped products over tiles of rows of one expert.

Tiles come from :func:`moe_cuda.kernels.align.align`, by real counts. A program takes tiles in an order that keeps the
weights of an expert, and the rows that go with them, in L2. Gate and up share one accumulator, so that one wide
instruction serves both; the activation follows in registers. The operands of 16-bit layers come through the tensor
memory accelerator where there is one. It can't gather: hidden states are gathered while they are loaded, or, where that
keeps the product waiting, by a copy in front of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import finish
from .pairs import dot


@triton.jit
def place(t, tiles, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Tile and block of columns of the t-th piece of work; GROUP tiles take their blocks in step, and share weights."""
    per_group: tl.constexpr = GROUP * BLOCKS
    first = t // per_group * GROUP
    size = tl.minimum(tiles - first, GROUP)
    return first + t % per_group % size, t % per_group // size


@triton.jit
def gather_kernel(x, order, tile_stop, num_tiles, rows_out, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """rows_out[row] = x[token of row]; a program copies BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    # Behind the last tile, and where there is none at all, tile_stop holds 0.
    if row < tl.load(tile_stop + tl.maximum(tl.load(num_tiles) - 1, 0)):
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        token = (tl.load(order + row) // K).to(tl.int64)
        tl.store(rows_out + row * H + h, tl.load(x + token * H + h, mask=h < H, other=0.0), mask=h < H)


@triton.jit
def _first_tile(
    x, x_tiles, w13, w13_tiles, b13, inner, order, topk_weights, expert, start, stop, column,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ROW: tl.constexpr, UP: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, GATHERED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    at_row = start + tl.arange(0, BLOCK_M)
    here = at_row < stop
    pair = tl.load(order + at_row, mask=here, other=0)
    n = column + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_K)
    # Rows that the tile does not have read the first token; nobody stores what comes of it.
    x_at = x + (pair // K).to(tl.int64)[:, None] * H + h[None, :]
    rows: tl.constexpr = 2 * I if GATED else I
    if TMA and GATED:
        both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for at in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            if GATHERED:
                a = x_tiles.load([start, at])
            elif H % BLOCK_K == 0:
                a = tl.load(x_at + at)
            else:
                a = tl.load(x_at + at, mask=(h < H - at)[None, :], other=0.0)
            w = w13_tiles.load([expert, 0, column, at]).reshape(2 * BLOCK_N, BLOCK_K)
            both = dot(a, w.T, both, UPCAST)
        gate_sum, up_sum = both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
    else:
        gate_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        safe = tl.minimum(n, I - 1)
        w_at = w13 + expert.to(tl.int64) * (rows * H) + (safe * (ROW * H))[None, :] + h[:, None]
        for at in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            if H % BLOCK_K == 0:
                a = tl.load(x_at + at)
                gate = tl.load(w_at + at)
                if GATED:
                    up = tl.load(w_at + UP * H + at)
            else:
                left = h < H - at
                a = tl.load(x_at + at, mask=left[None, :], other=0.0)
                gate = tl.load(w_at + at, mask=left[:, None], other=0.0)
                if GATED:
                    up = tl.load(w_at + UP * H + at, mask=left[:, None], other=0.0)
            gate_sum = dot(a, gate, gate_sum, UPCAST)
            if GATED:
                up_sum = dot(a, up, up_sum, UPCAST)
    weight = 1.0
    if WEIGHT_ON_INPUT:
        weight = tl.load(topk_weights + pair, mask=here, other=0.0)[:, None]
    bias_at = (expert.to(tl.int64) * rows + n * ROW)[None, :]
    y = finish(
        gate_sum, up_sum, weight, b13, bias_at, (n < I)[None, :],
        GATED, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA,
    )  # fmt: skip
    to = inner + at_row.to(tl.int64)[:, None] * I + n[None, :]
    tl.store(to, y.to(inner.dtype.element_ty), mask=here[:, None] & (n < I)[None, :])


@triton.jit(do_not_specialize=["programs"])
def first_kernel(
    x, x_tiles, x_half_tiles, w13, w13_tiles, b13, inner, order, topk_weights, tile_expert, tile_start, tile_stop,
    num_tiles, programs,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ROW: tl.constexpr, UP: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, FLATTEN: tl.constexpr, TMA: tl.constexpr, GATHERED: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner[row] = act(x[token of row] @ w13[expert]^T), rows in the order of ``order``, x_tiles' too if GATHERED."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    BLOCKS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tiles = tl.load(num_tiles)
    for t in tl.range(tl.program_id(0), tiles * BLOCKS, programs, flatten=FLATTEN):
        tile, block = place(t, tiles, BLOCKS, GROUP)
        expert = tl.load(tile_expert + tile)
        start, stop = tl.load(tile_start + tile), tl.load(tile_stop + tile)
        if HALF and stop - start <= BLOCK_M // 2:
            _first_tile(
                x, x_half_tiles, w13, w13_tiles, b13, inner, order, topk_weights, expert, start, stop,
                block * BLOCK_N, H, I, K, GATED, ROW, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA,
                BLOCK_M // 2, BLOCK_N, BLOCK_K, STAGES, TMA, GATHERED, UPCAST,
            )  # fmt: skip
        else:
            _first_tile(
                x, x_tiles, w13, w13_tiles, b13, inner, order, topk_weights, expert, start, stop,
                block * BLOCK_N, H, I, K, GATED, ROW, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, TMA, GATHERED, UPCAST,
            )  # fmt: skip


@triton.jit
def _second_tile(
    inner, inner_tiles, w2, w2_tiles, b2, parts, order, topk_weights, expert, start, stop, column,
    H: tl.constexpr, I: tl.constexpr, BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    at_row = start + tl.arange(0, BLOCK_M)
    here = at_row < stop
    n = column + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for at in tl.range(0, I, BLOCK_K, num_stages=STAGES):
            a = inner_tiles.load([start, at])
            w = w2_tiles.load([expert * H + column, at])
            acc = dot(a, w.T, acc, UPCAST)
    else:
        safe = tl.minimum(n, H - 1)
        inner_at = inner + tl.minimum(at_row, stop - 1).to(tl.int64)[:, None] * I + i[None, :]
        w_at = w2 + expert.to(tl.int64) * (H * I) + (safe * I)[None, :] + i[:, None]
        for at in tl.range(0, I, BLOCK_K, num_stages=STAGES):
            if I % BLOCK_K == 0:
                a, w = tl.load(inner_at + at), tl.load(w_at + at)
            else:
                left = i < I - at
                a = tl.load(inner_at + at, mask=left[None, :], other=0.0)
                w = tl.load(w_at + at, mask=left[:, None], other=0.0)
            acc = dot(a, w, acc, UPCAST)
    pair = tl.load(order + at_row, mask=here, other=0)
    if BIAS:
        acc += tl.load(b2 + expert.to(tl.int64) * H + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
    if not WEIGHT_ON_INPUT:
        acc *= tl.load(topk_weights + pair, mask=here, other=0.0)[:, None]
    to = parts + pair.to(tl.int64)[:, None] * H + n[None, :]
    tl.store(to, acc.to(parts.dtype.element_ty), mask=here[:, None] & (n < H)[None, :])


@triton.jit(do_not_specialize=["programs"])
def second_kernel(
    inner, inner_tiles, inner_half_tiles, w2, w2_tiles, b2, parts, order, topk_weights,
    tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: tl.constexpr, I: tl.constexpr, BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    FLATTEN: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts[pair of row] = weight of pair * (inner[row] @ w2[expert]^T + b2[expert])."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tiles = tl.load(num_tiles)
    for t in tl.range(tl.program_id(0), tiles * BLOCKS, programs, flatten=FLATTEN):
        tile, block = place(t, tiles, BLOCKS, GROUP)
        expert = tl.load(tile_expert + tile)
        start, stop = tl.load(tile_start + tile), tl.load(tile_stop + tile)
        if HALF and stop - start <= BLOCK_M // 2:
            _second_tile(
                inner, inner_half_tiles, w2, w2_tiles, b2, parts, order, topk_weights, expert, start, stop,
                block * BLOCK_N, H, I, BIAS, WEIGHT_ON_INPUT, BLOCK_M // 2, BLOCK_N, BLOCK_K, STAGES, TMA, UPCAST,
            )  # fmt: skip
        else:
            _second_tile(
                inner, inner_tiles, w2, w2_tiles, b2, parts, order, topk_weights, expert, start, stop,
                block * BLOCK_N, H, I, BIAS, WEIGHT_ON_INPUT, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, TMA, UPCAST,
            )  # fmt: skip
