"""Shared experts on a GPU: two products by torch, the activation between them and the sigmoid gate by a kernel each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core import MoEWeights, Pending
from moe_core.types import Plan

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
    w13, w2 = weights.shared_w13_weight, weights.shared_w2_weight
    assert w13 is not None and w2 is not None
    # Weights of another dtype than the layer's: neither side is rounded.
    dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, w13.dtype), w2.dtype)
    projected = F.linear(hidden_states.to(dtype), w13.to(dtype), _to(weights.shared_w13_bias, dtype))
    activate = activate_rows if activation_constants(config) is not None else activate_rows_torch
    inner = activate(config, projected, dtype)
    out = F.linear(inner, w2.to(dtype), _to(weights.shared_w2_bias, dtype))
    if config.shared_expert_gate:
        assert weights.shared_gate_weight is not None
        out = scale_by_gate(out, hidden_states, weights.shared_gate_weight)
    return Pending(out)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
