"""The reference: every hook in plain torch, in float32, on any device, with autograd.

It is the meaning of the hooks; every other backend is compared with it. It waits for the device where that makes it
easier to read, and it never changes its inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import apply_activation
from .config import MoEConfig
from .errors import StageError
from .hookspecs import hookimpl
from .invariant import elementwise, linear
from .platform import Platform
from .routing import route, router_logits_of
from .types import STAGES, BackendInfo, ExpertsOut, Pending, Plan, Routing, Verdict
from .weights import MoEWeights


@hookimpl
def moe_backend_info() -> BackendInfo:
    """Any device; below all."""
    return BackendInfo(
        name="reference",
        device_types=("cpu", "cuda", "xpu", "mps", "xla", "tpu", "hpu", "npu", "meta"),
        priority=0,
        stages=STAGES,
    )


@hookimpl
def moe_probe(platform: Platform) -> Verdict:
    """Plain torch is always there."""
    return Verdict.yes()


@hookimpl
def moe_supports(config: MoEConfig, stage: str) -> Verdict:
    """Everything but quantised weights, with gradients."""
    if config.quant is not None and stage in ("experts", "shared_experts"):
        return Verdict.no(
            f"quantised weights (scheme {config.quant.scheme}) have no implementation yet",
            "dequantise them to bfloat16 and leave config.quant=None",
        )
    return Verdict.yes(supports_backward=True)


@hookimpl
def moe_gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """Route by :func:`moe_core.routing.route`."""
    if router_logits is None:
        router_logits = router_logits_of(plan.config, plan.weights, hidden_states)
    return route(plan.config, plan.weights, router_logits, hidden_states=hidden_states, input_ids=input_ids)


@hookimpl
def moe_shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:
    """One dense expert of the shared experts' width, times its sigmoid gate."""
    weights: MoEWeights = plan.weights
    x = hidden_states.float()
    projected = linear(x, _float(weights.shared_w13_weight), _maybe_float(weights.shared_w13_bias))
    inner = apply_activation(plan.config, projected)
    out = linear(inner, _float(weights.shared_w2_weight), _maybe_float(weights.shared_w2_bias))
    if plan.config.shared_expert_gate:
        out = out * elementwise(torch.sigmoid, linear(x, _float(weights.shared_gate_weight)))
    return Pending(out)


@hookimpl
def moe_experts(plan: Plan, hidden_states: Tensor, routing: Routing | None) -> ExpertsOut:
    """[T, K, H] float32, unweighted: rows grouped by expert, one dense product after the other."""
    if routing is None:
        raise StageError("the reference's experts do not own routing, and routing=None; the gate stage has to run")
    config, weights = plan.config, plan.weights
    tokens, k = routing.topk_ids.shape
    x = hidden_states.float()
    flat_ids = routing.topk_ids.reshape(-1).long()
    if config.apply_router_weight_on_input:
        x = x * routing.topk_weights
    order = torch.argsort(flat_ids, stable=True)
    sorted_ids = flat_ids[order]
    # Where the rows of each expert begin in sorted order: -1 lies before the first, foreign ids in between or behind.
    held, first_zero, end = config.num_held_experts, config.num_experts, config.num_router_outputs
    edges = torch.tensor([*range(held + 1), first_zero, end], device=x.device)
    *bounds, zero_start, zero_stop = torch.searchsorted(sorted_ids, edges).tolist()
    source = order // k
    pieces = [x.new_zeros(bounds[0], x.shape[1])]
    for expert in range(held):
        start, stop = bounds[expert], bounds[expert + 1]
        if stop > start:
            pieces.append(dense_expert(config, weights, expert, x[source[start:stop]]))
    pieces.append(x.new_zeros(zero_start - bounds[held], x.shape[1]))
    pieces.append(x[source[zero_start:zero_stop]])  # zero experts hand the token back
    pieces.append(x.new_zeros(tokens * k - zero_stop, x.shape[1]))
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=x.device))
    return ExpertsOut(torch.cat(pieces)[inverse].view(tokens, k, x.shape[1]), False)


def dense_expert(config: MoEConfig, weights: MoEWeights, expert: int, x: Tensor) -> Tensor:
    """One expert on [n, H] float32 rows: activation(x w13^T + b13) w2^T + b2, and the norm behind it."""
    assert weights.w13_weight is not None and weights.w2_weight is not None
    b13 = None if weights.w13_bias is None else weights.w13_bias[expert].float()
    b2 = None if weights.w2_bias is None else weights.w2_bias[expert].float()
    inner = apply_activation(config, linear(x, weights.w13_weight[expert].float(), b13))
    return expert_norm(config, weights, linear(inner, weights.w2_weight[expert].float(), b2))


def expert_norm(config: MoEConfig, weights: MoEWeights, out: Tensor) -> Tensor:
    """The norm behind an expert on its float32 output [n, H]; layers without one get ``out`` back."""
    if config.post_expert_norm_eps is None:
        return out
    norm, width = _float(weights.post_expert_norm_weight), (out.shape[-1],)
    if config.post_expert_norm_scale_first:
        return F.rms_norm(out * norm, width, None, config.post_expert_norm_eps)
    return F.rms_norm(out, width, norm, config.post_expert_norm_eps)


@hookimpl
def moe_reduce(plan: Plan, routing: Routing | None, experts_out: ExpertsOut, shared: Pending) -> Tensor:
    """Weighted sum in float32, the routed scale where it goes to the output, plus the shared experts."""
    config = plan.config
    out = experts_out.value.float()
    if not experts_out.reduced:
        if routing is None:
            raise StageError("unreduced experts need routing weights, and routing=None")
        if config.apply_router_weight_on_input:
            # The weight went into the input; an id of -1 already left zeros.
            out = out.sum(dim=1)
        else:
            out = torch.einsum("tkh,tk->th", out, routing.topk_weights.masked_fill(routing.topk_ids < 0, 0.0))
        if config.apply_routed_scale_to_output:
            out = out * config.routed_scaling_factor
    return combine_shared(config, out, shared.result()).to(plan.dtype)


def combine_shared(config: MoEConfig, routed: Tensor, shared: Tensor | None) -> Tensor:
    """Routed plus shared, or their average over 1 + ``num_shared_experts``."""
    if shared is None:
        return routed
    total = routed + shared.to(routed.dtype)
    return total / (1 + config.num_shared_experts) if config.shared_expert_combination == "average" else total


def _float(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.float()


def _maybe_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
