"""The reduction on a GPU: one launch for the weighted sum, the routed scale, the shared experts and the average."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core import ExpertsOut, Pending, Routing
from moe_core.errors import StageError
from moe_core.types import Plan

from .interpreter import guarded
from .kernels.combine import combine_rows


@guarded
def reduce(plan: Plan, routing: Routing | None, experts_out: ExpertsOut, shared: Pending) -> Tensor:
    """[T, H] in ``plan.dtype``; the shared experts come behind their sigmoid gate."""
    config, value = plan.config, experts_out.value
    other = shared.result()
    average = other is not None and config.shared_expert_combination == "average"
    divisor = 1 + config.num_shared_experts if average else 1
    if experts_out.reduced:
        if other is None and value.dtype is plan.dtype:
            return value
        out = torch.empty(value.shape, dtype=plan.dtype, device=value.device)
        return combine_rows(value, None, None, out, shared=other, divisor=divisor)
    if routing is None:
        raise StageError("unreduced experts need routing weights, and routing=None")
    out = torch.empty(value.shape[0], value.shape[2], dtype=plan.dtype, device=value.device)
    # Under apply_router_weight_on_input the weight went into the expert's input.
    weights = None if config.apply_router_weight_on_input else routing.topk_weights
    return combine_rows(
        value, routing.topk_ids, weights, out, scale=float(config.output_scale), shared=other, divisor=divisor
    )
