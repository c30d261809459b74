"""A complete moe_core backend: the routed experts in plain torch, in the weights' own dtype, with gradients.

Everything else of a layer (gate, shared experts, reduce) comes from the reference, because ``stages`` does not list it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_core import BackendInfo, ExpertsOut, Verdict, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core import MoEConfig, Routing
    from moe_core.platform import Platform
    from moe_core.types import Plan


@hookimpl
def moe_backend_info() -> BackendInfo:
    """Who we are. Nothing heavy is imported here, nor at the top of this file."""
    return BackendInfo(name="toy", device_types=("cpu",), priority=10, stages=("experts",))


@hookimpl
def moe_probe(platform: Platform) -> Verdict:
    """Whether we can run on this host; a real backend looks for its library here."""
    if platform.device.type != "cpu":
        return Verdict.no(f"written for the CPU, and this is {platform.device}", "move the layer with .cpu()")
    return Verdict.yes()


@hookimpl
def moe_supports(config: MoEConfig, stage: str) -> Verdict:
    """Whether we can do this layer. What we have not written we refuse, with a reason and a remedy."""
    if config.quant is not None:
        return Verdict.no(f"quantised weights ({config.quant.scheme}) are not written", "set config.quant=None")
    if config.post_expert_norm_eps is not None:
        return Verdict.no("a norm behind the experts is not written", "set config.post_expert_norm_eps=None")
    if config.zero_expert_num:
        return Verdict.no("zero experts are not written", "set config.zero_expert_num=0")
    return Verdict.yes(supports_backward=True)


@hookimpl
def moe_experts(plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
    """[T, H] to the weighted sum [T, H] in float32: rows are grouped by expert, then one expert after the other."""
    from itertools import pairwise

    import torch
    import torch.nn.functional as F

    from moe_core.activations import apply_activation

    config, weights, x = plan.config, plan.weights, hidden_states
    scale = routing.topk_weights.flatten()
    if config.apply_router_weight_on_input:  # then top_k is 1, and the sum is with ones
        x, scale = (x.float() * routing.topk_weights).to(x.dtype), torch.ones_like(scale)
    ids, order = routing.topk_ids.flatten().sort(stable=True)  # -1, which contributes nothing, comes first
    edges = torch.searchsorted(ids, torch.arange(config.num_held_experts + 1, dtype=ids.dtype)).tolist()
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert, (start, stop) in enumerate(pairwise(edges)):
        if start == stop:
            continue
        chosen = order[start:stop]
        tokens = chosen // config.top_k
        b13, b2 = (None if b is None else b[expert] for b in (weights.w13_bias, weights.w2_bias))
        inner = apply_activation(config, F.linear(x[tokens], weights.w13_weight[expert], b13).float())
        y = F.linear(inner.to(x.dtype), weights.w2_weight[expert], b2).float()
        out = out.index_add(0, tokens, y * scale[chosen, None])
    if config.apply_routed_scale_to_output:  # whoever sums applies it
        out = out * config.routed_scaling_factor
    return ExpertsOut(out, True)
