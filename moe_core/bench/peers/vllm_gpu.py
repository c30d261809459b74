"""vLLM's Triton kernels for a GPU, as its ``fused_experts`` ships them."""

from __future__ import annotations

import inspect

from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, require


def build(problem: Problem) -> Built:
    """From an installed vLLM or one in a given folder."""
    module = require("vllm.model_executor.layers.fused_moe.fused_moe", "vllm", problem.paths)
    function = module.fused_experts
    w13, w2 = problem.experts
    # Newer versions never work in place and have no such argument.
    options = {"inplace": False} if "inplace" in inspect.signature(function).parameters else {}

    def call(draw: Draw) -> Tensor:
        weights, ids = draw.topk_weights, draw.topk_ids_int32
        return function(draw.hidden_states, w13, w2, weights, ids, **options)  # type: ignore[no-any-return]

    return Built(call, f"vllm {getattr(require('vllm'), '__version__', '')}".strip())
