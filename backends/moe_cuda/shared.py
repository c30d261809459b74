"""Shared experts on a GPU: two products by torch, the activation between them and the sigmoid gate by a kernel each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core import MoEWeights, Pending, Routing
from moe_core.types import Plan

from . import quantised
from .interpreter import guarded
from .kernels.activation import activate_rows, activate_rows_torch, activation_constants
from .kernels.row_gate import scale_by_gate


@guarded
def shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:
    """[T, H], on the stream that is current: the core forks and joins.

    Args:
        plan: ``plan.weights`` are MoEWeights, or hold them as ``plain``.
    """
    config = plan.config
    weights: MoEWeights = getattr(plan.weights, "plain", plan.weights)
    these = getattr(plan.weights, "shared", None)
    if these is not None:
        return Pending(_gated(plan, _quantised(plan, these, hidden_states), hidden_states))
    w13, w2 = weights.shared_w13_weight, weights.shared_w2_weight
    assert w13 is not None and w2 is not None
    # Weights of another dtype than the layer's: neither side is rounded.
    dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, w13.dtype), w2.dtype)
    projected = F.linear(hidden_states.to(dtype), w13.to(dtype), _to(weights.shared_w13_bias, dtype))
    activate = activate_rows if activation_constants(config) is not None else activate_rows_torch
    inner = activate(config, projected, dtype)
    out = F.linear(inner, w2.to(dtype), _to(weights.shared_w2_bias, dtype))
    return Pending(_gated(plan, out, hidden_states))


def _gated(plan: Plan, out: Tensor, hidden_states: Tensor) -> Tensor:
    weights: MoEWeights = getattr(plan.weights, "plain", plan.weights)
    if not plan.config.shared_expert_gate:
        return out
    assert weights.shared_gate_weight is not None
    return scale_by_gate(out, hidden_states, weights.shared_gate_weight)


def _quantised(plan: Plan, these: quantised.Products, x: Tensor) -> Tensor:
    """One expert that every token chooses, with a weight of 1."""
    tokens = x.shape[0]
    if not tokens:
        return x.new_empty(0, x.shape[1])
    ids = torch.zeros(tokens, 1, dtype=torch.int32, device=x.device)
    routing = Routing(torch.ones(tokens, 1, device=x.device), ids)
    return quantised.parts(plan, these, these.forms(tokens), x.contiguous(), routing, x.dtype)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
