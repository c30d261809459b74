"""Routed experts in eight bits, weights and activations: e4m3 by blocks, or e4m3 and int8 by token and channel.

Tensor cores sum products of e4m3 in less than float32, so such a sum goes over one block of columns only; blocks are
added up in float32, each times its two scales. Blocks of scales give the loop its width, and a tile never has two of
them side by side: then a scale of a block is a number of a row. int8 is summed exactly, over everything.

With blocks, the first product's tile holds whole groups of what the second one reads, and rounds them in its epilogue.
A scale a token needs the whole row, so that form rounds rows in a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import finish
from .grouped import place


@triton.jit
def _round(x, scale, INT8: tl.constexpr, UPCAST: tl.constexpr):
    # Codes of x / scale, nearest, ties to even; as float32 that the caller stores as e4m3 or int8. UPCAST: exact
    # numbers of e4m3, for Triton's interpreter, whose conversion loses a carry into the exponent.
    MOST: tl.constexpr = 127.0 if INT8 else 448.0
    y = x / tl.where(scale == 0.0, 1.0, scale)
    # Selects, not minimum and maximum: NaN stays NaN.
    y = tl.where(y > MOST, MOST, tl.where(y < -MOST, -MOST, y))
    if INT8:
        # Adding and taking away 1.5 * 2 ** 23 leaves no bit behind the point, rounded to nearest even.
        y = (y + 12582912.0) - 12582912.0
    elif UPCAST:
        power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where(power < 0.015625, 0.015625, power) * 1572864.0
        y = tl.where(tl.abs(y) <= MOST, (y + power) - power, y)
    return y


@triton.jit
def round_kernel(
    x, given, codes, scales, tile_stop, num_tiles,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr, GIVEN: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, LIMITED: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """codes [rows, WIDTH] and scales [rows, ceil(WIDTH / GROUP)] of x; a program takes GROUPS groups of one row.

    BLOCK covers a group. LIMITED: rows behind the last tile are left alone.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    exists = row >= 0
    if LIMITED:
        # Behind the last tile, and where there is none at all, tile_stop holds 0.
        exists = row < tl.load(tile_stop + tl.maximum(tl.load(num_tiles) - 1, 0))
    if exists:
        MOST: tl.constexpr = 127.0 if INT8 else 448.0
        COLUMNS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        i = tl.arange(0, BLOCK)
        column = group[:, None] * GROUP + i[None, :]
        inside = (i < GROUP)[None, :] & (column < WIDTH)
        at = row * WIDTH + column
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if GIVEN:
            scale = tl.zeros([GROUPS], tl.float32) + tl.load(given)
        else:
            # A maximum that hands NaN on, as torch's does.
            bad = tl.sum((value != value).to(tl.int32), 1) > 0
            scale = tl.where(bad, float("nan"), tl.max(tl.abs(value), 1) / MOST)
        tl.store(scales + row * COLUMNS + group, scale, mask=group < COLUMNS)
        rounded = _round(value, scale[:, None], INT8, UPCAST)
        tl.store(codes + at, rounded.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _dot8(a, b, acc, BLOCKED: tl.constexpr, INT8: tl.constexpr):
    # INT8 goes on in int32; e4m3 begins anew in each block.
    if INT8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif BLOCKED:
        acc = tl.dot(a, b)
    else:
        acc += tl.dot(a, b)
    return acc


@triton.jit
def _tile_of(w, w_tiles, w_at, expert, side, column, at, left, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             TMA: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    if TMA:
        tile = w_tiles.load([expert, side, column, at]).reshape(BLOCK_N, BLOCK_K).T
    elif EVEN:
        tile = tl.load(w_at + at)
    else:
        tile = tl.load(w_at + at, mask=left[:, None], other=0.0)
    return tile


@triton.jit(do_not_specialize=["programs"])
def first_kernel(
    codes, scales, w13, w13_tiles, s13, b13, inner, inner_scales, order, topk_weights,
    tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ROW: tl.constexpr, UP: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, BLOCKED: tl.constexpr, HIGH: tl.constexpr, PIECES: tl.constexpr, INT8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    FLATTEN: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner[row] = act(codes[token of row] @ w13[expert]^T), rows in the order of ``order``.

    BLOCKED: BLOCK_K columns share a scale, HIGH rows of a piece of w13 do, and inner comes out as codes with scales of
    BLOCK_N columns each. Otherwise scales are [tokens] and s13 [E, rows], and inner is of the layer's dtype.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    BLOCKS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    WIDE: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    SIDES: tl.constexpr = 2 if GATED else 1
    # Rows of scales of one piece, and of one expert.
    TALL: tl.constexpr = (SIDES * I // PIECES + HIGH - 1) // HIGH
    tiles = tl.load(num_tiles)
    for t in tl.range(tl.program_id(0), tiles * BLOCKS, programs, flatten=FLATTEN):
        tile, block = place(t, tiles, BLOCKS, SHARE)
        expert = tl.load(tile_expert + tile)
        at_row = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
        here = at_row < tl.load(tile_stop + tile)
        pair = tl.load(order + at_row, mask=here, other=0)
        token = (pair // K).to(tl.int64)
        column = block * BLOCK_N
        n = column + tl.arange(0, BLOCK_N)
        h = tl.arange(0, BLOCK_K)
        a_at = codes + token[:, None] * H + h[None, :]
        safe = tl.minimum(n, I - 1)
        w_at = w13 + expert.to(tl.int64) * (SIDES * I * H) + (safe * (ROW * H))[None, :] + h[:, None]
        EVEN: tl.constexpr = H % BLOCK_K == 0
        KIND: tl.constexpr = tl.int32 if INT8 else tl.float32
        gate = tl.zeros([BLOCK_M, BLOCK_N], KIND)
        up = tl.zeros([BLOCK_M, BLOCK_N], KIND)
        # Where the scales of this tile's rows are: one for the tile, or one a row if a tile has more.
        ONE: tl.constexpr = ROW == 1 and HIGH % BLOCK_N == 0
        if BLOCKED:
            s_gate = s13 + expert * (PIECES * TALL * WIDE)
            if ONE:
                s_gate += column // HIGH * WIDE
            else:
                s_gate += safe * ROW // HIGH * WIDE
            if PIECES == 2:
                s_up = s_gate + TALL * WIDE
            else:
                s_up = s13 + expert * (TALL * WIDE) + (safe * ROW + UP) // HIGH * WIDE
        for step in tl.range(0, WIDE, num_stages=STAGES):
            at = step * BLOCK_K
            left = h < H - at
            a = tl.load(a_at + at) if EVEN else tl.load(a_at + at, mask=left[None, :], other=0.0)
            b = _tile_of(w13, w13_tiles, w_at, expert, 0, column, at, left, BLOCK_N, BLOCK_K, TMA, EVEN)
            if GATED:
                c = _tile_of(w13, w13_tiles, w_at + UP * H, expert, 1, column, at, left, BLOCK_N, BLOCK_K, TMA, EVEN)
            if BLOCKED:
                row_scale = tl.load(scales + token * WIDE + step)
                part = tl.dot(a, b)
                if ONE:
                    gate += part * (row_scale * tl.load(s_gate + step))[:, None]
                else:
                    gate += part * row_scale[:, None] * tl.load(s_gate + step)[None, :]
                if GATED:
                    part = tl.dot(a, c)
                    if ONE:
                        up += part * (row_scale * tl.load(s_up + step))[:, None]
                    else:
                        up += part * row_scale[:, None] * tl.load(s_up + step)[None, :]
            else:
                gate = _dot8(a, b, gate, BLOCKED, INT8)
                if GATED:
                    up = _dot8(a, c, up, BLOCKED, INT8)
        gate_sum, up_sum = gate.to(tl.float32), up.to(tl.float32)
        if not BLOCKED:
            row_scale = tl.load(scales + token)[:, None]
            s_at = s13 + expert * (SIDES * I) + safe * ROW
            gate_sum *= row_scale * tl.load(s_at)[None, :]
            if GATED:
                up_sum *= row_scale * tl.load(s_at + UP)[None, :]
        weight = 1.0
        if WEIGHT_ON_INPUT:
            weight = tl.load(topk_weights + pair, mask=here, other=0.0)[:, None]
        bias_at = (expert.to(tl.int64) * (SIDES * I) + safe * ROW)[None, :]
        y = finish(
            gate_sum, up_sum, weight, b13, bias_at, (n < I)[None, :],
            GATED, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA,
        )  # fmt: skip
        if BLOCKED:
            y = tl.where((n < I)[None, :], y, 0.0)
            bad = tl.sum((y != y).to(tl.int32), 1) > 0
            found = tl.where(bad, float("nan"), tl.max(tl.abs(y), 1) / 448.0)
            tl.store(inner_scales + at_row.to(tl.int64) * BLOCKS + block, found, mask=here)
            y = _round(y, found[:, None], False, UPCAST)
        to = inner + at_row.to(tl.int64)[:, None] * I + n[None, :]
        tl.store(to, y.to(inner.dtype.element_ty), mask=here[:, None] & (n < I)[None, :])


@triton.jit(do_not_specialize=["programs"])
def second_kernel(
    inner, inner_scales, w2, w2_tiles, s2, b2, parts, order, topk_weights,
    tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: tl.constexpr, I: tl.constexpr, BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, BLOCKED: tl.constexpr,
    HIGH: tl.constexpr, INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, SHARE: tl.constexpr, FLATTEN: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts[pair of row] = weight of pair * (inner[row] @ w2[expert]^T + b2[expert]); inner is codes."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    WIDE: tl.constexpr = (I + BLOCK_K - 1) // BLOCK_K
    TALL: tl.constexpr = (H + HIGH - 1) // HIGH
    EVEN: tl.constexpr = I % BLOCK_K == 0
    tiles = tl.load(num_tiles)
    for t in tl.range(tl.program_id(0), tiles * BLOCKS, programs, flatten=FLATTEN):
        tile, block = place(t, tiles, BLOCKS, SHARE)
        expert = tl.load(tile_expert + tile)
        start, stop = tl.load(tile_start + tile), tl.load(tile_stop + tile)
        at_row = start + tl.arange(0, BLOCK_M)
        here = at_row < stop
        row = tl.minimum(at_row, stop - 1).to(tl.int64)
        column = block * BLOCK_N
        n = column + tl.arange(0, BLOCK_N)
        i = tl.arange(0, BLOCK_K)
        a_at = inner + row[:, None] * I + i[None, :]
        safe = tl.minimum(n, H - 1)
        w_at = w2 + expert.to(tl.int64) * (H * I) + (safe * I)[None, :] + i[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INT8 else tl.float32)
        ONE: tl.constexpr = HIGH % BLOCK_N == 0
        if ONE:
            s_at = s2 + (expert * TALL + column // HIGH) * WIDE
        else:
            s_at = s2 + (expert * TALL + safe // HIGH) * WIDE
        for step in tl.range(0, WIDE, num_stages=STAGES):
            at = step * BLOCK_K
            left = i < I - at
            a = tl.load(a_at + at) if EVEN else tl.load(a_at + at, mask=left[None, :], other=0.0)
            b = _tile_of(w2, w2_tiles, w_at, expert, 0, column, at, left, BLOCK_N, BLOCK_K, TMA, EVEN)
            if BLOCKED:
                row_scale = tl.load(inner_scales + row * WIDE + step)
                part = tl.dot(a, b)
                if ONE:
                    acc += part * (row_scale * tl.load(s_at + step))[:, None]
                else:
                    acc += part * row_scale[:, None] * tl.load(s_at + step)[None, :]
            else:
                acc = _dot8(a, b, acc, BLOCKED, INT8)
        out = acc.to(tl.float32)
        if not BLOCKED:
            out *= tl.load(inner_scales + row)[:, None] * tl.load(s2 + expert * H + safe)[None, :]
        pair = tl.load(order + at_row, mask=here, other=0)
        if BIAS:
            out += tl.load(b2 + expert.to(tl.int64) * H + safe).to(tl.float32)[None, :]
        if not WEIGHT_ON_INPUT:
            out *= tl.load(topk_weights + pair, mask=here, other=0.0)[:, None]
        to = parts + pair.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(to, out.to(parts.dtype.element_ty), mask=here[:, None] & (n < H)[None, :])
