"""Expert activations on float32 blocks: the device functions for every product's epilogue, and one kernel of rows.

Clamps and relu are written as selects, which hand NaN on as torch does; a minimum or maximum would swallow it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_core import MoEConfig
from moe_core.activations import ACTIVATIONS, apply_activation

from ..launch import Kernel, Memo


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of a float32 block."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate_plain(x, ACT: tl.constexpr):
    """act(x) of a float32 block; ACT is a name of moe_core.activations.ACTIVATIONS."""
    tl.static_assert(
        ACT == "silu" or ACT == "gelu" or ACT == "gelu_tanh" or ACT == "relu" or ACT == "relu2", "unknown activation"
    )
    if ACT == "silu":
        out = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        out = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        out = tl.where(x < 0.0, 0.0, x)
        if ACT == "relu2":
            out = out * out
    return out


@triton.jit
def activate(gate, up, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """act(gate) * up of two float32 blocks, clamped by LIMIT (None clamps nothing), with SwiGLU's ALPHA and BETA."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if ALPHA != 1.0 or BETA != 0.0:
        out = gate * sigmoid(ALPHA * gate) * (up + BETA)
    else:
        out = activate_plain(gate, ACT) * up
    return out


@triton.jit
def finish(
    gate, up, weight, b13, bias_at, inside, GATED: tl.constexpr, UP: tl.constexpr, BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """What follows an expert's first product, on float32 blocks: the weight on its input, its bias, its activation.

    ``weight`` is as many as rows, for WEIGHT_ON_INPUT; ``bias_at`` are where in ``b13`` the gate columns' biases lie,
    UP in front of the up columns', and ``inside`` masks them. All broadcast to the blocks.
    """
    if WEIGHT_ON_INPUT:
        gate *= weight
        up *= weight
    if BIAS:
        gate += tl.load(b13 + bias_at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(b13 + bias_at + UP, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        out = activate(gate, up, ACT, LIMIT, ALPHA, BETA)
    else:
        out = activate_plain(gate, ACT)
    return out


def activation_constants(config: MoEConfig) -> dict[str, Any] | None:
    """ACT, LIMIT, ALPHA and BETA for the device functions; None where the activation is a Python function."""
    if config.custom_activation_function is not None or config.activation not in tuple(ACTIVATIONS):
        return None
    limit = config.swiglu_limit
    return {
        "ACT": config.activation,
        "LIMIT": None if limit is None else float(limit),
        "ALPHA": float(config.swiglu_alpha),
        "BETA": float(config.swiglu_beta),
    }


@triton.jit(do_not_specialize=["elements"])
def activation_kernel(
    projected_ptr,
    out_ptr,
    elements,
    I: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[n, 2I] (or [n, I]) to [n, I]; a program takes BLOCK elements of the flat result."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = flat < elements
    if GATED:
        column = flat % I
        if INTERLEAVED:
            gate_at = 2 * flat
            up_at = gate_at + 1
        else:
            gate_at = 2 * flat - column  # row * 2I + column
            up_at = gate_at + I
        gate = tl.load(projected_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(projected_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
        inner = activate(gate, up, ACT, LIMIT, ALPHA, BETA)
    else:
        inner = activate_plain(tl.load(projected_ptr + flat, mask=mask, other=0.0).to(tl.float32), ACT)
    tl.store(out_ptr + flat, inner.to(out_ptr.dtype.element_ty), mask=mask)


def activate_rows(config: MoEConfig, projected: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, I] in ``dtype`` from contiguous [n, 2I] ([n, I] when not gated), computed in float32.

    The config's activation is one that :func:`activation_constants` serves.
    """
    width = projected.shape[1] // (2 if config.gated else 1)
    out = torch.empty(projected.shape[0], width, dtype=dtype, device=projected.device)
    if out.numel():
        kernels = _kernels(config)
        kernel = kernels.get(width)
        if kernel is None:
            kernel = kernels[width] = _kernel(config, width)
        kernel((triton.cdiv(out.numel(), _BLOCK), 1, 1), projected, out, out.numel())
    return out


_BLOCK = 1024
_kernels = Memo()


def _kernel(config: MoEConfig, width: int) -> Kernel:
    constants = activation_constants(config)
    assert constants is not None
    shape = {"I": width, "GATED": config.gated, "INTERLEAVED": config.w13_interleaved}
    return Kernel(activation_kernel, {**shape, **constants, "BLOCK": _BLOCK})


def activate_rows_torch(config: MoEConfig, projected: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin of :func:`activate_rows`; any activation."""
    return apply_activation(config, projected.float()).to(dtype)
