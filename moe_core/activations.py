"""Expert activations by the names that model configs use."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import StageError
from .invariant import elementwise

if TYPE_CHECKING:
    from .config import MoEConfig


def _relu2(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": _gelu_tanh,
        "relu": F.relu,
        "relu2": _relu2,
    }
)
"""Name -> element-wise function. ``gelu`` is the exact one, ``relu2`` is relu squared."""


def apply_activation(config: MoEConfig, projected: Tensor) -> Tensor:
    """From the first product to the input of the second.

    Args:
        projected: [..., 2I] (gate and up, packed or interleaved by ``config.w13_interleaved``), [..., I] when the
            experts are not gated.
    Returns:
        [..., I], in the dtype of ``projected``.
    Source: the clamped form and its alpha and beta are gpt-oss's; alpha 1, beta 0 and no limit is plain SwiGLU.
    """
    if config.custom_activation_function is not None:
        width = projected.shape[-1] // (2 if config.gated else 1)
        return _called("custom_activation_function", config.custom_activation_function, projected, width)
    if not config.gated:
        return _activate(config, projected)
    if config.w13_interleaved:
        gate, up = projected[..., 0::2], projected[..., 1::2]
    else:
        gate, up = projected.chunk(2, dim=-1)
    if config.swiglu_limit is not None:
        gate = gate.clamp(max=config.swiglu_limit)
        up = up.clamp(min=-config.swiglu_limit, max=config.swiglu_limit)
    if config.swiglu_alpha != 1.0 or config.swiglu_beta != 0.0:
        return gate * elementwise(torch.sigmoid, config.swiglu_alpha * gate) * (up + config.swiglu_beta)
    return _activate(config, gate) * up


def _activate(config: MoEConfig, x: Tensor) -> Tensor:
    if callable(config.activation):
        return _called("activation", config.activation, x, x.shape[-1])
    return elementwise(ACTIVATIONS[config.activation], x)


def _called(field: str, function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    out, expected = function(x), (*x.shape[:-1], width)
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise StageError(f"{field} returned {found} from {tuple(x.shape)}, expected {expected}; mend the function")
    return out.to(x.dtype)
