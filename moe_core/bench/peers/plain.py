"""What one writes by hand in torch: rows sorted by expert, then a loop of products or torch's grouped product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable


def _routed(products: Callable[[Tensor, Tensor], Tensor], experts: int) -> Callable[[Draw], Tensor]:
    """Sort rows by expert, let ``products`` take rows [T * K, H] and tokens per expert [E], weigh and sum."""

    def call(draw: Draw) -> Tensor:
        x, k = draw.hidden_states, draw.topk_ids.shape[1]
        flat = draw.topk_ids.view(-1)
        order = flat.argsort(stable=True)
        # bincount waits for the device, which no graph can capture.
        counts = torch.zeros(experts, dtype=torch.int64, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))
        y = products(x.index_select(0, order // k), counts)
        y = y * draw.topk_weights_cast.view(-1, 1).index_select(0, order)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return y.index_select(0, back).view(-1, k, x.shape[1]).sum(dim=1)

    return call


def loop(problem: Problem) -> Built:
    """One expert after the other, F.linear on its rows."""
    (w13, w2), inner = problem.experts, problem.shape.intermediate_size

    def products(rows: Tensor, counts: Tensor) -> Tensor:
        out = torch.empty_like(rows)
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                h = F.linear(rows[start : start + count], w13[expert])
                out[start : start + count] = F.linear(F.silu(h[:, :inner]).mul_(h[:, inner:]), w2[expert])
                start += count
        return out

    return Built(
        _routed(products, problem.shape.num_experts),
        "rows sorted by expert, F.linear an expert",
        waits_for_device="it reads tokens per expert",
    )


def grouped_mm(problem: Problem) -> Built:
    """torch's grouped product, twice."""
    function = getattr(F, "grouped_mm", None)
    if function is None:
        raise Unavailable("not_installed", f"torch {torch.__version__} has no F.grouped_mm", "install torch >= 2.10")
    (w13, w2), inner = problem.experts, problem.shape.intermediate_size
    up, down = w13.transpose(1, 2), w2.transpose(1, 2)

    def products(rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        h = function(rows, up, offs=ends)
        return function(F.silu(h[:, :inner]) * h[:, inner:], down, offs=ends)  # type: ignore[no-any-return]

    return Built(_routed(products, problem.shape.num_experts), "rows sorted by expert, F.grouped_mm twice")
