"""The shared experts' sigmoid gate: each row times the sigmoid of one dot product, in one launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Kernel
from .activation import sigmoid


def scale_by_gate(rows: Tensor, hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """rows * sigmoid(hidden_states @ gate_weight^T), a new tensor in the dtype of ``rows``, computed in float32.

    Args:
        rows, hidden_states: [T, H]. gate_weight: [1, H]. Any float dtypes.
    """
    rows, hidden_states, gate_weight = rows.contiguous(), hidden_states.contiguous(), gate_weight.contiguous()
    out = torch.empty_like(rows)
    if not out.numel():
        return out
    tokens, width = rows.shape
    # Few rows are spread over several programs, each of which computes the row's gate for itself.
    blocks = 1 if tokens >= 64 else triton.cdiv(width, 1024)
    _kernel(width, blocks)((tokens, blocks, 1), rows, hidden_states, gate_weight, out)
    return out


@functools.cache
def _kernel(width: int, blocks: int) -> Kernel:
    return Kernel(row_gate_kernel, {"H": width, "BLOCKS": blocks, "BLOCK": 1024})


def row_gates(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """[T] float32, sigmoid(hidden_states @ gate_weight^T)."""
    tokens, width = hidden_states.shape
    out = torch.empty(tokens, dtype=torch.float32, device=hidden_states.device)
    _gates(width)((tokens, 1, 1), hidden_states.contiguous(), gate_weight.contiguous(), out)
    return out


@functools.cache
def _gates(width: int) -> Kernel:
    return Kernel(gates_kernel, {"H": width, "BLOCK": 1024})


def scale_by_gate_torch(rows: Tensor, hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """The twin of :func:`scale_by_gate`."""
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float().t())
    return (rows.float() * gate).to(rows.dtype)


@triton.jit
def _gate_of(x, w, first, H: tl.constexpr, BLOCK: tl.constexpr):
    h = tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], tl.float32)
    for at in range(0, H, BLOCK):
        inside = at + h < H
        some = tl.load(x + first + at + h, mask=inside, other=0.0).to(tl.float32)
        products += some * tl.load(w + at + h, mask=inside, other=0.0).to(tl.float32)
    return sigmoid(tl.sum(products, 0))


@triton.jit
def gates_kernel(x, w, out, H: tl.constexpr, BLOCK: tl.constexpr):
    """One row's gate."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row, _gate_of(x, w, row * H, H, BLOCK))


@triton.jit
def row_gate_kernel(rows, x, w, out, H: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """One row, or every BLOCKS-th block of it."""
    first = tl.program_id(0).to(tl.int64) * H
    h = tl.arange(0, BLOCK)
    gate = _gate_of(x, w, first, H, BLOCK)
    for at in range(tl.program_id(1) * BLOCK, H, BLOCKS * BLOCK):
        inside = at + h < H
        value = tl.load(rows + first + at + h, mask=inside, other=0.0).to(tl.float32) * gate
        tl.store(out + first + at + h, value.to(out.dtype.element_ty), mask=inside)
