"""The reduction on a CPU: the experts are summed already, so only the shared experts are left."""

from __future__ import annotations

from torch import Tensor

from moe_core import ExpertsOut, Pending, Routing
from moe_core.reference import moe_reduce as plain_reduce
from moe_core.types import Plan


def reduce(plan: Plan, routing: Routing, experts_out: ExpertsOut, shared: Pending) -> Tensor:
    """[T, H] in ``plan.dtype``; experts of another backend may come unreduced."""
    return plain_reduce(plan, routing, experts_out, shared)
