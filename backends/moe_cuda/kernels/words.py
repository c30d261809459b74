"""Weights stored as 16-bit words of four (or two) codes, and their scales, as blocks of numbers in registers."""

from __future__ import annotations

import triton
import triton.language as tl

# Two words at a time. 0x4300 | q is 128 + q as a bfloat16; zero comes as 128 + z.
INT4 = tl.constexpr("""{
.reg .b32 t;
lop3.b32 t, $4, 0x000f000f, 0x43004300, 0xEA;
sub.rn.bf16x2 t, t, $5;
mul.rn.bf16x2 $0, t, $6;
shr.b32 t, $4, 4;
lop3.b32 t, t, 0x000f000f, 0x43004300, 0xEA;
sub.rn.bf16x2 t, t, $5;
mul.rn.bf16x2 $1, t, $6;
shr.b32 t, $4, 8;
lop3.b32 t, t, 0x000f000f, 0x43004300, 0xEA;
sub.rn.bf16x2 t, t, $5;
mul.rn.bf16x2 $2, t, $6;
shr.b32 t, $4, 12;
lop3.b32 t, t, 0x000f000f, 0x43004300, 0xEA;
sub.rn.bf16x2 t, t, $5;
mul.rn.bf16x2 $3, t, $6;
}""")
# An e2m1 code in the exponent's and the mantissa's last bits of a bfloat16 is its number times 2 ** -126.
E2M1 = tl.constexpr("""{
.reg .b32 s, t, power;
mov.b32 power, 0x7e807e80;
shl.b32 s, $4, 12;
and.b32 s, s, 0x80008000;
shl.b32 t, $4, 6;
lop3.b32 t, t, 0x01c001c0, s, 0xEA;
mul.rn.bf16x2 t, t, power;
mul.rn.bf16x2 $0, t, $5;
shl.b32 s, $4, 8;
and.b32 s, s, 0x80008000;
shl.b32 t, $4, 2;
lop3.b32 t, t, 0x01c001c0, s, 0xEA;
mul.rn.bf16x2 t, t, power;
mul.rn.bf16x2 $1, t, $5;
shl.b32 s, $4, 4;
and.b32 s, s, 0x80008000;
shr.b32 t, $4, 2;
lop3.b32 t, t, 0x01c001c0, s, 0xEA;
mul.rn.bf16x2 t, t, power;
mul.rn.bf16x2 $2, t, $5;
and.b32 s, $4, 0x80008000;
shr.b32 t, $4, 6;
lop3.b32 t, t, 0x01c001c0, s, 0xEA;
mul.rn.bf16x2 t, t, power;
mul.rn.bf16x2 $3, t, $5;
}""")


@triton.jit
def _number(q, CODE: tl.constexpr):
    # float32 of a code in the lower bits of an int32.
    if CODE == "e2m1":
        bits = ((q & 7) << 22) | ((q & 8) << 28)
        out = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126
    elif CODE == "int8":
        out = ((q & 255) ^ 128).to(tl.float32) - 128.0
    elif CODE == "uint8":
        out = (q & 255).to(tl.float32)
    else:
        out = (q & 15).to(tl.float32)
    return out


@triton.jit
def as_words(scale, WORDS: tl.constexpr):
    # [rows, groups] to one for each of WORDS words of a row.
    rows: tl.constexpr = scale.shape[0]
    groups: tl.constexpr = scale.shape[1]
    return tl.broadcast_to(scale[:, :, None], (rows, groups, WORDS // groups)).reshape(rows, WORDS)


@triton.jit
def numbers(words, scale, zero, like, i: tl.constexpr, CODE: tl.constexpr, SCALED: tl.constexpr, UPCAST: tl.constexpr):
    # The i-th weights of all words, in the dtype of ``like``; float32 where the interpreter would cut them off.
    BITS: tl.constexpr = 8 if CODE == "int8" or CODE == "uint8" else 4
    value = _number(words.to(tl.int32) >> (BITS * i), CODE) - zero
    if SCALED:
        value *= scale
    if not UPCAST:
        value = value.to(like.dtype)
    return value


@triton.jit
def stored_tile(scale_at, row_at, columns, first, GROUPS: tl.constexpr):
    # [rows, GROUPS] as stored, of groups first, first + 1 ... of each row; beyond the last 0, as padding has it.
    g = first + tl.arange(0, GROUPS)
    at = scale_at + row_at[:, None] + g[None, :]
    if scale_at.dtype.element_ty.is_floating():
        stored = tl.load(at, mask=(g < columns)[None, :], other=0.0)
    else:
        stored = tl.load(at, mask=(g < columns)[None, :], other=0)
    return stored


@triton.jit
def scale_of(stored, MX: tl.constexpr):
    if MX:
        # 2 ** (code - 127): the code is the exponent's field, but that 0 is half the smallest and 255 is NaN.
        code = stored.to(tl.int32)
        bits = tl.maximum(code << 23, 0x400000) | ((code + 1) >> 8 << 22)
        out = bits.to(tl.float32, bitcast=True)
    else:
        out = stored.to(tl.float32)
    return out
