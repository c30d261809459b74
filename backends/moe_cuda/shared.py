"""Shared experts on a GPU: for one token the routed experts' own kernels, for more two products by torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, Pending, Routing
from moe_core.types import Plan

from . import quantised
from .forms import Bound, few_kernels
from .interpreter import guarded
from .kernels.activation import activate_rows, activate_rows_torch, activation_constants
from .kernels.row_gate import row_gates, scale_by_gate
from .launch import Memo
from .layout import product_constants
from .tuning import SHARED_FEW_TOKENS, shared_choice


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
    served = activation_constants(config) is not None
    if served and 0 < hidden_states.shape[0] <= SHARED_FEW_TOKENS and w13.is_contiguous() and w2.is_contiguous():
        return Pending(_few(plan, weights, w13, w2, hidden_states.contiguous(), dtype))
    projected = F.linear(hidden_states.to(dtype), w13.to(dtype), _to(weights.shared_w13_bias, dtype))
    inner = (activate_rows if served else activate_rows_torch)(config, projected, dtype)
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


def _few(plan: Plan, weights: MoEWeights, w13: Tensor, w2: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    # One expert for everybody, the sigmoid of its gate in the place of its routing weight.
    pdl, config = getattr(plan.weights, "pdl", False), plan.config
    b13, b2 = weights.shared_w13_bias, weights.shared_w2_bias
    kernels = _kernels(config)
    key = (w2.shape, b13 is not None, b2 is not None, pdl)
    form = kernels.get(key)
    if form is None:
        form = kernels[key] = _form(config, w2, b13 is not None, b2 is not None, pdl)
    gates = None
    if config.shared_expert_gate:
        assert weights.shared_gate_weight is not None
        gates = row_gates(x, weights.shared_gate_weight)
    tokens, (hidden, width) = x.shape[0], w2.shape
    inner = torch.empty((tokens, width), dtype=dtype, device=x.device)
    out = torch.empty((tokens, hidden), dtype=dtype, device=x.device)
    form.first((tokens * form.columns1, 1, 1), x, None, gates, w13, b13, inner, tokens)
    form.second((tokens * form.columns2, 1, 1), inner, x, None, gates, w2, b2, out, tokens)
    return out


_kernels = Memo()


def _form(config: MoEConfig, w2: Tensor, bias13: bool, bias2: bool, pdl: bool) -> Bound:
    hidden, width = w2.shape
    first, second = product_constants(config, hidden, width, 1, 1, bias13, bias2)
    first["WEIGHT_ON_INPUT"] = second["WEIGHT_ON_INPUT"] = False
    nothing_else = {"ZERO_START": 0, "ZERO_STOP": 0, "SCALE": 1.0}
    return few_kernels(first, {**second, **nothing_else}, shared_choice(hidden, width), pdl, alone=True)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
