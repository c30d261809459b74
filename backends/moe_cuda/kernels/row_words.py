"""Weights of four bits for a single row: read as in :mod:`few_words`, multiplied as in :mod:`mma_words`.

A warp reads 512 bytes of one row of weights at a time, sixteen a lane, because memory is fastest so. Four neighbouring
lanes hold a row of the tensor cores' product, so their 128 weights are one of its rows, and what those weights meet of
x is one of its columns. Of a product only the eight sums of a row with its own column are wanted, one of eight, but
nobody else wants the tensor cores, and a pair of weights then costs half of what it does in float32. A product's other
eight rows are those of a second row of weights: up beside gate in the first product, another column in the second.

x lies in shared memory by the pairs that weights are unpacked to, once for all warps of a program.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import activate
from .mma_words import factors, multiplied, paired

WARP = 1024
"""Columns of a row that a warp reads at a time."""
_WARP = gl.constexpr(WARP)


@gluon.jit
def _row_of(x, K: gl.constexpr, PAD: gl.constexpr, WARPS: gl.constexpr):
    # int32 [PAD, 4] of x [K // 2]: the eight values that a word of weights meets, 0 behind the last.
    ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    word = gl.arange(0, PAD, gl.SliceLayout(1, ROWS))[:, None]
    at = x + word * 4 + gl.arange(0, 4, gl.SliceLayout(0, ROWS))[None, :]
    return gl.load(at, mask=word < K // 8, other=0)


@gluon.jit
def _store_planes(raw, planes, PAD: gl.constexpr):
    # Four planes of one pair for each word, so that neighbouring lanes read neighbouring sixteen bytes.
    low, high = raw.reshape([PAD, 2, 2]).split()
    x0, x2 = low.split()
    x1, x3 = high.split()
    x0, x1, x2, x3 = paired(x0, x1, x2, x3)
    planes.slice(0 * PAD, PAD).store(x0)
    planes.slice(1 * PAD, PAD).store(x1)
    planes.slice(2 * PAD, PAD).store(x2)
    planes.slice(3 * PAD, PAD).store(x3)


@gluon.jit
def _plane(planes, at: gl.constexpr, HIGH: gl.constexpr, COLUMNS: gl.constexpr, WORDS: gl.constexpr):
    x = planes.slice(at, COLUMNS).load(gl.SliceLayout(0, WORDS))
    return gl.expand_dims(x, 0).broadcast_to([HIGH, COLUMNS])


@gluon.jit
def _words(at, step: gl.constexpr, K: gl.constexpr, COLUMNS: gl.constexpr):
    if (step + 1) * COLUMNS * 8 > K:
        c = gl.arange(0, COLUMNS, gl.SliceLayout(0, at.type.layout))
        mask = (c < K // 8 - step * COLUMNS)[None, :]
        words = gl.load(at + step * COLUMNS, mask=mask, other=0, eviction_policy="evict_first")
    else:
        words = gl.load(at + step * COLUMNS, eviction_policy="evict_first")
    return words


@gluon.jit
def _scales(at, g, step: gl.constexpr, K: gl.constexpr, SPAN: gl.constexpr, COLUMNS: gl.constexpr):
    first = step * COLUMNS * 8
    column = ((first + g) // SPAN)[None, :]
    return gl.load(at + column, mask=(first + g < K)[None, :], other=0)


@gluon.jit
def _sums(
    x, w, scale, base, n, K: gl.constexpr, LIMIT: gl.constexpr, ROW: gl.constexpr, A: gl.constexpr, B: gl.constexpr,
    UP: gl.constexpr, CODE: gl.constexpr, GROUP: gl.constexpr, MX: gl.constexpr, PAIRS: gl.constexpr,
    AHEAD: gl.constexpr, HIGH: gl.constexpr, WIDE: gl.constexpr, PAD: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """PAIRS times two float32 [HIGH]: rows of weights times x [K], by HIGH warps of rows and WIDE of their columns.

    x: int32, two bfloat16 each; w: int32, eight codes each. Columns n + j * A and n + j * A + B below LIMIT, of which a
    row each begins at base + column * ROW, and UP behind that for the latter, are the two of pair j. AHEAD: steps of
    pairs that are on their way at a time. WAIT: x is there only behind the wait.
    """
    COLUMNS: gl.constexpr = 128 * WIDE
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [HIGH, WIDE], [1, 0])
    LATE: gl.constexpr = GROUP > 0 and GROUP % 128 == 0
    EACH: gl.constexpr = 16 if LATE else 4
    OF_WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4] if LATE else [1, 32, 1], [HIGH, WIDE, 1], [2, 1, 0])
    SCALES: gl.constexpr = gl.SliceLayout(2, OF_WORDS)
    SPAN: gl.constexpr = GROUP if GROUP > 0 else K
    GROUPS: gl.constexpr = (K + SPAN - 1) // SPAN
    STEPS: gl.constexpr = (K + _WARP * WIDE - 1) // (_WARP * WIDE)
    UNITS: gl.constexpr = STEPS * PAIRS
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    planes = gl.allocate_shared_memory(gl.int32, [4 * PAD], SHARED)
    c = gl.arange(0, COLUMNS, gl.SliceLayout(0, WORDS))
    g = gl.arange(0, COLUMNS // EACH, gl.SliceLayout(0, SCALES)) * (EACH * 8)
    if not WAIT:
        raw = _row_of(x, K, PAD, HIGH * WIDE)
    at = ()
    for j in gl.static_range(PAIRS):
        # Columns behind the last read the last again, and are not stored.
        row_a = base + gl.minimum(n + j * A, LIMIT - 1) * ROW
        row_b = base + gl.minimum(n + (j * A + B), LIMIT - 1) * ROW + UP
        w_a, w_b = w + (row_a * (K // 8))[:, None] + c[None, :], w + (row_b * (K // 8))[:, None] + c[None, :]
        if GROUP > 0:
            s_a = scale + (gl.convert_layout(row_a, gl.SliceLayout(1, SCALES)) * GROUPS)[:, None]
            s_b = scale + (gl.convert_layout(row_b, gl.SliceLayout(1, SCALES)) * GROUPS)[:, None]
        else:
            s_a, s_b = gl.load(scale + row_a), gl.load(scale + row_b)
        at = at + (w_a, w_b, s_a, s_b)  # noqa: RUF005 (Triton unpacks no tuples)
    queue = ()
    for u in gl.static_range(AHEAD if AHEAD < UNITS else UNITS):  # noqa: FURB136 (Triton has no constexpr min)
        queue = queue + _unit(at, u % PAIRS, g, u // PAIRS, K, GROUP, SPAN, COLUMNS)
    if WAIT:
        gdc_wait()
        raw = _row_of(x, K, PAD, HIGH * WIDE)
    _store_planes(raw, planes, PAD)
    none = gl.zeros([HIGH, COLUMNS], gl.float32, WORDS)
    sums = ()
    for _ in gl.static_range(PAIRS):
        sums = sums + (none,)  # noqa: RUF005
    for step in gl.static_range(STEPS):
        x0 = _plane(planes, step * COLUMNS, HIGH, COLUMNS, WORDS)
        x1 = _plane(planes, PAD + step * COLUMNS, HIGH, COLUMNS, WORDS)
        x2 = _plane(planes, 2 * PAD + step * COLUMNS, HIGH, COLUMNS, WORDS)
        x3 = _plane(planes, 3 * PAD + step * COLUMNS, HIGH, COLUMNS, WORDS)
        new = ()
        for j in gl.static_range(PAIRS):
            if step * PAIRS + j + AHEAD < UNITS:
                queue = queue + _unit(at, (j + AHEAD) % PAIRS, g, step + (j + AHEAD) // PAIRS, K, GROUP, SPAN, COLUMNS)
            a, b, acc = queue[4 * (step * PAIRS + j)], queue[4 * (step * PAIRS + j) + 1], sums[j]
            if GROUP == 0:
                acc = multiplied(acc, a, b, x0, x1, x2, x3, a, b, CODE, False)
            else:
                factor_a = factors(queue[4 * (step * PAIRS + j) + 2], MX, EACH, HIGH, COLUMNS, WORDS)
                factor_b = factors(queue[4 * (step * PAIRS + j) + 3], MX, EACH, HIGH, COLUMNS, WORDS)
                if LATE:
                    part = multiplied(none, a, b, x0, x1, x2, x3, a, b, CODE, False)
                    acc += part * gl.where((c % 4 < 2)[None, :], factor_a, factor_b)
                else:
                    acc = multiplied(acc, a, b, x0, x1, x2, x3, factor_a, factor_b, CODE, True)
            new = new + (acc,)  # noqa: RUF005
        sums = new
    # Columns of acc are (eight rows of the product, lane of four, row a or b, one of the lane's two columns).
    mine = (c // 4 % 4) * 2 + c % 2 == c // 16 % 8
    mine_a, mine_b = (mine & (c % 4 < 2))[None, :], (mine & (c % 4 >= 2))[None, :]
    out = ()
    for j in gl.static_range(PAIRS):
        left, right = gl.sum(gl.where(mine_a, sums[j], 0.0), 1), gl.sum(gl.where(mine_b, sums[j], 0.0), 1)
        if GROUP == 0:
            left *= at[4 * j + 2].to(gl.float32)
            right *= at[4 * j + 3].to(gl.float32)
        out = out + (left, right)  # noqa: RUF005
    return out


@gluon.jit
def _unit(at, j: gl.constexpr, g, step: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, SPAN: gl.constexpr,
          COLUMNS: gl.constexpr):  # fmt: skip
    a, b = _words(at[4 * j], step, K, COLUMNS), _words(at[4 * j + 1], step, K, COLUMNS)
    if GROUP > 0:
        s_a, s_b = _scales(at[4 * j + 2], g, step, K, SPAN, COLUMNS), _scales(at[4 * j + 3], g, step, K, SPAN, COLUMNS)
    else:
        s_a, s_b = a, b
    return (a, b, s_a, s_b)


@gluon.jit(do_not_specialize=["pairs"])
def first_kernel(
    x, topk_ids, topk_weights, w13, s13, b13, inner, pairs,
    HELD: gl.constexpr, H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, ROW: gl.constexpr,
    UP: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr,
    ALPHA: gl.constexpr, BETA: gl.constexpr, CODE: gl.constexpr, GROUP: gl.constexpr, MX: gl.constexpr,
    PAIRS: gl.constexpr, AHEAD: gl.constexpr, HIGH: gl.constexpr, WIDE: gl.constexpr, PAD: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """inner[pair] = act(x[token of pair] @ w13[expert]^T) of gated experts; PAIRS * HIGH columns a program."""
    if PDL:
        # Behind the wait: the second product reads ids before it waits, so it must not begin before they are there.
        gdc_wait()
        gdc_launch_dependents()
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [HIGH, WIDE], [1, 0])
    pair, block = gl.program_id(0) % pairs, gl.program_id(0) // pairs
    expert = gl.load(topk_ids + pair).to(gl.int64)
    if (expert >= 0) & (expert < HELD):
        n = block * (PAIRS * HIGH) + gl.arange(0, HIGH, gl.SliceLayout(1, WORDS))
        base = expert * (2 * I)
        x_row = x + (pair // K).to(gl.int64) * (H // 2)
        found = _sums(
            x_row, w13, s13, base, n, H, I, ROW, HIGH, 0, UP, CODE, GROUP, MX, PAIRS, AHEAD, HIGH, WIDE, PAD, False
        )
        for j in gl.static_range(PAIRS):
            gate, up, column = found[2 * j], found[2 * j + 1], n + j * HIGH
            inside = column < I
            if WEIGHT_ON_INPUT:
                weight = gl.load(topk_weights + pair)
                gate *= weight
                up *= weight
            if BIAS:
                gate += gl.load(b13 + base + column * ROW, mask=inside, other=0.0).to(gl.float32)
                up += gl.load(b13 + base + column * ROW + UP, mask=inside, other=0.0).to(gl.float32)
            y = activate(gate, up, ACT, LIMIT, ALPHA, BETA)
            gl.store(inner + pair.to(gl.int64) * I + column, y.to(inner.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["pairs"])
def second_kernel(
    inner, topk_ids, topk_weights, w2, s2, b2, parts, pairs,
    HELD: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, CODE: gl.constexpr, GROUP: gl.constexpr, MX: gl.constexpr, PAIRS: gl.constexpr,
    AHEAD: gl.constexpr, HIGH: gl.constexpr, WIDE: gl.constexpr, PAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """parts[pair] = weight of pair * (inner[pair] @ w2[expert]^T + b2[expert]); 2 * PAIRS * HIGH columns a program."""
    if PDL:
        gdc_launch_dependents()
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [HIGH, WIDE], [1, 0])
    pair, block = gl.program_id(0) % pairs, gl.program_id(0) // pairs
    expert = gl.load(topk_ids + pair).to(gl.int64)
    if (expert >= 0) & (expert < HELD):
        n = block * (2 * PAIRS * HIGH) + gl.arange(0, HIGH, gl.SliceLayout(1, WORDS))
        base = expert * H
        x_row = inner + pair.to(gl.int64) * (I // 2)
        found = _sums(
            x_row, w2, s2, base, n, I, H, 1, 2 * HIGH, HIGH, 0, CODE, GROUP, MX, PAIRS, AHEAD, HIGH, WIDE, PAD, PDL
        )
        for j in gl.static_range(2 * PAIRS):
            y, column = found[j], n + j * HIGH
            inside = column < H
            if BIAS:
                y += gl.load(b2 + base + column, mask=inside, other=0.0).to(gl.float32)
            if not WEIGHT_ON_INPUT:
                y *= gl.load(topk_weights + pair)
            gl.store(parts + pair.to(gl.int64) * H + column, y.to(parts.dtype.element_ty), mask=inside)
    elif PDL:
        # A program with nothing to do waits too: the next kernel takes its end as the end of the first.
        gdc_wait()
