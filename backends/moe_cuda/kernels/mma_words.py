"""Weights of four bits for some dozens of pairs: from memory to registers to tensor cores, not by shared memory.

A product of 16 x 8 x 16 (``mma.sync``) takes sixteen rows of weights and eight tokens. Four lanes hold a row of it, and
which columns they hold is free, as long as weights and tokens agree: a sum has no order. So each lane reads sixteen
bytes of its row, 32 weights, makes pairs of bfloat16 of them where they are, and reads the 32 values of x that they
meet. Two rows lie in one product: gate and up of a column in the first, two columns of the result in the second.

As in :mod:`moe_cuda.kernels.pairs` the first pair of an expert leads, and its programs do all pairs of that expert.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import finish
from .pairs import pair_and_block

TOKENS = 8
"""Pairs of one expert in a product."""
LANE = 32
"""Weights that a lane reads at a time."""
CHUNK = 4 * LANE
"""Columns of a row that its four lanes read at a time."""
_TOKENS, _LANE, _CHUNK = gl.constexpr(TOKENS), gl.constexpr(LANE), gl.constexpr(CHUNK)


def _codes(decode: str, factors: bool) -> str:
    # Of four words a row and two rows; $0-$3 are the sums that leave and $4-$7 those that come, $8-$11 and $12-$15 the
    # words, $16-$31 x by its pairs, $32-$35 and $36-$39 the factors of both rows.
    lines = [".reg .f32 c<4>;", ".reg .b32 a<4>, b<4>, m, v, power;", "mov.b32 power, 0x7e807e80;"]
    lines += [f"mov.f32 c{i}, ${4 + i};" for i in range(4)]
    for word in range(4):
        for side, first, factor in (("a", 8, 32), ("b", 12, 36)):
            lines += decode.replace("W", f"${first + word}").replace("TO", side).split("\n")
            if factors:
                lines += [f"mul.rn.bf16x2 {side}{i}, {side}{i}, ${factor + word};" for i in range(4)]
        for half in range(2):
            left, right = 2 * half, 2 * half + 1
            x = 16 + word
            lines.append(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {c0, c1, c2, c3}, "
                f"{{a{left}, b{left}, a{right}, b{right}}}, {{${x + 4 * left}, ${x + 4 * right}}}, {{c0, c1, c2, c3}};"
            )
    lines += [f"mov.f32 ${i}, c{i};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


# Codes i and i + 4 of a word are a pair. An e2m1 code in the last bits of a bfloat16's exponent and the first of its
# mantissa is its number times 2 ** -126; the product puts a copy of the code at the sign's place and one there.
_HALF = """and.b32 m, FROM, 0x000f000f;
mul.lo.u32 m, m, 4160;
and.b32 m, m, 0x81c081c0;
mul.rn.bf16x2 FIRST, m, power;
and.b32 m, FROM, 0x00f000f0;
mul.lo.u32 m, m, 260;
and.b32 m, m, 0x81c081c0;
mul.rn.bf16x2 SECOND, m, power;"""
_E2M1 = "\nshr.b32 v, W, 8;\n".join(
    _HALF.replace("FROM", source).replace("FIRST", first).replace("SECOND", second)
    for source, first, second in (("W", "TO0", "TO1"), ("v", "TO2", "TO3"))
)
# 0x4300 | q is 128 + q as a bfloat16, and 0x4308 is 136.
_INT4 = "mov.b32 v, 0x43084308;\n" + "\n".join(
    (f"shr.b32 m, W, {4 * i};\n" if i else "")
    + f"lop3.b32 m, {'m' if i else 'W'}, 0x000f000f, 0x43004300, 0xEA;\nsub.rn.bf16x2 TO{i}, m, v;"
    for i in range(4)
)
_IN = ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 24)
_CONSTRAINTS, _WITH_FACTORS = gl.constexpr(_IN), gl.constexpr(_IN + ",r" * 8)
_SUM_E2M1, _SUM_INT4 = gl.constexpr(_codes(_E2M1, False)), gl.constexpr(_codes(_INT4, False))
_SUM_E2M1_TIMES, _SUM_INT4_TIMES = gl.constexpr(_codes(_E2M1, True)), gl.constexpr(_codes(_INT4, True))
# x0 x1, x2 x3, x4 x5, x6 x7 to x0 x4, x1 x5, x2 x6, x3 x7.
_PAIRS = gl.constexpr(
    "prmt.b32 $0, $4, $6, 0x5410; prmt.b32 $1, $4, $6, 0x7632; "
    "prmt.b32 $2, $5, $7, 0x5410; prmt.b32 $3, $5, $7, 0x7632;"
)


@gluon.jit
def paired(x0, x1, x2, x3):
    """What the four pairs of a word of weights meet, int32 of two bfloat16 each, from its eight values in order."""
    return gl.inline_asm_elementwise(
        _PAIRS, "=r,=r,=r,=r,r,r,r,r", [x0, x1, x2, x3], (gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _x_pairs(x_at, left, MASKED: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WORDS: gl.constexpr):
    # Four int32 [ROWS, COLUMNS]: the pairs of x that the four pairs of each word of weights meet.
    if MASKED:
        c = gl.arange(0, 4 * COLUMNS, gl.SliceLayout(0, x_at.type.layout))
        x = gl.load(x_at, mask=(c < left)[None, :], other=0)
    else:
        x = gl.load(x_at)
    low, high = x.reshape([ROWS, COLUMNS, 2, 2]).split()
    x0, x2 = low.split()
    x1, x3 = high.split()
    x0, x1 = gl.convert_layout(x0, WORDS), gl.convert_layout(x1, WORDS)
    x2, x3 = gl.convert_layout(x2, WORDS), gl.convert_layout(x3, WORDS)
    return paired(x0, x1, x2, x3)


@gluon.jit
def _words(at, left, MASKED: gl.constexpr, COLUMNS: gl.constexpr):
    if MASKED:
        c = gl.arange(0, COLUMNS, gl.SliceLayout(0, at.type.layout))
        words = gl.load(at, mask=(c < left)[None, :], other=0, eviction_policy="evict_first")
    else:
        words = gl.load(at, eviction_policy="evict_first")
    return words


@gluon.jit
def _sums(
    x, w, scale, row_a, row_b, x_row, K: gl.constexpr, CODE: gl.constexpr, GROUP: gl.constexpr, MX: gl.constexpr,
    CHUNKS: gl.constexpr, HIGH: gl.constexpr, WIDE: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """float32 [8 * HIGH, 8] of rows a and of rows b times TOKENS rows of x, by HIGH warps of rows and WIDE of columns.

    x: int32, two bfloat16 each; w: int32, eight codes each. row_a, row_b [8 * HIGH] number the rows of weights, x_row
    [8 * HIGH] says where the row of x begins that column i % 8 of the product has. CHUNKS: of all warps, in a step.
    """
    ROWS: gl.constexpr = 8 * HIGH
    COLUMNS: gl.constexpr = 16 * CHUNKS
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [HIGH, WIDE], [1, 0])
    X: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [HIGH, WIDE], [1, 0])
    LATE: gl.constexpr = GROUP == 0 or GROUP % _CHUNK == 0
    EACH: gl.constexpr = 16 if LATE else 4
    OF_WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 1, 4] if LATE else [8, 4, 1], [HIGH, WIDE, 1], [2, 1, 0])
    SCALES: gl.constexpr = gl.SliceLayout(2, OF_WORDS)
    SPAN: gl.constexpr = GROUP if GROUP > 0 else K
    GROUPS: gl.constexpr = (K + SPAN - 1) // SPAN
    STEPS: gl.constexpr = (K + _CHUNK * CHUNKS - 1) // (_CHUNK * CHUNKS)
    MASKED: gl.constexpr = K % (_CHUNK * CHUNKS) != 0
    c = gl.arange(0, COLUMNS, gl.SliceLayout(0, WORDS))
    a_at = w + (gl.convert_layout(row_a, gl.SliceLayout(1, WORDS)) * (K // 8))[:, None] + c[None, :]
    b_at = w + (gl.convert_layout(row_b, gl.SliceLayout(1, WORDS)) * (K // 8))[:, None] + c[None, :]
    x_at = x + gl.convert_layout(x_row, gl.SliceLayout(1, X))[:, None]
    x_at = x_at + gl.arange(0, 4 * COLUMNS, gl.SliceLayout(0, X))[None, :]
    # The group of the first of so many columns; the SPAN of one that is late may be several chunks.
    g = gl.arange(0, COLUMNS // EACH, gl.SliceLayout(0, SCALES)) * (EACH * 8)
    scale_a = scale + (gl.convert_layout(row_a, gl.SliceLayout(1, SCALES)) * GROUPS)[:, None]
    scale_b = scale + (gl.convert_layout(row_b, gl.SliceLayout(1, SCALES)) * GROUPS)[:, None]
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, WORDS)
    words_a = _words(a_at, K // 8, MASKED, COLUMNS)
    words_b = _words(b_at, K // 8, MASKED, COLUMNS)
    if WAIT:
        gdc_wait()
    for step in range(STEPS):
        at = step * (_CHUNK * CHUNKS)
        following = gl.minimum(at + _CHUNK * CHUNKS, (STEPS - 1) * (_CHUNK * CHUNKS))
        next_a = _words(a_at + following // 8, (K - following) // 8, MASKED, COLUMNS)
        next_b = _words(b_at + following // 8, (K - following) // 8, MASKED, COLUMNS)
        if GROUP > 0:
            column = ((at + g) // SPAN)[None, :]
            here = (at + g < K)[None, :]
            factor_a = gl.load(scale_a + column, mask=here, other=0)
            factor_a = factors(factor_a, MX, EACH, ROWS, COLUMNS, WORDS)
            factor_b = gl.load(scale_b + column, mask=here, other=0)
            factor_b = factors(factor_b, MX, EACH, ROWS, COLUMNS, WORDS)
        x0, x1, x2, x3 = _x_pairs(x_at + at // 2, (K - at) // 2, MASKED, ROWS, COLUMNS, WORDS)
        if GROUP == 0:
            acc = multiplied(acc, words_a, words_b, x0, x1, x2, x3, words_a, words_b, CODE, False)
        elif LATE:
            none = gl.zeros([ROWS, COLUMNS], gl.float32, WORDS)
            part = multiplied(none, words_a, words_b, x0, x1, x2, x3, words_a, words_b, CODE, False)
            acc += part * gl.where((c % 4 < 2)[None, :], factor_a, factor_b)
        else:
            acc = multiplied(acc, words_a, words_b, x0, x1, x2, x3, factor_a, factor_b, CODE, True)
        words_a, words_b = next_a, next_b
    # Columns of acc are (chunk, lane, row a or b, one of the lane's two tokens).
    acc = gl.sum(acc.reshape([ROWS, CHUNKS, 4, 2, 2]), 1)
    left, right = acc.permute([0, 1, 3, 2]).split()
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [HIGH, WIDE], [1, 0])
    left = gl.convert_layout(left.reshape([ROWS, 8]), OUT)
    right = gl.convert_layout(right.reshape([ROWS, 8]), OUT)
    if GROUP == 0:
        left *= gl.load(scale + gl.convert_layout(row_a, gl.SliceLayout(1, OUT))).to(gl.float32)[:, None]
        right *= gl.load(scale + gl.convert_layout(row_b, gl.SliceLayout(1, OUT))).to(gl.float32)[:, None]
    return left, right


@gluon.jit
def factors(stored, MX: gl.constexpr, EACH: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
            WORDS: gl.constexpr):  # fmt: skip
    """A scale for EACH words to one for each, [ROWS, COLUMNS]: int32 of two bfloat16, or float32 where EACH is a row of
    a product."""
    if MX:
        code = stored.to(gl.int32)
        # 2 ** (code - 127): code 0 is half the smallest normal number and 255 is NaN.
        half = gl.maximum(code << 7, 0x40) | ((code + 1) >> 8 << 6)
        out = half * 65537
    elif EACH == 4:
        half = stored.to(gl.float32).to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
        out = half * 65537
    else:
        out = stored.to(gl.float32)
    out = gl.expand_dims(out, 2).broadcast_to([ROWS, COLUMNS // EACH, EACH]).reshape([ROWS, COLUMNS])
    return gl.convert_layout(out, WORDS)


@gluon.jit
def multiplied(acc, a, b, x0, x1, x2, x3, factor_a, factor_b, CODE: gl.constexpr, TIMES: gl.constexpr):
    if TIMES:
        if CODE == "e2m1":
            out = gl.inline_asm_elementwise(
                _SUM_E2M1_TIMES, _WITH_FACTORS, [acc, a, b, x0, x1, x2, x3, factor_a, factor_b], gl.float32,
                is_pure=True, pack=4,
            )  # fmt: skip
        else:
            out = gl.inline_asm_elementwise(
                _SUM_INT4_TIMES, _WITH_FACTORS, [acc, a, b, x0, x1, x2, x3, factor_a, factor_b], gl.float32,
                is_pure=True, pack=4,
            )  # fmt: skip
    elif CODE == "e2m1":
        out = gl.inline_asm_elementwise(
            _SUM_E2M1, _CONSTRAINTS, [acc, a, b, x0, x1, x2, x3], gl.float32, is_pure=True, pack=4
        )
    else:
        out = gl.inline_asm_elementwise(
            _SUM_INT4, _CONSTRAINTS, [acc, a, b, x0, x1, x2, x3], gl.float32, is_pure=True, pack=4
        )
    return out


@gluon.jit
def _least(p, same, above, ALL: gl.constexpr):
    # The first pair behind ``above`` that has this expert; ALL where there is none.
    return gl.min(gl.where(same & (p > above), p, ALL), 0)


@gluon.jit
def _led(topk_ids, pair, pairs, HELD: gl.constexpr, ALL: gl.constexpr, WARPS: gl.constexpr):
    # Each warp looks at all ids.
    p = gl.arange(0, ALL, gl.BlockedLayout([ALL // 32], [32], [WARPS], [0]))
    ids = gl.load(topk_ids + p, mask=p < pairs, other=-1)
    expert = gl.load(topk_ids + pair)
    same = ids == expert
    leads = (_least(p, same, -1, ALL) == pair) & (expert >= 0) & (expert < HELD)
    return expert, p, same, leads


@gluon.jit
def _slots(p, same, above, of_row, of_column, ALL: gl.constexpr):
    """The next TOKENS pairs of an expert by rows % 8 and by columns of a product, and the last of them."""
    by_row, by_column = of_row * 0 + ALL, of_column * 0 + ALL
    for j in gl.static_range(_TOKENS):
        above = _least(p, same, above, ALL)
        by_row = gl.where(of_row % _TOKENS == j, above, by_row)
        by_column = gl.where(of_column == j, above, by_column)
    return by_row, by_column, above


@gluon.jit(do_not_specialize=["pairs"])
def first_kernel(
    x, topk_ids, topk_weights, w13, s13, b13, inner, pairs,
    ALL: gl.constexpr, HELD: gl.constexpr, H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, ROW: gl.constexpr,
    UP: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, ACT: gl.constexpr, LIMIT: gl.constexpr,
    ALPHA: gl.constexpr, BETA: gl.constexpr, CODE: gl.constexpr, GROUP: gl.constexpr, MX: gl.constexpr,
    CHUNKS: gl.constexpr, HIGH: gl.constexpr, WIDE: gl.constexpr, COLUMNS_FIRST: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """inner[pair] = act(x[token of pair] @ w13[expert]^T) of gated experts; 8 * HIGH columns a program."""
    if PDL:
        # Behind the wait: the second product reads ids before it waits, so it must not begin before they are there.
        gdc_wait()
        gdc_launch_dependents()
    BLOCK_N: gl.constexpr = 8 * HIGH
    BLOCKS: gl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [HIGH, WIDE], [1, 0])
    pair, block = pair_and_block(gl.program_id(0), pairs, BLOCKS, COLUMNS_FIRST)
    expert, p, same, leads = _led(topk_ids, pair, pairs, HELD, ALL, HIGH * WIDE)
    if leads:
        i, column = gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT)), gl.arange(0, _TOKENS, gl.SliceLayout(0, OUT))
        n = block * BLOCK_N + i
        # Columns behind the last read the last again, and are not stored.
        row = expert.to(gl.int64) * (2 * I) + gl.minimum(n, I - 1) * ROW
        above = pair - 1
        more = pair
        while more < ALL:
            by_row, slot, above = _slots(p, same, above, i, column, ALL)
            # Where there is no further pair, the first one's row is read.
            token = gl.where(by_row < ALL, by_row, more) // K
            gate, up = _sums(
                x, w13, s13, row, row + UP, token.to(gl.int64) * (H // 2), H, CODE, GROUP, MX, CHUNKS, HIGH, WIDE,
                False,
            )  # fmt: skip
            here = slot < ALL
            weight = 1.0
            if WEIGHT_ON_INPUT:
                weight = gl.load(topk_weights + slot, mask=here, other=0.0)[None, :]
            y = finish(
                gate, up, weight, b13, row[:, None], (n < I)[:, None],
                True, UP, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA,
            )  # fmt: skip
            to = inner + slot.to(gl.int64)[None, :] * I + n[:, None]
            gl.store(to, y.to(inner.dtype.element_ty), mask=here[None, :] & (n < I)[:, None])
            more = _least(p, same, above, ALL)


@gluon.jit(do_not_specialize=["pairs"])
def second_kernel(
    inner, topk_ids, topk_weights, w2, s2, b2, parts, pairs,
    ALL: gl.constexpr, HELD: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, CODE: gl.constexpr, GROUP: gl.constexpr, MX: gl.constexpr, CHUNKS: gl.constexpr,
    HIGH: gl.constexpr, WIDE: gl.constexpr, COLUMNS_FIRST: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """parts[pair] = weight of pair * (inner[pair] @ w2[expert]^T + b2[expert]); 16 * HIGH columns a program."""
    if PDL:
        gdc_launch_dependents()
    HALF: gl.constexpr = 8 * HIGH
    BLOCKS: gl.constexpr = (H + 2 * HALF - 1) // (2 * HALF)
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [HIGH, WIDE], [1, 0])
    pair, block = pair_and_block(gl.program_id(0), pairs, BLOCKS, COLUMNS_FIRST)
    expert, p, same, leads = _led(topk_ids, pair, pairs, HELD, ALL, HIGH * WIDE)
    if leads:
        i, column = gl.arange(0, HALF, gl.SliceLayout(1, OUT)), gl.arange(0, _TOKENS, gl.SliceLayout(0, OUT))
        n = block * (2 * HALF) + i
        row = expert.to(gl.int64) * H
        row_a, row_b = row + gl.minimum(n, H - 1), row + gl.minimum(n + HALF, H - 1)
        above = pair - 1
        more = pair
        while more < ALL:
            by_row, slot, above = _slots(p, same, above, i, column, ALL)
            x_row = gl.where(by_row < ALL, by_row, more).to(gl.int64) * (I // 2)
            left, right = _sums(inner, w2, s2, row_a, row_b, x_row, I, CODE, GROUP, MX, CHUNKS, HIGH, WIDE, PDL)
            here = slot < ALL
            if BIAS:
                left += gl.load(b2 + row_a).to(gl.float32)[:, None]
                right += gl.load(b2 + row_b).to(gl.float32)[:, None]
            if not WEIGHT_ON_INPUT:
                weight = gl.load(topk_weights + slot, mask=here, other=0.0)[None, :]
                left *= weight
                right *= weight
            to = parts + slot.to(gl.int64)[None, :] * H + n[:, None]
            gl.store(to, left.to(parts.dtype.element_ty), mask=here[None, :] & (n < H)[:, None])
            gl.store(to + HALF, right.to(parts.dtype.element_ty), mask=here[None, :] & (n + HALF < H)[:, None])
            more = _least(p, same, above, ALL)
    elif PDL:
        # A program with nothing to do waits too: the next kernel takes its end as the end of the first.
        gdc_wait()
