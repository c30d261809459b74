"""Routed experts whose weights alone are quantised, for a handful of tokens: no sorting, no tensor cores.

One program owns some columns of one (token, expert) pair. A warp reads a row of weights sixteen bytes a lane, and all
of its rows share the row of x that they meet, which is in registers by then. A weight costs three or four
instructions: it is cut out of its word into the mantissa (or the exponent) of a float32, put right, and multiplied;
scales of groups are applied to the sum of what a lane read, which never has two of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import activate, activate_plain

BYTES: int = 16
"""What a lane reads of a row at a time: four 32-bit words."""
UNROLLED: int = 32
"""Steps of a row up to which its loop is unrolled, so that loads run ahead."""
_UNROLLED = tl.constexpr(UNROLLED)


@triton.jit
def _weight(words, i: tl.constexpr, CODE: tl.constexpr, ZERO: tl.constexpr):
    """float32 of the i-th weight of each 32-bit word; of e2m1 times 2 ** -126."""
    if CODE == "e2m1":
        # The sign is shifted in from the left, and what it leaves of itself on the way is cut off.
        bits = ((words << (28 - 4 * i)) >> 6) & -2118123520
        out = bits.to(tl.float32, bitcast=True)
    else:
        # In a float32 of 2 ** (23 - p) the mantissa's bit p counts 1.
        BITS: tl.constexpr = 4 if CODE == "int4" else 8
        MASK: tl.constexpr = 15 if CODE == "int4" else 255
        PLACE: tl.constexpr = BITS * i if BITS * (i + 1) <= 23 else BITS * i % 12 + (8 - BITS) % 8
        MOVE: tl.constexpr = BITS * i - PLACE
        FIXED: tl.constexpr = 128 if CODE == "int8" else 8 if CODE == "int4" and not ZERO else 0
        if CODE == "int8":
            words = words ^ -2139062144
        bits = ((words >> MOVE) & (MASK << PLACE)) | ((150 - PLACE) << 23)
        out = bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - PLACE) + FIXED)
    return out


@triton.jit
def _parts_of(x, G: tl.constexpr, EACH: tl.constexpr):
    """x [G * 4 * EACH] by the place in its word: EACH tensors [G, 4]."""
    if EACH == 8:
        even, odd = x.reshape(G, 4, 2, 2, 2).split()
        x04, x26 = even.split()
        x15, x37 = odd.split()
        x0, x4 = x04.split()
        x1, x5 = x15.split()
        x2, x6 = x26.split()
        x3, x7 = x37.split()
        parts = (
            x0[None, :, :],
            x1[None, :, :],
            x2[None, :, :],
            x3[None, :, :],
            x4[None, :, :],
            x5[None, :, :],
            x6[None, :, :],
            x7[None, :, :],
        )
    else:
        even, odd = x.reshape(G, 4, 2, 2).split()
        x0, x2 = even.split()
        x1, x3 = odd.split()
        parts = (x0[None, :, :], x1[None, :, :], x2[None, :, :], x3[None, :, :])
    return parts


@triton.jit
def _parts_by_fours(x, chunk, ROWS: tl.constexpr, K: tl.constexpr, G: tl.constexpr):
    """The same of bfloat16 that is read by fours, of words of eight: two tensors change their layout, not eight."""
    at = tl.arange(0, G * 8)
    if K % (G * 32) == 0:
        fours = tl.load(x + chunk * (G * 8) + at)
    else:
        fours = tl.load(x + chunk * (G * 8) + at, mask=at < K // 4 - chunk * (G * 8), other=0)
    # Spread over the rows before they are taken apart: then each changes its layout once.
    low, high = fours.reshape(G, 4, 2).split()
    low = tl.broadcast_to(low[None, :, :], (ROWS, G, 4))
    high = tl.broadcast_to(high[None, :, :], (ROWS, G, 4))
    return (_one(low, 0), _one(low, 1), _one(low, 2), _one(low, 3),
            _one(high, 0), _one(high, 1), _one(high, 2), _one(high, 3))  # fmt: skip


@triton.jit
def _one(fours, i: tl.constexpr):
    # float32 of the i-th bfloat16.
    half = (fours >> (32 * (i // 2))).to(tl.int32)
    bits = half & -65536 if i % 2 else half << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _words_of(w_at, chunk, index, EACH: tl.constexpr, G: tl.constexpr, K: tl.constexpr):
    at = w_at + chunk * (G * 4)
    if K % (G * 4 * EACH) == 0:
        words = tl.load(at, eviction_policy="evict_first")
    else:
        inside = index < K // EACH - chunk * (G * 4)
        words = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
    return words.reshape(words.shape[0], G, 4)


@triton.jit
def _step(
    acc, words, x, scale, zero, scale_row, chunk, g,
    K: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr,
    EACH: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    VALUES: tl.constexpr = 4 * EACH
    if x.dtype.element_ty == tl.int64:
        parts = _parts_by_fours(x, chunk, words.shape[0], K, G)
    else:
        k = tl.arange(0, G * VALUES)
        if K % (G * VALUES) == 0:
            xv = tl.load(x + chunk * (G * VALUES) + k)
        else:
            xv = tl.load(x + chunk * (G * VALUES) + k, mask=k < K - chunk * (G * VALUES), other=0.0)
        parts = _parts_of(xv, G, EACH)
    total = tl.zeros([words.shape[0], G, 4], tl.float32)
    all_x = 0.0
    for i in tl.static_range(EACH):
        part = parts[i].to(tl.float32)
        if ZERO:
            all_x = part + all_x
        if CODE == "e2m1":
            # Products stay far from what float32 cannot hold on either side; the caller knows.
            part *= 1.152921504606847e18  # 2 ** 60
        total += _weight(words, i, CODE, ZERO) * part
    found = tl.sum(total, 2)
    if GROUP > 0:
        COLUMNS: tl.constexpr = (K + GROUP - 1) // GROUP
        group = (chunk * G + g) // (GROUP // VALUES)
        at, inside = scale_row[:, None] + group[None, :], (group < COLUMNS)[None, :]
        if ZERO:
            found -= tl.load(zero + at, mask=inside, other=0).to(tl.float32) * tl.sum(all_x, 2)
        found *= _factor(scale + at, inside, MX)
    return acc + found


@triton.jit
def _factor(at, inside, MX: tl.constexpr):
    if MX:
        code = tl.load(at, mask=inside, other=0).to(tl.int32)
        # As in the other form: 2 ** (code - 127), and 255 is NaN.
        bits = tl.maximum(code << 23, 0x400000) | ((code + 1) >> 8 << 22)
        out = bits.to(tl.float32, bitcast=True)
    else:
        out = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return out


@triton.jit
def _sums(
    x, w, scale, zero, w_row, scale_row,
    K: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr,
    G: tl.constexpr, PREFETCH: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS]: rows of weights times x [K], which may be int64 of four bfloat16 each where words hold eight.

    w_row [ROWS] (in 32-bit words) and scale_row [ROWS] say where rows begin. GROUP 0: a scale a row, which the caller
    applies. WAIT: x is there only behind the wait, in front of which PREFETCH steps of weights are asked for.
    """
    EACH: tl.constexpr = 4 if CODE == "int8" or CODE == "uint8" else 8
    CHUNKS: tl.constexpr = (K + G * 4 * EACH - 1) // (G * 4 * EACH)
    g = tl.arange(0, G)
    index = tl.arange(0, G * 4)[None, :]
    w_at = w + w_row[:, None] + index
    fetched = ()
    for chunk in tl.static_range(PREFETCH):
        fetched = fetched + (_words_of(w_at, chunk, index, EACH, G, K),)  # noqa: RUF005 (Triton unpacks no tuples)
    if WAIT:
        gdc_wait()
    acc = tl.zeros([w_row.shape[0], G], tl.float32)
    if CHUNKS <= _UNROLLED:
        for chunk in tl.static_range(CHUNKS):
            if chunk < PREFETCH:
                words = fetched[chunk]
            else:
                words = _words_of(w_at, chunk, index, EACH, G, K)
            acc = _step(acc, words, x, scale, zero, scale_row, chunk, g, K, CODE, GROUP, ZERO, MX, EACH, G)
    else:
        for chunk in tl.range(0, CHUNKS):
            words = _words_of(w_at, chunk, index, EACH, G, K)
            acc = _step(acc, words, x, scale, zero, scale_row, chunk, g, K, CODE, GROUP, ZERO, MX, EACH, G)
    out = tl.sum(acc, 1)
    if CODE == "e2m1":
        out *= 7.378697629483821e19  # 2 ** 66
    return out


@triton.jit(do_not_specialize=["pairs"])
def first_kernel(
    x, topk_ids, topk_weights, w13, s13, z13, whole13, b13, inner, pairs,
    HELD: tl.constexpr, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ROW: tl.constexpr,
    UP: tl.constexpr, BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    MX: tl.constexpr, WHOLE: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, G: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """inner[pair] = act(x[token of pair] @ w13[expert]^T)."""
    if PDL:
        # Behind the wait: the second product reads ids before it waits, so it must not begin before they are there.
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    pair, block = program % pairs, program // pairs
    expert = tl.load(topk_ids + pair).to(tl.int64)
    if (expert >= 0) & (expert < HELD):
        SIDES: tl.constexpr = 2 if GATED else 1
        EACH: tl.constexpr = 4 if CODE == "int8" or CODE == "uint8" else 8
        SPAN: tl.constexpr = GROUP if GROUP > 0 else H
        WIDTH: tl.constexpr = H // 4 if x.dtype.element_ty == tl.int64 else H
        row = tl.arange(0, SIDES * BLOCK_N)
        n = block * BLOCK_N + row % BLOCK_N
        # Columns behind the last read the last again, and are not stored. Gate rows come first.
        at = expert * (SIDES * I) + tl.minimum(n, I - 1) * ROW + row // BLOCK_N * UP
        scale_row = at * ((H + SPAN - 1) // SPAN)
        acc = _sums(
            x + (pair // K).to(tl.int64) * WIDTH, w13, s13, z13, at * (H // EACH), scale_row,
            H, CODE, GROUP, ZERO, MX, G, 0, False,
        )  # fmt: skip
        if GROUP == 0:
            acc *= tl.load(s13 + scale_row).to(tl.float32)
        if WHOLE:
            piece = row // BLOCK_N if PIECES == 2 else row * 0
            acc *= tl.load(whole13 + expert * PIECES + piece)
        if WEIGHT_ON_INPUT:
            acc *= tl.load(topk_weights + pair)
        if BIAS:
            acc += tl.load(b13 + at).to(tl.float32)
        if GATED:
            gate_sum, up_sum = acc.reshape(2, BLOCK_N).permute(1, 0).split()
            y = activate(gate_sum, up_sum, ACT, LIMIT, ALPHA, BETA)
        else:
            y = activate_plain(acc, ACT)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(inner + pair.to(tl.int64) * I + n, y.to(inner.dtype.element_ty), mask=n < I)


@triton.jit(do_not_specialize=["pairs"])
def second_kernel(
    inner, topk_ids, topk_weights, w2, s2, z2, whole2, b2, parts, pairs,
    HELD: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BIAS: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
    CODE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, MX: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, G: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts[pair] = weight of pair * (inner[pair] @ w2[expert]^T + b2[expert])."""
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    pair, block = program % pairs, program // pairs
    expert = tl.load(topk_ids + pair).to(tl.int64)
    held = (expert >= 0) & (expert < HELD)
    if held:
        EACH: tl.constexpr = 4 if CODE == "int8" or CODE == "uint8" else 8
        SPAN: tl.constexpr = GROUP if GROUP > 0 else I
        WIDTH: tl.constexpr = I // 4 if inner.dtype.element_ty == tl.int64 else I
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        at = expert * H + tl.minimum(n, H - 1)
        scale_row = at * ((I + SPAN - 1) // SPAN)
        acc = _sums(
            inner + pair.to(tl.int64) * WIDTH, w2, s2, z2, at * (I // EACH), scale_row,
            I, CODE, GROUP, ZERO, MX, G, PREFETCH, PDL,
        )  # fmt: skip
        if GROUP == 0:
            acc *= tl.load(s2 + scale_row).to(tl.float32)
        if WHOLE:
            acc *= tl.load(whole2 + expert)
        if BIAS:
            acc += tl.load(b2 + at).to(tl.float32)
        if not WEIGHT_ON_INPUT:
            acc *= tl.load(topk_weights + pair)
        tl.store(parts + pair.to(tl.int64) * H + n, acc.to(parts.dtype.element_ty), mask=n < H)
    elif PDL:
        # A program with nothing to do waits too: the next kernel takes its end as the end of the first.
        gdc_wait()
