"""The router on XLA: the logits with the whole of float32, then the public routing function, which is static."""

from __future__ import annotations

from torch import Tensor

from moe_core import Routing
from moe_core.errors import InputError
from moe_core.routing import route
from moe_core.types import Plan


def gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """[T, H] (or [T, E] logits) to Routing."""
    plain = plan.weights.plain
    if router_logits is None:
        if plain.gate_weight is None:
            raise InputError(
                "router_logits=None and the layer has no gate_weight; pass router_logits, topk_weights+topk_ids, or "
                "gate="
            )
        router_logits = plan.weights.ops.router_logits(hidden_states, plain.gate_weight, plain.gate_bias)
    return route(plan.config, plain, router_logits, hidden_states=hidden_states, input_ids=input_ids)
