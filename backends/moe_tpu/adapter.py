"""torch_xla's side of functions.py: each function one operator with a fake, one ``call_jax`` inside.

``torch.compile(backend="openxla")`` refuses a bare ``call_jax`` and takes an operator. The device type ``xla`` is this
adapter's; one for ``tpu`` (torch_tpu) would register the same functions under another name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.core.xla_builder as xb
from torch import Tensor

from . import functions


def _call(function: Any, *arguments: Any) -> Tensor:
    """One jax function on XLA tensors; traced once for each combination of shapes."""
    return xb.call_jax(function, arguments)  # type: ignore[no-any-return]


@torch.library.custom_op("moe_tpu::routed", mutates_args=())
def routed(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    norm: Tensor | None,
    spec: str,
) -> Tensor:
    """:func:`functions.routed`: [T, H] to [T, H] float32."""
    return _call(functions.routed, x, topk_weights, topk_ids, gate, up, down, b13, b2, norm, spec)


@routed.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("moe_tpu::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """:func:`functions.grouped_linear`: [N, K] and [G, K, M] to [N, M]."""
    return _call(functions.grouped_linear, rows, weight, sizes)


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("moe_tpu::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`functions.linear`: [n, K] and [N, K] to [n, N] float32."""
    return _call(functions.linear, x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("moe_tpu::router_logits", mutates_args=())
def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`functions.router_logits`: [T, H] to [T, E] float32."""
    return _call(functions.router_logits, x, weight, bias)


@router_logits.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("moe_tpu::packed", mutates_args=())
def packed(weight: Tensor, first: int, count: int, step: int) -> Tensor:
    """:func:`functions.packed`: [E, N, K] to [E, K, count]."""
    return _call(functions.packed, weight, first, count, step)


@packed.register_fake
def _(weight: Tensor, first: int, count: int, step: int) -> Tensor:
    return weight.new_empty(weight.shape[0], weight.shape[2], count)


__all__ = ["grouped_linear", "linear", "packed", "routed", "router_logits"]
