"""Routed experts whose weights alone are quantised, for few and for many tokens: dequantised in registers.

Products are taken the other way round than in bfloat16: the rows of the weights are the rows of the tensor cores' tile,
and tokens its columns. Hopper multiplies a left side out of registers, so a weight goes from memory to shared memory to
registers as four (or eight) bits, becomes a bfloat16 there, and is multiplied; no wider copy of it exists anywhere. And
one token wastes seven eighths of a tile sixteen tokens wide, not of the whole width of the weights.

Stored weights are read as 16-bit words of four (or two) columns. The i-th weights of all words of a row make a matrix,
multiplied with the i-th column of every four of the tokens: a sum has no order, so nothing is ever put back in line.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import activate, activate_plain
from .grouped import place
from .pairs import _led, dot, pair_and_block
from .words import E2M1, INT4, as_words, numbers, scale_of, stored_tile


@triton.jit
def _product(
    x, x_row, here, w, scale, zero, w_row, scale_row,
    K: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, BLOCK_M]: rows of weights times rows of x.

    x_row [BLOCK_M], w_row [ROWS] (in words) and scale_row [ROWS] say where rows begin; here [BLOCK_M] which rows of x
    there are. GROUP 0: a scale a row, which the caller applies. PACKED: bfloat16 by twos.
    """
    EACH: tl.constexpr = 2 if CODE == "int8" or CODE == "uint8" else 4
    WORDS: tl.constexpr = BLOCK_K // EACH
    SPAN: tl.constexpr = GROUP if GROUP > 0 else BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // SPAN if SPAN < BLOCK_K else 1
    COLUMNS: tl.constexpr = (K + SPAN - 1) // SPAN
    FIXED: tl.constexpr = 8.0 if CODE == "int4" else 0.0
    word, k = tl.arange(0, WORDS), tl.arange(0, BLOCK_K)
    w_at = w + w_row[:, None] + word[None, :]
    x_at = x + x_row[:, None] + k[None, :]
    acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
    # Copies that run ahead of the loop have four bytes at least: of narrower scales a step asks for the next one's.
    # Those of one byte alone: wider ones, carried from step to step, would send the weights through shared memory.
    AHEAD: tl.constexpr = MX and (GROUPS < 4 or COLUMNS % 4 != 0)
    if AHEAD:
        next_scales = stored_tile(scale, scale_row, COLUMNS, 0, GROUPS)
    for at in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            words = tl.load(w_at + at // EACH)
            xv = tl.load(x_at + at, mask=here[:, None], other=0.0)
        else:
            words = tl.load(w_at + at // EACH, mask=(word < (K - at) // EACH)[None, :], other=0)
            xv = tl.load(x_at + at, mask=here[:, None] & (k < K - at)[None, :], other=0.0)
        if GROUP > 0:
            if AHEAD:
                scales = scale_of(next_scales, MX)
                next_scales = stored_tile(scale, scale_row, COLUMNS, (at + BLOCK_K) // SPAN, GROUPS)
            else:
                scales = scale_of(stored_tile(scale, scale_row, COLUMNS, at // SPAN, GROUPS), MX)
            if ZERO:
                zeros = scale_of(stored_tile(zero, scale_row, COLUMNS, at // SPAN, GROUPS), False)
        if EACH == 4:
            even, odd = xv.reshape(BLOCK_M, WORDS, 2, 2).split()
            x0, x2 = even.split()
            x1, x3 = odd.split()
        else:
            x0, x1 = xv.reshape(BLOCK_M, WORDS, 2).split()
        if PACKED and EACH == 4:
            if GROUP > 0:
                factor = as_words(scales.to(tl.bfloat16), WORDS)
            else:
                factor = tl.full([ROWS, WORDS], 1.0, tl.bfloat16)
            if CODE == "e2m1":
                w0, w1, w2, w3 = tl.inline_asm_elementwise(
                    E2M1, "=r,=r,=r,=r,r,r", [words, factor], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                    is_pure=True, pack=2,
                )  # fmt: skip
            else:
                if ZERO and GROUP > 0:
                    shifted = as_words((zeros + 128.0).to(tl.bfloat16), WORDS)
                else:
                    shifted = tl.full([ROWS, WORDS], 128.0 + FIXED, tl.bfloat16)
                w0, w1, w2, w3 = tl.inline_asm_elementwise(
                    INT4, "=r,=r,=r,=r,r,r,r", [words, shifted, factor],
                    (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
                )  # fmt: skip
            acc = dot(w0, x0.T, acc, UPCAST)
            acc = dot(w1, x1.T, acc, UPCAST)
            acc = dot(w2, x2.T, acc, UPCAST)
            acc = dot(w3, x3.T, acc, UPCAST)
        else:
            factor, shift = 1.0, FIXED
            if GROUP > 0:
                factor = as_words(scales, WORDS)
                if ZERO:
                    shift = as_words(zeros, WORDS)
            SCALED: tl.constexpr = GROUP > 0
            acc = dot(numbers(words, factor, shift, xv, 0, CODE, SCALED, UPCAST), x0.T, acc, UPCAST)
            acc = dot(numbers(words, factor, shift, xv, 1, CODE, SCALED, UPCAST), x1.T, acc, UPCAST)
            if EACH == 4:
                acc = dot(numbers(words, factor, shift, xv, 2, CODE, SCALED, UPCAST), x2.T, acc, UPCAST)
                acc = dot(numbers(words, factor, shift, xv, 3, CODE, SCALED, UPCAST), x3.T, acc, UPCAST)
    return acc


@triton.jit
def _first(
    x, topk_weights, w13, s13, z13, whole13, b13, inner, slot, to_row, here, expert, column,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ROW: tl.constexpr, UP: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr,
    WHOLE: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # inner[to_row, n] of one expert for the pairs in slot; gate and up rows lie in one tile, gate rows first.
    SIDES: tl.constexpr = 2 if GATED else 1
    ROWS: tl.constexpr = SIDES * BLOCK_N
    EACH: tl.constexpr = 2 if CODE == "int8" or CODE == "uint8" else 4
    SPAN: tl.constexpr = GROUP if GROUP > 0 else H
    row = tl.arange(0, ROWS)
    n = column + row % BLOCK_N
    # Columns behind the last read the last again, and are not stored.
    w_row = tl.minimum(n, I - 1) * ROW + row // BLOCK_N * UP
    at = expert * (SIDES * I) + w_row
    scale_row = at * ((H + SPAN - 1) // SPAN)
    x_row = (slot // K).to(tl.int64) * H
    acc = _product(
        x, x_row, here, w13, s13, z13, at * (H // EACH), scale_row,
        H, CODE, GROUP, ZERO, MX, ROWS, BLOCK_M, BLOCK_K, STAGES, PACKED, UPCAST,
    )  # fmt: skip
    if GROUP == 0:
        acc *= tl.load(s13 + scale_row).to(tl.float32)[:, None]
    if WHOLE:
        piece = row // BLOCK_N if PIECES == 2 else row * 0
        acc *= tl.load(whole13 + expert * PIECES + piece)[:, None]
    if WEIGHT_ON_INPUT:
        acc *= tl.load(topk_weights + slot, mask=here, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(b13 + at).to(tl.float32)[:, None]
    if GATED:
        gate_sum, up_sum = acc.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0).split()
        y = activate(gate_sum, up_sum, ACT, LIMIT, ALPHA, BETA)
    else:
        y = activate_plain(acc, ACT)
    n = column + tl.arange(0, BLOCK_N)
    to = inner + to_row.to(tl.int64)[None, :] * I + n[:, None]
    tl.store(to, y.to(inner.dtype.element_ty), mask=here[None, :] & (n < I)[:, None])


@triton.jit
def _second(
    inner, topk_weights, w2, s2, z2, whole2, b2, parts, slot, from_row, here, expert, column,
    H: tl.constexpr, I: tl.constexpr, BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, CODE: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # parts[slot, n] = weight of slot * (inner[from_row] @ w2[expert]^T + b2[expert]).
    EACH: tl.constexpr = 2 if CODE == "int8" or CODE == "uint8" else 4
    SPAN: tl.constexpr = GROUP if GROUP > 0 else I
    n = column + tl.arange(0, BLOCK_N)
    at = expert * H + tl.minimum(n, H - 1)
    scale_row = at * ((I + SPAN - 1) // SPAN)
    acc = _product(
        inner, from_row.to(tl.int64) * I, here, w2, s2, z2, at * (I // EACH), scale_row,
        I, CODE, GROUP, ZERO, MX, BLOCK_N, BLOCK_M, BLOCK_K, STAGES, PACKED, UPCAST,
    )  # fmt: skip
    if GROUP == 0:
        acc *= tl.load(s2 + scale_row).to(tl.float32)[:, None]
    if WHOLE:
        acc *= tl.load(whole2 + expert)
    if BIAS:
        acc += tl.load(b2 + at).to(tl.float32)[:, None]
    if not WEIGHT_ON_INPUT:
        acc *= tl.load(topk_weights + slot, mask=here, other=0.0)[None, :]
    to = parts + slot.to(tl.int64)[None, :] * H + n[:, None]
    tl.store(to, acc.to(parts.dtype.element_ty), mask=here[None, :] & (n < H)[:, None])


@triton.jit
def _slots(first, p, same, rank, BLOCK_M: tl.constexpr):
    j = first + tl.arange(0, BLOCK_M)
    chosen = (rank[None, :] == j[:, None]) & same[None, :]
    return tl.sum(tl.where(chosen, p[None, :], 0), 1)


@triton.jit(do_not_specialize=["pairs"])
def pairs_first_kernel(
    x, topk_ids, topk_weights, w13, s13, z13, whole13, b13, inner, pairs,
    ALL: tl.constexpr, HELD: tl.constexpr, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
    ROW: tl.constexpr, UP: tl.constexpr, BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, MX: tl.constexpr, WHOLE: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, COLUMNS_FIRST: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner[pair] = act(x[token of pair] @ w13[expert]^T); of an expert's pairs the first one's programs do all."""
    if PDL:
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    pair, block = pair_and_block(tl.program_id(0), pairs, BLOCKS, COLUMNS_FIRST)
    expert, p, same, rank, leads = _led(topk_ids, pair, pairs, HELD, ALL)
    if leads:
        count = tl.sum(same.to(tl.int32), 0)
        first = 0
        while first < count:
            here = first + tl.arange(0, BLOCK_M) < count
            slot = _slots(first, p, same, rank, BLOCK_M)
            _first(
                x, topk_weights, w13, s13, z13, whole13, b13, inner, slot, slot, here, expert, block * BLOCK_N,
                H, I, K, GATED, ROW, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, CODE, GROUP, ZERO, MX, WHOLE,
                PIECES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PACKED, UPCAST,
            )  # fmt: skip
            first += BLOCK_M


@triton.jit(do_not_specialize=["pairs"])
def pairs_second_kernel(
    inner, topk_ids, topk_weights, w2, s2, z2, whole2, b2, parts, pairs,
    ALL: tl.constexpr, HELD: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr, PACKED: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts[pair] = weight of pair * (inner[pair] @ w2[expert]^T + b2[expert])."""
    if PDL:
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    pair, block = pair_and_block(tl.program_id(0), pairs, BLOCKS, COLUMNS_FIRST)
    expert, p, same, rank, leads = _led(topk_ids, pair, pairs, HELD, ALL)
    if PDL:
        # Every program waits, also one that has nothing to do: the next kernel takes its end as the end of the first.
        gdc_wait()
    if leads:
        count = tl.sum(same.to(tl.int32), 0)
        first = 0
        while first < count:
            here = first + tl.arange(0, BLOCK_M) < count
            slot = _slots(first, p, same, rank, BLOCK_M)
            _second(
                inner, topk_weights, w2, s2, z2, whole2, b2, parts, slot, slot, here, expert, block * BLOCK_N,
                H, I, BIAS, WEIGHT_ON_INPUT, CODE, GROUP, ZERO, MX, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PACKED,
                UPCAST,
            )  # fmt: skip
            first += BLOCK_M


@triton.jit(do_not_specialize=["programs"])
def tiles_first_kernel(
    x, topk_weights, w13, s13, z13, whole13, b13, inner, order, tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ROW: tl.constexpr, UP: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr,
    WHOLE: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, SHARE: tl.constexpr, PACKED: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same over tiles of rows of one expert, for many tokens; inner's rows are in the order of ``order``."""
    if PDL:
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tiles = tl.load(num_tiles)
    for t in tl.range(tl.program_id(0), tiles * BLOCKS, programs):
        tile, block = place(t, tiles, BLOCKS, SHARE)
        at_row = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
        here = at_row < tl.load(tile_stop + tile)
        slot = tl.load(order + at_row, mask=here, other=0)
        _first(
            x, topk_weights, w13, s13, z13, whole13, b13, inner, slot, at_row, here,
            tl.load(tile_expert + tile).to(tl.int64), block * BLOCK_N,
            H, I, K, GATED, ROW, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, CODE, GROUP, ZERO, MX, WHOLE,
            PIECES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PACKED, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def tiles_second_kernel(
    inner, topk_weights, w2, s2, z2, whole2, b2, parts, order, tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: tl.constexpr, I: tl.constexpr, BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, CODE: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr, PACKED: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts[pair of row] = weight of pair * (inner[row] @ w2[expert]^T + b2[expert])."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tiles = tl.load(num_tiles)
    for t in tl.range(tl.program_id(0), tiles * BLOCKS, programs):
        tile, block = place(t, tiles, BLOCKS, SHARE)
        at_row = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
        here = at_row < tl.load(tile_stop + tile)
        slot = tl.load(order + at_row, mask=here, other=0)
        _second(
            inner, topk_weights, w2, s2, z2, whole2, b2, parts, slot, at_row, here,
            tl.load(tile_expert + tile).to(tl.int64), block * BLOCK_N,
            H, I, BIAS, WEIGHT_ON_INPUT, CODE, GROUP, ZERO, MX, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PACKED,
            UPCAST,
        )  # fmt: skip
