"""Blocks whose router keeps state, drops tokens or hands more than weights on: it stays and goes on routing, and what
it calls is moe_core's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    """How to rebuild one block class.

    Args:
        run: the block's forward, as a function of our module and its arguments.
        parts: attribute -> what makes its replacement; an attribute that is None stays None.
        router: the attribute of the router, which stays; None where the parts have one each.
    """

    run: Callable[..., Any]
    parts: dict[str, Callable[[nn.Module], nn.Module]]
    router: str | None


class BlockWithOwnRouter(nn.Module):
    """A block whose router is transformers' and whose experts are moe_core's."""

    def __init__(self, block: nn.Module, described: OwnRouter) -> None:
        super().__init__()
        self.converted_from = type(block).__name__
        if described.router is not None:
            self.add_module(described.router, block.get_submodule(described.router))
        for name, convert in described.parts.items():
            part = getattr(block, name)
            self.add_module(name, None if part is None else convert(part))
        self.train(block.training)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the block it replaces."""
        return OWN_ROUTER[self.converted_from].run(self, *arguments, **named)

    def extra_repr(self) -> str:
        """The block it replaces."""
        return self.converted_from


def _inkling(block: Any, hidden_states: Tensor) -> Tensor:
    """Weights of routed and shared experts are normalised together."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, weights, ids, gammas = block.gate(hidden_states)
    routed: Tensor = block.experts(rows, ids, weights).view(hidden_states.shape)
    return routed + block.shared_experts(hidden_states, gammas)  # type: ignore[no-any-return]


def _nllb(block: Any, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Two experts at most, each with a capacity."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    mask, probs, _ = block.router(rows, padding_mask)
    return block.experts(rows, mask, probs).view(hidden_states.shape)  # type: ignore[no-any-return]


def _switch(block: Any, hidden_states: Tensor) -> Tensor:
    """One expert, with a capacity for each sequence."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    chosen, weights, _ = block.router(hidden_states)
    chosen = chosen.view(rows.shape[0], 1, block.router.num_experts)
    return block.experts(rows, chosen, weights.view(-1, 1)).view(hidden_states.shape)  # type: ignore[no-any-return]


def _zaya(
    block: Any, hidden_states: Tensor, prev_router_hidden_states: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The router hands its state to the next layer's."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, weights, ids, state = block.gate(hidden_states, router_states=prev_router_hidden_states)
    return block.experts(rows, ids, weights).view(hidden_states.shape), state


def _ernie_vl(block: Any, hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two blocks, one for tokens of text and one for tokens of images, and shared experts for both."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    count = block.text_moe.config.num_experts
    if moe_mm_token_type_ids is None or not bool(moe_mm_token_type_ids.any()):
        routed, router_logits = block.text_moe(rows)
    else:
        seen = moe_mm_token_type_ids.reshape(-1).bool()
        routed = torch.zeros_like(rows)
        router_logits = rows.new_zeros(rows.shape[0], count, dtype=torch.float32)
        for part, chosen in ((block.text_moe, ~seen), (block.vision_moe, seen)):
            out, logits = part(rows[chosen])
            routed[chosen], router_logits[chosen] = out.view(-1, rows.shape[1]), logits.view(-1, count)
    routed = routed.view(hidden_states.shape)
    if block.shared_experts is not None:
        routed = routed + block.shared_experts(hidden_states)
    return routed, router_logits.view(-1, count)


OWN_ROUTER: dict[str, OwnRouter] = {
    "Ernie4_5_VLMoeMoeBlock": OwnRouter(
        _ernie_vl, {"text_moe": _inner, "vision_moe": _inner, "shared_experts": _shared}, router=None
    ),
    "InklingMoE": OwnRouter(_inkling, {"experts": convert_experts, "shared_experts": _packed_shared}, router="gate"),
    "NllbMoeSparseMLP": OwnRouter(_nllb, {"experts": convert_experts}, router="router"),
    "SwitchTransformersSparseMLP": OwnRouter(_switch, {"experts": convert_experts}, router="router"),
    "ZayaSparseMoeBlock": OwnRouter(_zaya, {"experts": convert_experts}, router="gate"),
}
