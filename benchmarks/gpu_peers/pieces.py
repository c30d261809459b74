"""vLLM's pieces of a whole layer one after the other, as a peer of `moe-core bench --stages layer`.

    python -m moe_core.bench --peer-path .peers --adapter benchmarks/gpu_peers/pieces.py --peers vllm/pieces

Its operators choose experts; fused_experts runs as it is shipped; the shared experts are two products of torch around
its SwiGLU. Its own gates are CuTe and CUDA kernels that were not assembled: torch.mm to float32 stands for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core.bench.draw import Draw
from moe_core.bench.registry import Adapter, Built, Problem, Unavailable, register, require


def _router(problem: Problem) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    config, weights, operators = problem.config, problem.weights, torch.ops._moe_C
    gate, bias, k = weights.gate_weight, weights.e_score_correction_bias, config.top_k
    assert gate is not None
    gate = gate.t()
    if config.has_groups and config.scoring_func == "sigmoid" and bias is not None:
        groups, kept = config.num_expert_group, config.topk_group
        scale, renormalise, added = config.routed_scaling_factor, config.renormalize, bias.float()

        def grouped(x: Tensor) -> tuple[Tensor, Tensor]:
            logits = torch.mm(x, gate, out_dtype=torch.float32)
            return operators.grouped_topk(logits, groups, kept, k, renormalise, scale, added, 1)  # type: ignore[no-any-return]

        return grouped
    if config.has_groups or config.scoring_func != "softmax" or bias is not None or config.routed_scaling_factor != 1:
        raise Unavailable("routing", "takes softmax, or sigmoid with groups and a bias")

    def softmax(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.mm(x, gate, out_dtype=torch.float32)
        topk_weights = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
        ids, rows = (torch.empty(len(x), k, dtype=torch.int32, device=x.device) for _ in range(2))
        operators.topk_softmax(topk_weights, ids, rows, logits, config.renormalize, None, None)
        return topk_weights, ids

    return softmax


def _shared(problem: Problem) -> Callable[[Tensor], Tensor] | None:
    weights = problem.weights
    w13, w2, gate = weights.shared_w13_weight, weights.shared_w2_weight, weights.shared_gate_weight
    if w13 is None or w2 is None:
        return None

    def call(x: Tensor) -> Tensor:
        wide = F.linear(x, w13)
        inner = wide.new_empty(len(x), wide.shape[1] // 2)
        torch.ops._C.silu_and_mul(inner, wide)
        out = F.linear(inner, w2)
        return out if gate is None else F.linear(x, gate).sigmoid() * out

    return call


def build(problem: Problem) -> Built:
    """From what assemble.py made."""
    fused = require("vllm.model_executor.layers.fused_moe.fused_moe", "vllm", problem.paths)
    (w13, w2), route, shared = problem.experts, _router(problem), _shared(problem)

    def call(draw: Draw) -> Tensor:
        x = draw.hidden_states
        out: Tensor = fused.fused_experts(x, w13, w2, *route(x))
        return out if shared is None else out + shared(x)

    how = "pieces one after the other, fused_experts as shipped; gate by torch.mm; vLLM's compiled ops"
    return Built(call, f"vllm {require('vllm').__version__}'s {how}")


register(Adapter("vllm/pieces", build, ("cuda",), ("layer",)))
