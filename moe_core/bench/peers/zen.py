"""AMD's zentorch: ``zentorch_fused_moe``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable, require


def build(problem: Problem) -> Built:
    """On copies of the weights, which it may overwrite with a layout of its own."""
    zentorch = require("zentorch", paths=problem.paths)
    ops = torch.ops.zentorch
    if not hasattr(ops, "zentorch_fused_moe"):
        raise Unavailable("broken", f"zentorch {zentorch.__version__} has no zentorch_fused_moe")
    if problem.dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable("dtype", f"takes float32 and bfloat16, not {problem.dtype}")
    ops.zentorch_flush_moe_weight_cache()  # it is keyed by addresses, which the last weights may have had
    w13, w2 = (tensor.clone() for tensor in problem.experts)

    def call(draw: Draw) -> Tensor:
        out = torch.empty_like(draw.hidden_states)
        weights, ids = draw.topk_weights, draw.topk_ids_int32
        ops.zentorch_fused_moe(out, draw.hidden_states, w13, w2, None, None, weights, ids, False, "silu")
        return out

    return Built(call, f"zentorch {zentorch.__version__}", close=ops.zentorch_flush_moe_weight_cache)
