"""Router logits, hidden states times the gate's weight, in float32 arithmetic.

Products of 16-bit numbers are exact in float32, so tensor cores serve them without loss. The sum over H is split among
programs, since one row has too few of them to fill a GPU; the router sums the parts where it reads them, in order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ..launch import Kernel


@dataclass(frozen=True)
class Split:
    """How one product is cut: blocks of tokens, experts and H, and parts of the sum over H."""

    tokens: int
    experts: int
    hidden: int
    parts: int


FEW = 4
"""Up to so many tokens a row is summed without tensor cores, which would compute 16 rows."""
UNROLLED = 4
"""Most chunks of H in one program for few tokens: their loads are all under way at once, in registers."""
PROGRAMS = 128
"""Into how many programs a product is split where it has fewer blocks: about one for each multiprocessor of a large
GPU."""
MOST_PARTS = 16
"""More parts are not worth their way through memory; the router holds all of a row's in registers."""


def split_for(tokens: int, experts: int, hidden: int, upcast: bool) -> Split:
    """A cut by shape and arithmetic alone, so that equal calls give equal bits."""
    width = triton.next_power_of_2(experts)
    if tokens <= FEW:
        block_t, block_e, block_h = 1, 4, min(512, triton.next_power_of_2(hidden))
    else:
        block_t = min(64, max(16, triton.next_power_of_2(tokens)))
        most = 16 if tokens <= 16 else 32 if tokens <= 256 else 64 if tokens <= 1024 or upcast else 128
        block_e, block_h = max(16, min(most, width)), 32 if upcast else 64
    blocks = triton.cdiv(max(tokens, 1), block_t) * triton.cdiv(experts, block_e)
    chunks = triton.cdiv(hidden, block_h)
    each = triton.cdiv(chunks, max(1, min(chunks, MOST_PARTS, PROGRAMS // blocks)))
    if tokens <= FEW:
        each = min(each, UNROLLED)
    return Split(block_t, block_e, block_h, triton.cdiv(chunks, each))


def takes_float32(hidden_states: Tensor, gate_weight: Tensor) -> bool:
    """Whether products need float32 operands: tensor cores take two of one 16-bit dtype."""
    return hidden_states.dtype is not gate_weight.dtype or hidden_states.dtype is torch.float32


def logits_parts(hidden_states: Tensor, gate_weight: Tensor, pdl: bool = False) -> Tensor:
    """[S, T, E] float32 parts of hidden_states @ gate_weight^T, whose sum over S in order is the logits.

    Args:
        hidden_states: [T, H], gate_weight: [E, H]; float16, bfloat16 or float32, each its own.
        pdl: the next kernel may be launched before this one has ended (programmatic dependent launch).
    """
    (tokens, hidden), experts = hidden_states.shape, gate_weight.shape[0]
    # Triton's interpreter cannot multiply bfloat16; products are the same numbers either way.
    upcast = takes_float32(hidden_states, gate_weight) or triton.knobs.runtime.interpret
    split, kernel = _kernel(tokens, experts, hidden, upcast, pdl)
    parts = torch.empty(split.parts, tokens, experts, dtype=torch.float32, device=hidden_states.device)
    if not tokens:
        return parts
    hidden_states = hidden_states if hidden_states.stride(1) == 1 else hidden_states.contiguous()
    gate_weight = gate_weight.contiguous()
    grid = (triton.cdiv(tokens, split.tokens), split.parts, triton.cdiv(experts, split.experts))
    kernel(grid, hidden_states, gate_weight, parts, tokens, hidden_states.stride(0))
    return parts


@functools.lru_cache(maxsize=4096)
def _kernel(tokens: int, experts: int, hidden: int, upcast: bool, pdl: bool) -> tuple[Split, Kernel]:
    split = split_for(tokens, experts, hidden, upcast)
    return split, _cut(experts, hidden, split, upcast, pdl)


@functools.cache
def _cut(experts: int, hidden: int, split: Split, upcast: bool, pdl: bool) -> Kernel:
    constants = {
        "E": experts,
        "H": hidden,
        "BLOCK_T": split.tokens,
        "BLOCK_E": split.experts,
        "BLOCK_H": split.hidden,
        "PARTS": split.parts,
        "UPCAST": upcast,
        "PDL": pdl,
    }
    return Kernel(logits_kernel, constants)


def logits_parts_torch(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """The twin of :func:`logits_parts`: one part."""
    return (hidden_states.float() @ gate_weight.float().t())[None]


@triton.jit(do_not_specialize=["tokens"])
def logits_kernel(
    x, w, parts, tokens, stride, E: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """parts[part, token, expert] over a PARTS-th of H; a program makes [BLOCK_T, BLOCK_E] of one part."""
    if PDL:
        gdc_launch_dependents()
    CHUNKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    EACH: tl.constexpr = (CHUNKS + PARTS - 1) // PARTS
    part = tl.program_id(1)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    h = part * (EACH * BLOCK_H) + tl.arange(0, BLOCK_H)
    to = parts + part * (tokens.to(tl.int64) * E)
    if BLOCK_T == 1:
        token = tl.program_id(0).to(tl.int64)
        x_at = x + token * stride + h[None, :]
        w_at = w + e[:, None] * H + h[None, :]
        products = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
        for i in tl.static_range(EACH):
            inside = (h + i * BLOCK_H < H)[None, :]
            row = tl.load(x_at + i * BLOCK_H, mask=inside, other=0.0).to(tl.float32)
            some = tl.load(w_at + i * BLOCK_H, mask=inside & (e < E)[:, None], other=0.0).to(tl.float32)
            products += row * some
        tl.store(to + token * E + e, tl.sum(products, 1), mask=e < E)
    else:
        t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        x_at = x + t.to(tl.int64)[:, None] * stride + h[None, :]
        w_at = w + e[None, :] * H + h[:, None]
        acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for i in range(EACH):
            inside = h < H - i * BLOCK_H
            rows = tl.load(x_at + i * BLOCK_H, mask=(t < tokens)[:, None] & inside[None, :], other=0.0)
            some = tl.load(w_at + i * BLOCK_H, mask=(e < E)[None, :] & inside[:, None], other=0.0)
            if UPCAST:
                acc = tl.dot(rows.to(tl.float32), some.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(rows, some, acc)
        tl.store(to + t.to(tl.int64)[:, None] * E + e[None, :], acc, mask=(t < tokens)[:, None] & (e < E)[None, :])
