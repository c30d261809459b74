"""Shared experts on XLA."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core import Pending
from moe_core.activations import apply_activation
from moe_core.types import Plan


def shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:
    """[T, H] float32; the compiler orders it beside the routed experts as it likes."""
    plain, linear = plan.weights.plain, plan.weights.ops.linear
    projected = linear(hidden_states, plain.shared_w13_weight, plain.shared_w13_bias)
    inner = apply_activation(plan.config, projected).to(hidden_states.dtype)
    out = linear(inner, plain.shared_w2_weight, plain.shared_w2_bias)
    if plain.shared_gate_weight is not None:
        out = out * torch.sigmoid(linear(hidden_states.float(), plain.shared_gate_weight.float(), None))
    return Pending(out)
