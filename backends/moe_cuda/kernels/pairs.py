"""Routed experts for some dozens of tokens: no sorting; each expert's weights are read once by one column of programs.

Of all (token, expert) pairs the first one of an expert leads: its program gathers the rows of all pairs of that expert,
sixteen at a time, and multiplies them on tensor cores. The other programs of that expert leave at once. Finding the
pairs costs each program a look at all ids, which is cheap up to some hundreds of them and saves every sorting launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import finish

ROWS: int = 16
"""Rows of one tile: the least that tl.dot takes."""
_ROWS = tl.constexpr(ROWS)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b in float32; UPCAST where Triton's interpreter multiplies bfloat16 wrongly."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def pair_and_block(program, pairs, BLOCKS: tl.constexpr, COLUMNS_FIRST: tl.constexpr):
    """Which pair and which block of columns a program has: neighbours share a pair, or a block."""
    if COLUMNS_FIRST:
        block, pair = program % BLOCKS, program // BLOCKS
    else:
        pair, block = program % pairs, program // pairs
    return pair, block


@triton.jit
def _led(topk_ids, pair, pairs, HELD: tl.constexpr, ALL: tl.constexpr):
    # The expert of this pair, which pairs share it, each one's rank among them, and whether this one comes first.
    p = tl.arange(0, ALL)
    ids = tl.load(topk_ids + p, mask=p < pairs, other=-1)
    expert = tl.load(topk_ids + pair)
    same = ids == expert
    leads = (tl.min(tl.where(same, p, ALL), 0) == pair) & (expert >= 0) & (expert < HELD)
    return expert.to(tl.int64), p, same, tl.cumsum(same.to(tl.int32), 0) - 1, leads


@triton.jit
def _rows_at(first, p, same, rank):
    j = first + tl.arange(0, _ROWS)
    chosen = (rank[None, :] == j[:, None]) & same[None, :]
    return tl.sum(tl.where(chosen, p[None, :], 0), 1)


@triton.jit(do_not_specialize=["pairs"])
def first_kernel(
    x,
    topk_ids,
    topk_weights,
    w13,
    b13,
    inner,
    pairs,
    ALL: tl.constexpr,
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
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # Behind the wait: the second product reads ids before it waits, so it must not begin before they are there.
        gdc_wait()
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    pair, block = pair_and_block(tl.program_id(0), pairs, BLOCKS, COLUMNS_FIRST)
    expert, p, same, rank, leads = _led(topk_ids, pair, pairs, HELD, ALL)
    if leads:
        count = tl.sum(same.to(tl.int32), 0)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        h = tl.arange(0, BLOCK_K)
        rows: tl.constexpr = 2 * I if GATED else I
        # Columns behind the last read the last again, and are not stored: a load without a mask is a faster one.
        safe = tl.minimum(n, I - 1)
        gate_at = w13 + expert * (rows * H) + (safe * (ROW * H))[None, :] + h[:, None]
        first = 0
        while first < count:
            here = first + tl.arange(0, _ROWS) < count
            slot = _rows_at(first, p, same, rank)
            x_at = x + (slot // K).to(tl.int64)[:, None] * H + h[None, :]
            gate_sum = tl.zeros([_ROWS, BLOCK_N], tl.float32)
            up_sum = tl.zeros([_ROWS, BLOCK_N], tl.float32)
            for at in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                if H % BLOCK_K == 0:
                    a = tl.load(x_at + at, mask=here[:, None], other=0.0)
                    gate = tl.load(gate_at + at)
                    if GATED:
                        up = tl.load(gate_at + UP * H + at)
                else:
                    left = h < H - at
                    a = tl.load(x_at + at, mask=here[:, None] & left[None, :], other=0.0)
                    gate = tl.load(gate_at + at, mask=left[:, None], other=0.0)
                    if GATED:
                        up = tl.load(gate_at + UP * H + at, mask=left[:, None], other=0.0)
                gate_sum = dot(a, gate, gate_sum, UPCAST)
                if GATED:
                    up_sum = dot(a, up, up_sum, UPCAST)
            weight = 1.0
            if WEIGHT_ON_INPUT:
                weight = tl.load(topk_weights + slot, mask=here, other=0.0)[:, None]
            y = finish(
                gate_sum, up_sum, weight, b13, (expert * rows + safe * ROW)[None, :], (n < I)[None, :],
                GATED, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA,
            )  # fmt: skip
            to = inner + slot.to(tl.int64)[:, None] * I + n[None, :]
            tl.store(to, y.to(inner.dtype.element_ty), mask=here[:, None] & (n < I)[None, :])
            first += _ROWS


@triton.jit(do_not_specialize=["pairs"])
def second_kernel(
    inner,
    topk_ids,
    topk_weights,
    w2,
    b2,
    parts,
    pairs,
    ALL: tl.constexpr,
    HELD: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
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
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        i = tl.arange(0, BLOCK_K)
        safe = tl.minimum(n, H - 1)
        w_at = w2 + expert * (H * I) + (safe * I)[None, :] + i[:, None]
        first = 0
        while first < count:
            here = first + tl.arange(0, _ROWS) < count
            slot = _rows_at(first, p, same, rank)
            inner_at = inner + slot.to(tl.int64)[:, None] * I + i[None, :]
            acc = tl.zeros([_ROWS, BLOCK_N], tl.float32)
            for at in tl.range(0, I, BLOCK_K, num_stages=STAGES):
                if I % BLOCK_K == 0:
                    a = tl.load(inner_at + at, mask=here[:, None], other=0.0)
                    w = tl.load(w_at + at)
                else:
                    left = i < I - at
                    a = tl.load(inner_at + at, mask=here[:, None] & left[None, :], other=0.0)
                    w = tl.load(w_at + at, mask=left[:, None], other=0.0)
                acc = dot(a, w, acc, UPCAST)
            if BIAS:
                acc += tl.load(b2 + expert * H + safe).to(tl.float32)[None, :]
            if not WEIGHT_ON_INPUT:
                acc *= tl.load(topk_weights + slot, mask=here, other=0.0)[:, None]
            to = parts + slot.to(tl.int64)[:, None] * H + n[None, :]
            tl.store(to, acc.to(parts.dtype.element_ty), mask=here[:, None] & (n < H)[None, :])
            first += _ROWS
