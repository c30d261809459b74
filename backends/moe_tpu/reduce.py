"""The reduction on XLA: the experts are summed already, so only the shared experts are left."""

from __future__ import annotations

from torch import Tensor

from moe_core import ExpertsOut, Pending, Routing
from moe_core.reference import moe_reduce as plain_reduce
from moe_core.types import Plan


def reduce(plan: Plan, routing: Routing, experts_out: ExpertsOut, shared: Pending) -> Tensor:
    """[T, H] in ``plan.dtype``; experts of another backend may come unreduced."""
    if not experts_out.value.shape[0]:  # torch_xla has no form for some operators on nothing
        shared.result()
        return experts_out.value.new_empty(0, experts_out.value.shape[-1], dtype=plan.dtype)
    return plain_reduce(plan, routing, experts_out, shared)
