"""SonicMoE: CuTe kernels for NVIDIA's Hopper and newer, through its function for routing done elsewhere."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, require


def build(problem: Problem) -> Built:
    """Gate and up rows interleaved, as it wants them, in a copy."""
    sonic = require("sonicmoe", "sonic-moe", problem.paths)
    function = require("sonicmoe.functional").moe_general_routing_inputs
    activation = require("sonicmoe.enums").ActivationType.SWIGLU
    (w13, w2), shape = problem.experts, problem.shape
    gate, up = w13.chunk(2, dim=1)
    up_proj = torch.stack((gate, up), dim=2).flatten(1, 2).permute(1, 2, 0)
    down_proj = w2.permute(1, 2, 0)
    takes = inspect.signature(function).parameters

    def call(draw: Draw) -> Tensor:
        tokens, k = draw.topk_ids.shape
        rows = torch.arange(tokens * k, dtype=torch.int32, device=w13.device) // k
        values = {
            "x": draw.hidden_states,
            "router_scores": draw.topk_weights.view(-1),
            "token_indices": rows,
            "expert_indices": draw.topk_ids_int32.view(-1),
            "w1": up_proj,
            "b1": None,
            "w2": down_proj,
            "b2": None,
            "E": shape.num_experts,
            "stream_id": torch.cuda.current_stream().cuda_stream,
            "activation_type": activation,
            "is_inference_mode_enabled": True,
        }
        out = function(**{name: value for name, value in values.items() if name in takes})
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    return Built(call, f"sonic-moe {getattr(sonic, '__version__', '')}".strip())
