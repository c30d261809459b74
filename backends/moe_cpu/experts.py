"""Routed experts on a CPU, by the strategy that was chosen at bind."""

from __future__ import annotations

from torch import Tensor

from moe_core import ExpertsOut, Routing
from moe_core.types import Plan


def experts(plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
    """[T, H], weighted and summed in float32, or [T, K, H] where each expert has a norm of its own."""
    return plan.weights.experts.routed(plan.config, plan.weights.plain, hidden_states, routing)
