"""moe_core as one of transformers' experts implementations."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from .modules import ConvertedExperts
from .own_router import convert_experts

NAME = "moe_core"

_converted: weakref.WeakKeyDictionary[nn.Module, ConvertedExperts] = weakref.WeakKeyDictionary()


def register() -> None:
    """Make ``experts_implementation="moe_core"`` known to transformers. Calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(module: Any, *arguments: Any, **named: Any) -> Tensor:
    """What transformers calls in place of an experts module's forward: [T, H], [T, K] ids, [T, K] weights to [T, H]."""
    found = _converted.get(module)
    if found is None or not _same_parameters(found, module):
        # The module keeps its parameters; this holds the same objects, and dies with the module.
        found = convert_experts(module)
        _converted[module] = found
    found.train(module.training)
    return found(*arguments, **named)  # type: ignore[no-any-return]


def _same_parameters(converted: ConvertedExperts, module: nn.Module) -> bool:
    """Whether the module still has the objects that were taken over; ``.to()`` keeps them, assignment does not."""
    held = module._parameters
    return all(held.get(s.leaf) is s.tensor(converted) for s in converted.slots if not s.parents and not s.slot.packed)
