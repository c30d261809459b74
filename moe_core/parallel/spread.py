"""A whole model's layers on one mesh."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InputError
from ..layer import BoundModule


def spread_model(model: nn.Module, mesh: Any) -> list[str]:
    """Let every MoE layer of a model bind to a mesh at its next call.

    Args:
        model: with :class:`MoELayer` or blocks that ``moe_core.integrations.transformers`` has converted. Each rank
            keeps the parameters of the whole layers and uses its part of them; :func:`load_local_weights` reads no more
            than a part.
        mesh: a DeviceMesh or a :class:`Parallel`; all ranks have to call the layers in the same order, equally often.
    Returns:
        the names of the layers.
    Raises:
        InputError: there are none.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, BoundModule)]
    if not found:
        raise InputError(
            f"{type(model).__name__} holds no MoE layer of moe_core; convert it with "
            f"moe_core.integrations.transformers.convert_model first"
        )
    for name in found:
        layer = model.get_submodule(name)
        assert isinstance(layer, BoundModule)
        layer.mesh, layer._runner = mesh, None
    return found
