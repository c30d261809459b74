"""The router on a CPU: the public routing function, whose float32 arithmetic is the contract."""

from __future__ import annotations

from torch import Tensor

from moe_core import Routing
from moe_core.routing import route, router_logits_of
from moe_core.types import Plan


def gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """[T, H] (or [T, E] logits) to Routing."""
    plain = plan.weights.plain
    if router_logits is None:
        router_logits = router_logits_of(plan.config, plain, hidden_states)
    return route(plan.config, plain, router_logits, hidden_states=hidden_states, input_ids=input_ids)
