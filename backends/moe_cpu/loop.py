"""Routed experts as a loop: rows sorted by expert once, then one packed expert after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core import ExpertsOut, Routing
from moe_core.reference import expert_norm
from moe_core.types import Plan


@dataclass(frozen=True)
class ExpertLoop:
    """Experts of one width.

    Args:
        experts: each takes [n, H] to [n, H], n > 0.
    """

    experts: tuple[Callable[[Tensor], Tensor], ...]

    def routed(self, plan: Plan, x: Tensor, routing: Routing) -> ExpertsOut:
        """[T, H], weighted and summed in float32."""
        config = plan.config
        tokens, k = routing.topk_ids.shape
        weights = routing.topk_weights.reshape(-1)
        if config.apply_router_weight_on_input:
            x = (x.float() * routing.topk_weights).to(x.dtype)
            weights = torch.ones_like(weights)
        flat_ids = routing.topk_ids.reshape(-1)
        order = torch.argsort(flat_ids, stable=True)
        edges = torch.tensor([*range(config.num_held_experts + 1), config.num_experts, config.num_router_outputs])
        *bounds, zero_start, zero_stop = torch.searchsorted(flat_ids[order], edges.to(flat_ids.dtype)).tolist()
        source = order // k
        out = torch.zeros(tokens, x.shape[1], dtype=torch.float32)
        for expert, run in enumerate(self.experts):
            start, stop = bounds[expert], bounds[expert + 1]
            if stop > start:
                # Within one expert no token stands twice unless the caller's ids repeat, and index_add_ adds in order.
                rows = source[start:stop]
                y = expert_norm(config, plan.weights.plain, run(x[rows]).float())
                out.index_add_(0, rows, y * weights[order[start:stop], None])
        if zero_stop > zero_start:
            rows = source[zero_start:zero_stop]
            out.index_add_(0, rows, x[rows].float() * weights[order[zero_start:zero_stop], None])
        if config.apply_routed_scale_to_output:
            out *= config.routed_scaling_factor
        return ExpertsOut(out, True)

    def shared(self, x: Tensor) -> Tensor:
        """[T, H] through the one expert there is."""
        return self.experts[0](x)
