"""Experts for a handful of tokens, routed or shared: two launches, no sorting, no tensor cores.

One program owns a block of columns of one (token, expert) pair, so every SM streams weights even for one token. A dot
product on tensor cores would pad the row to sixteen; plain FMA keeps up with memory here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import finish

UNROLLED: int = 64
"""Chunks of the second product up to which its loop is unrolled, so that all loads are in flight at once."""


@triton.jit
def _id(topk_ids, at):
    # Without ids there is one expert, which serves everybody.
    if topk_ids is None:
        expert = at.to(tl.int64) * 0
    else:
        expert = tl.load(topk_ids + at).to(tl.int64)
    return expert


@triton.jit
def _weight(topk_weights, at):
    if topk_weights is None:
        weight = 1.0
    else:
        weight = tl.load(topk_weights + at)
    return weight


@triton.jit(do_not_specialize=["pairs"])
def first_kernel(
    x,
    topk_ids,
    topk_weights,
    w13,
    b13,
    inner,
    pairs,
    HELD: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ROW: tl.constexpr,
    UP: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    ACT: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # Behind the wait: the second product reads ids before it waits, so it must not begin before they are there.
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    pair, block = program % pairs, program // pairs
    expert = _id(topk_ids, pair)
    if (expert >= 0) & (expert < HELD):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        h = tl.arange(0, BLOCK_H)
        rows: tl.constexpr = 2 * I if GATED else I
        gate_at = w13 + expert * (rows * H) + (n * (ROW * H))[:, None] + h[None, :]
        # As wide as the tile: a row that is broadcast from one dimension costs a layout conversion in every chunk.
        x_at = x + (pair // K).to(tl.int64) * H + h[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
        gate_sum = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        up_sum = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        in_rows = (n < I)[:, None]
        for chunk in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
            at = chunk * BLOCK_H
            if (chunk + 1) * BLOCK_H <= H and I % BLOCK_N == 0:
                xv = tl.load(x_at + at).to(tl.float32)
                gate_sum += tl.load(gate_at + at, eviction_policy="evict_first").to(tl.float32) * xv
                if GATED:
                    up = tl.load(gate_at + (UP * H + at), eviction_policy="evict_first")
                    up_sum += up.to(tl.float32) * xv
            else:
                inside = in_rows & (h < H - at)[None, :]
                xv = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)
                gate = tl.load(gate_at + at, mask=inside, other=0.0, eviction_policy="evict_first")
                gate_sum += gate.to(tl.float32) * xv
                if GATED:
                    up = tl.load(gate_at + (UP * H + at), mask=inside, other=0.0, eviction_policy="evict_first")
                    up_sum += up.to(tl.float32) * xv
        weight = _weight(topk_weights, pair)
        y = finish(
            tl.sum(gate_sum, 1), tl.sum(up_sum, 1), weight, b13, expert * rows + n * ROW, n < I,
            GATED, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA,
        )  # fmt: skip
        if not WEIGHT_ON_INPUT:
            y *= weight
        tl.store(inner + pair.to(tl.int64) * I + n, y.to(inner.dtype.element_ty), mask=n < I)


@triton.jit
def _expert_of(topk_ids, token, chunk, HELD: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr):
    expert = _id(topk_ids, token * K + chunk // CHUNKS)
    held = (expert >= 0) & (expert < HELD)
    return tl.where(held, expert, 0), held


@triton.jit
def _inside(held, n, i, chunk, H: tl.constexpr, I: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr):
    # A mask that is the same for the whole tile leaves its loads as wide as they can be.
    mask = held
    if not EVEN:
        mask = held & (n < H)[:, None] & (i < I - (chunk % CHUNKS) * i.shape[0])[None, :]
    return mask


@triton.jit
def _weights_of(
    topk_ids, w2, token, chunk, n, i,
    HELD: tl.constexpr, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    expert, held = _expert_of(topk_ids, token, chunk, HELD, K, CHUNKS)
    at = w2 + expert * (H * I) + (n[:, None] * I + i[None, :]) + (chunk % CHUNKS) * i.shape[0]
    mask = _inside(held, n, i, chunk, H, I, CHUNKS, EVEN)
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inner_of(
    topk_ids, inner, token, chunk, n, i,
    HELD: tl.constexpr, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # What no expert wrote must not be read: it may be NaN, which a weight of zero does not silence.
    _, held = _expert_of(topk_ids, token, chunk, HELD, K, CHUNKS)
    row = token * K + chunk // CHUNKS
    at = inner + row * I + (chunk % CHUNKS) * i.shape[0] + i[None, :] + tl.zeros([n.shape[0], 1], tl.int32)
    return tl.load(at, mask=_inside(held, n, i, chunk, H, I, CHUNKS, EVEN), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def second_kernel(
    inner,
    x,
    topk_ids,
    topk_weights,
    w2,
    b2,
    out,
    tokens,
    HELD: tl.constexpr,
    ZERO_START: tl.constexpr,
    ZERO_STOP: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PREFETCH: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    token, block = (program % tokens).to(tl.int64), program // tokens
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_I)
    CHUNKS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    EVEN: tl.constexpr = H % BLOCK_N == 0 and I % BLOCK_I == 0
    acc = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
    # The weights do not depend on the first product: what fits into registers is on its way before it is awaited.
    fetched = ()
    for chunk in tl.static_range(PREFETCH):
        w = _weights_of(topk_ids, w2, token, chunk, n, i, HELD, H, I, K, CHUNKS, EVEN)
        fetched = fetched + (w,)  # noqa: RUF005 (Triton unpacks no tuples)
    if PDL:
        gdc_wait()
    if UNROLL:
        for chunk in tl.static_range(K * CHUNKS):
            if chunk < PREFETCH:
                w = fetched[chunk]
            else:
                w = _weights_of(topk_ids, w2, token, chunk, n, i, HELD, H, I, K, CHUNKS, EVEN)
            acc += w.to(tl.float32) * _inner_of(topk_ids, inner, token, chunk, n, i, HELD, H, I, K, CHUNKS, EVEN)
    else:
        for chunk in tl.range(0, K * CHUNKS):
            w = _weights_of(topk_ids, w2, token, chunk, n, i, HELD, H, I, K, CHUNKS, EVEN)
            acc += w.to(tl.float32) * _inner_of(topk_ids, inner, token, chunk, n, i, HELD, H, I, K, CHUNKS, EVEN)
    y = tl.sum(acc, 1)
    if BIAS or ZERO_STOP > ZERO_START:
        for k in tl.static_range(K):
            expert = _id(topk_ids, token * K + k)
            weight = _weight(topk_weights, token * K + k)
            if BIAS:
                held = (expert >= 0) & (expert < HELD)
                bias = tl.load(b2 + tl.where(held, expert, 0) * H + n, mask=(n < H) & held, other=0.0).to(tl.float32)
                y += bias if WEIGHT_ON_INPUT else bias * tl.where(held, weight, 0.0)
            if ZERO_STOP > ZERO_START:
                zero = (expert >= ZERO_START) & (expert < ZERO_STOP)
                xv = tl.load(x + token * H + n, mask=(n < H) & zero, other=0.0).to(tl.float32)
                y += xv * tl.where(zero, weight, 0.0)
    tl.store(out + token * H + n, (y * SCALE).to(out.dtype.element_ty), mask=n < H)
