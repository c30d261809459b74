"""AMD's zentorch: ``zentorch_fused_moe``."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable, require
from .libraries import has_bfloat16_instructions

_ALGORITHM = "ZENDNNL_MATMUL_ALGO"


def build(problem: Problem) -> Built:
    """On copies of the weights, which it may overwrite with a layout of its own."""
    if problem.dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable("dtype", f"takes float32 and bfloat16, not {problem.dtype}")
    zentorch = _load(problem)
    ops = torch.ops.zentorch
    if not hasattr(ops, "zentorch_fused_moe"):
        raise Unavailable("broken", f"zentorch {zentorch.__version__} has no zentorch_fused_moe")
    ops.zentorch_flush_moe_weight_cache()  # it is keyed by addresses, which the last weights may have had
    w13, w2 = (tensor.clone() for tensor in problem.experts)

    def call(draw: Draw) -> Tensor:
        out = torch.empty_like(draw.hidden_states)
        weights, ids = draw.topk_weights, draw.topk_ids_int32
        ops.zentorch_fused_moe(out, draw.hidden_states, w13, w2, None, None, weights, ids, False, "silu")
        return out

    algorithm = os.environ.get(_ALGORITHM)
    note = f"zentorch {zentorch.__version__}" + (f", {_ALGORITHM}={algorithm}" if algorithm else "")
    return Built(call, note, close=ops.zentorch_flush_moe_weight_cache)


def _load(problem: Problem) -> Any:
    if not has_bfloat16_instructions():
        # By default it leaves bfloat16 results unwritten on such a processor. 2 is oneDNN on repacked weights, fastest
        # of what is right there. Read once in a process: hence before the import, and for every dtype.
        os.environ.setdefault(_ALGORITHM, "2")
    return require("zentorch", paths=problem.paths)
