"""Scores of router logits, precise to about a bit: device functions on float32 blocks.

A GPU's fast exponential loses a bit for each doubling of its argument, and a score that rounds to another number can
turn a tie into a choice. These need no libdevice and give the same under Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """exp(x) for x <= 0 (other x give anything); below -104 it is 0, as float32 has it."""
    x = tl.where(x < -104.0, -104.0, x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts; the first has so few bits that its product with n is exact.
    r = (x - n * 0.693145751953125) - n * 1.4286068203094172e-6
    y = 1.0 / 5040.0
    y = y * r + 1.0 / 720.0
    y = y * r + 1.0 / 120.0
    y = y * r + 1.0 / 24.0
    y = y * r + 1.0 / 6.0
    y = y * r + 0.5
    y = y * r * r + r + 1.0
    # 2^n in two steps, so that a result below the normal numbers is rounded once.
    n = n.to(tl.int32)
    half = n >> 1
    return y * _power_of_two(half) * _power_of_two(n - half)


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), also close to 1 as near as float32 can."""
    e = exp(-tl.abs(x))
    small = tl.div_rn(e, 1.0 + e)
    return tl.where(x >= 0.0, 1.0 - small, small)


@triton.jit
def sqrt_softplus(x):
    """sqrt(log(1 + exp(x)))."""
    e = exp(-tl.abs(x))
    # log(1 + e) / e = 2 atanh(s) / e with s = e / (2 + e) <= 1/3: a series, which is precise for small e too.
    s = tl.div_rn(e, 2.0 + e)
    q = s * s
    y = 1.0 / 15.0
    y = y * q + 1.0 / 13.0
    y = y * q + 1.0 / 11.0
    y = y * q + 1.0 / 9.0
    y = y * q + 1.0 / 7.0
    y = y * q + 0.2
    y = y * q + 1.0 / 3.0
    ratio = tl.div_rn(2.0 + 2.0 * q * y, 2.0 + e)
    # exp(x) may be below the normal numbers where its square root is not.
    return tl.where(x < 0.0, exp(0.5 * x) * tl.sqrt_rn(ratio), tl.sqrt_rn(x + e * ratio))


@triton.jit
def tanh(x):
    """tanh(x); by its continued fraction where 1 - exp(-2x) would cancel."""
    q = x * x
    small = tl.div_rn(x, 1.0 + q / (3.0 + q / (5.0 + q / (7.0 + q / (9.0 + q / 11.0)))))
    e = exp(-2.0 * tl.abs(x))
    large = 1.0 - tl.div_rn(2.0 * e, 1.0 + e)
    return tl.where(tl.abs(x) < 0.55, small, tl.where(x < 0.0, -large, large))


@triton.jit
def softmax(x, mask):
    """Softmax along the last axis of [rows, columns], columns outside the mask left out."""
    x = tl.where(mask, x, float("-inf"))
    e = exp(x - tl.max(x, 1)[:, None])
    return tl.div_rn(e, tl.broadcast_to(tl.sum(tl.where(mask, e, 0.0), 1)[:, None], e.shape))


@triton.jit
def score(x, mask, SCORE: tl.constexpr):
    """Scores of [rows, columns] by the name of MoEConfig.scoring_func."""
    tl.static_assert(SCORE == "softmax" or SCORE == "sigmoid" or SCORE == "sqrtsoftplus", "unknown scoring_func")
    if SCORE == "softmax":
        out = softmax(x, mask)
    elif SCORE == "sigmoid":
        out = sigmoid(x)
    else:
        out = sqrt_softplus(x)
    return out


@triton.jit
def key_of(x):
    """int32 that orders like the float32: NaN above all, -0 equal to 0."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def value_of(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
