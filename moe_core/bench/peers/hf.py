"""transformers' own modules: its experts class for the stage, a model's whole block for the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..draw import Draw
from ..registry import Built, Problem, Unavailable, require

# What each model's config calls the same numbers; a class takes what it has.
_COUNT_NAMES = ("num_experts", "n_routed_experts", "num_local_experts")


def build(problem: Problem, implementation: str) -> Built:
    """``eager``, ``grouped_mm`` or ``batched_mm``."""
    require("transformers", paths=problem.paths)
    workspace = None
    waits = "it reads which experts are hit" if implementation == "eager" else ""
    if implementation == "batched_mm":
        # It gathers the weights of every token's experts.
        one = problem.shape.expert_weight_bytes(problem.dtype.itemsize) // problem.shape.num_experts
        workspace = lambda tokens: tokens * problem.shape.top_k * one  # noqa: E731
    if problem.stage == "experts":
        experts = _module("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeExperts", problem, implementation)
        return Built(
            lambda draw: experts(draw.hidden_states, draw.topk_ids, draw.topk_weights_cast),
            type(experts).__name__,
            workspace,
            waits,
        )
    block = _block(problem, implementation)

    def call(draw: Draw) -> Tensor:
        out = block(draw.hidden_states.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out)[0]  # type: ignore[no-any-return]

    return Built(call, type(block).__name__, workspace, waits)


def _block(problem: Problem, implementation: str) -> nn.Module:
    """The block of a model that routes as this layer does."""
    shape, config = problem.shape, problem.config
    shared = shape.shared_intermediate_size
    if config.scoring_func == "softmax" and not config.has_groups and not shared:
        return _module("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", problem, implementation)
    if config.shared_expert_gate:
        if config.scoring_func == "softmax" and not config.has_groups:
            return _module("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock", problem, implementation)
    elif shared % shape.intermediate_size == 0:
        if config.scoring_func == "softmax" and not config.has_groups and not config.renormalize:
            return _module("deepseek_v2", "DeepseekV2Config", "DeepseekV2Moe", problem, implementation)
        if config.scoring_func == "sigmoid" and config.has_groups and config.renormalize:
            return _module("deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE", problem, implementation)
    raise Unavailable("routing", "no block known here routes and shares experts as this layer does")


def _module(model: str, config_name: str, class_name: str, problem: Problem, implementation: str) -> nn.Module:
    """Built on the meta device, then given the problem's tensors: no copy."""
    shape, moe = problem.shape, problem.config
    code = require(f"transformers.models.{model}.modeling_{model}")
    config: Any = getattr(require(f"transformers.models.{model}.configuration_{model}"), config_name)()
    settings = {
        "hidden_size": shape.hidden_size,
        "moe_intermediate_size": shape.intermediate_size,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": moe.renormalize,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "hidden_act": "silu",
        "n_group": moe.num_expert_group or 1,
        "topk_group": moe.topk_group or 1,
        "topk_method": "greedy",
        "n_shared_experts": shape.shared_intermediate_size // shape.intermediate_size,
        "shared_expert_intermediate_size": shape.shared_intermediate_size,
        "_experts_implementation": implementation,
        **dict.fromkeys(_COUNT_NAMES, shape.num_experts),
    }
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        module: nn.Module = getattr(code, class_name)(config)
    module.load_state_dict(_state(module, problem), strict=True, assign=True)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise Unavailable("broken", f"{class_name} has tensors that this adapter does not know: {', '.join(left)}")
    return module.eval().requires_grad_(False)


def _state(module: nn.Module, problem: Problem) -> dict[str, Tensor]:
    weights = problem.weights
    known: dict[str, Tensor | None] = {
        "gate_up_proj": weights.w13_weight,
        "down_proj": weights.w2_weight,
        "experts.gate_up_proj": weights.w13_weight,
        "experts.down_proj": weights.w2_weight,
        "gate.weight": weights.gate_weight,
        "gate.e_score_correction_bias": weights.e_score_correction_bias,
    }
    if weights.shared_w13_weight is not None:
        gate, up = weights.shared_w13_weight.chunk(2)
        for name in ("shared_experts", "shared_expert"):
            known |= {
                f"{name}.gate_proj.weight": gate,
                f"{name}.up_proj.weight": up,
                f"{name}.down_proj.weight": weights.shared_w2_weight,
            }
        known["shared_expert_gate.weight"] = weights.shared_gate_weight
    return {name: tensor for name in module.state_dict() if (tensor := known.get(name)) is not None}
