"""Shared experts on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core import Pending
from moe_core.invariant import elementwise, linear
from moe_core.types import Plan


def shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:
    """[T, H]; finished when it returns, since one process's cores gain nothing from a second queue."""
    packed = plan.weights
    out = packed.shared.shared(hidden_states)
    if packed.shared_gate is not None:
        gate = elementwise(torch.sigmoid, linear(hidden_states.float(), packed.shared_gate.float()))
        out = out.float() * gate
    return Pending(out)
