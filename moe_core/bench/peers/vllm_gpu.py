"""vLLM's Triton kernels for a GPU, as its ``fused_experts`` ships them, in the layer's dtype and in blocks of e4m3."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable, require


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


def build_fp8(problem: Problem) -> Built:
    """Its path for weights in blocks of 128 x 128, which may be another where further libraries are installed."""
    weights = problem.weights
    module = require("vllm.model_executor.layers.fused_moe.fused_moe", "vllm", problem.paths)
    config = require("vllm.model_executor.layers.fused_moe.config")
    w13, w2 = problem.experts
    if w13.dtype != torch.float8_e4m3fn or w13.shape[1] % 256 or w13.shape[2] % 128 or w2.shape[2] % 128:
        raise Unavailable("shape", "takes experts in whole blocks of 128 x 128 e4m3 weights")
    quant = config.fp8_w8a8_moe_quant_config(weights.w13_weight_scale, weights.w2_weight_scale, block_shape=[128, 128])

    def call(draw: Draw) -> Tensor:
        ids = draw.topk_ids_int32
        return module.fused_experts(draw.hidden_states, w13, w2, draw.topk_weights, ids, quant_config=quant)  # type: ignore[no-any-return]

    return Built(call, f"vllm {getattr(require('vllm'), '__version__', '')}, Triton, fp8 blocks".strip())
