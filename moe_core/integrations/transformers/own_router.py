"""Blocks whose router keeps state, drops tokens or hands more than weights on: it stays and goes on routing, and what
it calls is moe_core's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...layer import BoundModule
from ...report import SelectionReport
from ...runner import MoERunner
from .adapters import ADAPTERS
from .block import convert_known
from .calls import call_of
from .experts import read_experts
from .modules import ConvertedExperts, ConvertedShared
from .shared import apart, read_packed, read_shared


def convert_experts(experts: nn.Module) -> ConvertedExperts:
    """Routed experts on their own."""
    return ConvertedExperts(read_experts(experts), experts, call_of(experts))


def _packed_shared(shared: nn.Module) -> ConvertedShared:
    return ConvertedShared(read_packed(shared), shared)


def _shared(mlp: Any) -> ConvertedShared:
    part, act = read_shared(mlp)
    return ConvertedShared(apart(part, act, mlp.down_proj.out_features), mlp)


def _inner(block: nn.Module) -> nn.Module:
    return convert_known(block, ADAPTERS[type(block).__name__])


@dataclass(frozen=True)
class OwnRouter:
    """What of a block class is replaced.

    Args:
        parts: attribute -> what makes its replacement; an attribute that is None stays None.
        holds_blocks: the parts are MoE blocks; convert_model replaces these and leaves what holds them.
    """

    parts: dict[str, Callable[[nn.Module], nn.Module]]
    holds_blocks: bool = False


OWN_ROUTER: dict[str, OwnRouter] = {
    # Tells tokens of text and of images apart, and adds shared experts to both.
    "Ernie4_5_VLMoeMoeBlock": OwnRouter(
        {"text_moe": _inner, "vision_moe": _inner, "shared_experts": _shared}, holds_blocks=True
    ),
    # Normalises the weights of routed and shared experts together.
    "InklingMoE": OwnRouter({"experts": convert_experts, "shared_experts": _packed_shared}),
    # Two experts at most, each with a capacity.
    "NllbMoeSparseMLP": OwnRouter({"experts": convert_experts}),
    # One expert, with a capacity.
    "SwitchTransformersSparseMLP": OwnRouter({"experts": convert_experts}),
    # Hands its state to the next layer's router.
    "ZayaSparseMoeBlock": OwnRouter({"experts": convert_experts}),
}


class BlockWithOwnRouter(nn.Module):
    """A block that goes on as transformers wrote it, up to its experts, which are moe_core's.

    It is no instance of the original's class, but runs its forward: what that does between router and experts differs
    between versions of transformers.
    """

    def __init__(self, block: nn.Module, described: OwnRouter) -> None:
        super().__init__()
        self.converted_from = type(block).__name__
        self.original_forward = type(block).forward
        for name, value in vars(block).items():
            if not name.startswith("_") and name != "forward":
                setattr(self, name, value)
        self._parameters.update(block._parameters)
        self._buffers.update(block._buffers)
        for name, part in block._modules.items():
            replaced = described.parts.get(name)
            self.add_module(name, part if part is None or replaced is None else replaced(part))
        self.train(block.training)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the block it replaces."""
        return self.original_forward(self, *arguments, **named)

    @property
    def runner(self) -> MoERunner:
        """The bound runner of its routed experts; of the first, where it holds several."""
        return next(m.runner for m in self.modules() if isinstance(m, BoundModule))

    @property
    def report(self) -> SelectionReport:
        """Which backend serves them and why."""
        return self.runner.report

    def extra_repr(self) -> str:
        """The block it replaces."""
        return self.converted_from
