"""How transformers calls its experts modules: each function takes what the original's forward takes.

Most get ids and weights. The first argument is the module of ours that stands there, a :class:`ConvertedExperts`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError

Call = Callable[..., Tensor]


def decorated(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
    *,
    router_indices: Tensor | None = None,
    routing_weights: Tensor | None = None,
) -> Tensor:
    """[T, H], [T, K] ids and [T, K] weights; gpt-oss has other names for them."""
    ids = router_indices if top_k_index is None else top_k_index
    weights = routing_weights if top_k_weights is None else top_k_weights
    if ids is None or weights is None:
        raise InputError("top_k_index and top_k_weights: expected [T, K] tensors; experts can't route by themselves")
    return experts.choose(hidden_states, ids, weights)  # type: ignore[no-any-return]


def _dbrx(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[B, S, H] and flat ids and weights."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    out = experts.choose(rows, top_k_index, top_k_weights)
    return out.view(hidden_states.shape[0], -1, hidden_states.shape[-1])  # type: ignore[no-any-return]


def _llama4(experts: Any, hidden_states: Tensor) -> Tensor:
    """[E * T, H], already weighted: the rows of the first expert, then those of the second..."""
    count = experts.config.num_experts
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = torch.arange(count, device=rows.device).repeat_interleave(rows.shape[0] // count)
    return experts.choose(rows, ids.unsqueeze(1), torch.ones_like(ids, dtype=rows.dtype).unsqueeze(1))  # type: ignore[no-any-return]


def _refuse_dropout(experts: Any, rate: float) -> None:
    if experts.training and rate > 0:
        raise InputError(
            f"dropout of {rate} inside the experts while training: expected 0, or eval(); moe_core drops nothing at "
            f"random, so set the config's dropout_rate, activation_dropout or moe_token_dropout to 0"
        )


def _nllb(
    experts: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor, *, inner: float, outer: float
) -> Tensor:
    """NLLB hands its experts a 0/1 mask [T, E] where they read ids, so token t gets expert mask[t, e] with weight
    probs[t, e], for every e. Converted as it is: same outputs."""
    _refuse_dropout(experts, max(inner, outer))
    return experts.choose(hidden_states, router_mask.long(), router_probs * (1.0 - outer))  # type: ignore[no-any-return]


def _switch(
    experts: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor, *, inner: float
) -> Tensor:
    """One-hot [T, 1, E], all zero where the expert was full, and weights [T, 1]."""
    _refuse_dropout(experts, inner)
    ids = selected_experts.argmax(dim=-1).masked_fill(selected_experts.sum(dim=-1) == 0, -1)
    return experts.choose(hidden_states, ids, routing_weights)  # type: ignore[no-any-return]


def _rate(experts: Any) -> float:
    """Of the dropout in each expert."""
    return float(experts["expert_0"].dropout.p)


CALLS: dict[str, Callable[[Any], Call]] = {
    "DbrxExperts": lambda experts: _dbrx,
    "Llama4TextExperts": lambda experts: _llama4,
    "NllbMoeExperts": lambda experts: partial(_nllb, inner=_rate(experts), outer=float(experts.moe_token_dropout)),
    "SwitchTransformersExperts": lambda experts: partial(_switch, inner=_rate(experts)),
}


def call_of(experts: nn.Module) -> Call:
    """How ``experts`` is called."""
    name = type(experts).__name__
    return CALLS[name](experts) if name in CALLS else decorated
