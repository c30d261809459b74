"""A plain torch router and plain shared experts around a peer that only has routed experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable


def with_plain_layer(problem: Problem, inner: Built) -> Built:
    """The whole layer: what one would write beside a kernel for routed experts."""
    router, shared = plain_router(problem), plain_shared(problem)

    def call(draw: Draw) -> Tensor:
        x = draw.hidden_states
        topk_weights, topk_ids = router(x)
        out = inner.call(Draw(x, topk_weights, topk_ids))
        return out if shared is None else out + shared(x)

    note = "with a plain torch router" + ("" if shared is None else " and shared experts")
    return replace(inner, call=call, note=f"{inner.note}; {note}" if inner.note else note)


def plain_router(problem: Problem) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x [T, H] to weights [T, K] float32 and ids [T, K] int64."""
    config, weights = problem.config, problem.weights
    gate, bias = weights.gate_weight, weights.e_score_correction_bias
    assert gate is not None
    if config.scoring_func not in ("softmax", "sigmoid") or not config.score_before_topk:
        raise Unavailable("routing", f"the plain router has no {config.scoring_func}")
    if config.has_groups and config.group_score != "top2_sum":
        raise Unavailable("routing", f"the plain router has no groups by {config.group_score}")

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, gate).float()
        scores = logits.softmax(dim=-1) if config.scoring_func == "softmax" else logits.sigmoid()
        selection = scores if bias is None else scores + bias
        if config.has_groups:
            assert config.num_expert_group is not None and config.topk_group is not None
            grouped = selection.view(len(x), config.num_expert_group, -1)
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(config.topk_group, dim=-1).indices
            dropped = torch.ones(grouped.shape[:2], dtype=torch.bool, device=x.device).scatter(1, best, False)
            selection = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        topk_ids = selection.topk(config.top_k, dim=-1).indices
        topk_weights = scores.gather(1, topk_ids)
        if config.renormalize:
            topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + config.renorm_eps)
        return topk_weights * config.routed_scaling_factor, topk_ids

    return route


def plain_shared(problem: Problem) -> Callable[[Tensor], Tensor] | None:
    """x [T, H] to the shared experts' output, None where there are none."""
    w13, w2 = problem.weights.shared_w13_weight, problem.weights.shared_w2_weight
    if w13 is None or w2 is None:
        return None
    inner, gate = problem.shape.shared_intermediate_size, problem.weights.shared_gate_weight

    def shared(x: Tensor) -> Tensor:
        h = F.linear(x, w13)
        out = F.linear(F.silu(h[:, :inner]) * h[:, inner:], w2)
        return out if gate is None else F.linear(x, gate).sigmoid() * out

    return shared
