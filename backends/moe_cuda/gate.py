"""The router on a GPU: two launches from hidden states to Routing, one from logits, and no wait for the device."""

from __future__ import annotations

from torch import Tensor

from moe_core import MoEConfig, MoEWeights, Routing
from moe_core.routing import apply_nan_policy, look_up_experts, route, router_logits_of
from moe_core.types import Plan

from .interpreter import guarded
from .kernels.logits import logits_parts, takes_float32
from .kernels.router import WIDEST, columns_of, route_rows

MOST_TOKENS_IN_FLOAT32 = 64
"""Above, a float32 product of cuBLAS is faster than ours, which is made for few tokens."""


def why_reference(config: MoEConfig) -> str:
    """Why this router runs through moe_core.routing.route on the GPU; empty where kernels serve it."""
    if config.custom_routing_function is not None:
        return "custom_routing_function is a Python function"
    if config.simulated_routing is not None:
        return "simulated routing is for benchmarks and has no kernel"
    groups, size = columns_of(config)
    if groups * size > WIDEST:
        return f"{config.num_router_outputs} router outputs are more than the kernel's {WIDEST} columns"
    return ""


@guarded
def gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """Choose the experts of every token.

    Args:
        plan: ``plan.weights`` are MoEWeights, or hold them as ``plain``.
        hidden_states: [T, H].
        router_logits: [T, E], any float dtype, or None: hidden states times the gate's weight.
        input_ids: [T], for hash routing.
    Returns:
        Routing: the reference's, for equal logits.
    Raises:
        InputError: no gate weight, or input_ids that hash routing cannot use.
        RoutingError: NaN or infinite weights under nan_policy='raise', which waits for the device.
    """
    config = plan.config
    weights: MoEWeights = getattr(plan.weights, "plain", plan.weights)
    if why_reference(config):
        logits = router_logits_of(config, weights, hidden_states) if router_logits is None else router_logits
        return route(config, weights, logits, hidden_states=hidden_states, input_ids=input_ids)
    tokens, topk_ids, gate_bias = hidden_states.shape[0], None, None
    pdl = getattr(plan.weights, "pdl", False)
    if config.hash_routing:
        topk_ids = look_up_experts(config, weights, input_ids, tokens)
    if router_logits is not None:
        logits = router_logits
    elif weights.gate_weight is None or (
        tokens > MOST_TOKENS_IN_FLOAT32 and takes_float32(hidden_states, weights.gate_weight)
    ):
        logits = router_logits_of(config, weights, hidden_states)
    else:
        logits, gate_bias = logits_parts(hidden_states, weights.gate_weight, pdl), weights.gate_bias
    routing = route_rows(config, weights, logits, gate_bias=gate_bias, topk_ids=topk_ids, pdl=pdl)
    if config.nan_policy == "raise":
        apply_nan_policy(config, routing.topk_weights)
    return routing
