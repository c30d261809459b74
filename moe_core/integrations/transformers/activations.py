"""transformers' activation modules, as MoEConfig fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConversionError

# transformers gives one function several names and classes; these are the ones whose meaning MoEConfig has a name for.
_NAMES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def activation(function: Any) -> Any:
    """A name of :data:`moe_core.activations.ACTIVATIONS` where it has one, the callable itself otherwise.

    Raises:
        ConversionError: it is no function, or has parameters of its own.
    """
    kind = type(function).__name__
    if not callable(function):
        raise ConversionError(f"activation is a {kind}, expected a function or a module")
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        raise ConversionError(
            f"activation {kind} has parameters of its own, expected one without; MoEWeights has no place"
        )
    if function is F.silu:
        return "silu"
    name = _NAMES.get(kind)
    if name == "gelu" and getattr(function, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return function if name is None else name


@dataclass(frozen=True)
class ActivateThenClamp:
    """act(gate) clamped from above, times up clamped to both sides: the clamps come behind the activation."""

    act: Any
    limit: float

    def __call__(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return self.act(gate).clamp(max=self.limit) * up.clamp(min=-self.limit, max=self.limit)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OfGateAndUp:
    """A module that is called with gate and up apart."""

    function: Any

    def __call__(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return self.function(gate, up)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class AsTheClassGates:
    """An experts class's own ``_apply_gate``, called with its settings and without its weights."""

    function: Any
    settings: Any

    def __call__(self, projected: Tensor) -> Tensor:
        return self.function(self.settings, projected)  # type: ignore[no-any-return]


class Settings:
    """The plain attributes and parameterless submodules of an experts module."""

    def __init__(self, module: nn.Module) -> None:
        kept = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        kept |= {name: child for name, child in module.named_children() if not any(True for _ in child.parameters())}
        self.__dict__.update(kept)
