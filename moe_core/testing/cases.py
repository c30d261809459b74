"""The cases as data: every family of routers, every variant of experts and of shared experts, as fields of MoEConfig.

An entry is what differs from :data:`SIZES`; ``MoEConfig(**{**SIZES, **fields})`` is a small layer that has it. Other
sizes work too where num_experts is a multiple of 4, of at least 8, and top_k at most num_experts / 2.
docs/routing.md has the formulas and the models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MoEConfig, QuantConfig
from ..layer import parameter_shapes
from ..quant import quantise
from ..weights import MoEWeights

Fields = Mapping[str, Any]
SIZES: Final[Fields] = MappingProxyType({"hidden_size": 32, "intermediate_size": 24, "num_experts": 16, "top_k": 4})


def softmax_by_hand(
    hidden_states: Tensor, router_logits: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """A custom routing function: softmax, then top-k, as a caller would write it."""
    scores, ids = torch.sort(router_logits.float().softmax(dim=-1), dim=-1, descending=True, stable=True)
    weights = scores[:, :top_k]
    return weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights, ids[:, :top_k]


def situ(projected: Tensor, beta: float = 4.0, linear_beta: float = 25.0) -> Tensor:
    """[..., 2I] to [..., I]: SiLU and the linear half, both bounded smoothly by a tanh."""
    gate, up = projected.chunk(2, dim=-1)
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * linear_beta * torch.tanh(up / linear_beta)


def swiglustep(projected: Tensor, limit: float = 0.7) -> Tensor:
    """[..., 2I] to [..., I]: SwiGLU whose gate is clamped behind the SiLU, not before it."""
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)


def quick_gelu(x: Tensor) -> Tensor:
    """An activation that moe_core has no name for."""
    return x * torch.sigmoid(1.702 * x)


_BIAS: Fields = {"e_score_correction_bias": True}
_SIGMOID_BIAS: Fields = {"scoring_func": "sigmoid", "renormalize": True, **_BIAS}
_GROUPS: Fields = {"num_expert_group": 4, "topk_group": 2}
_GROUPS_TOP2: Fields = {**_GROUPS, "group_score": "top2_sum"}

ROUTER_FAMILIES: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "softmax": {},
        "softmax_renorm": {"renormalize": True},
        "softmax_renorm_expert_scale": {"renormalize": True, "per_expert_scale": True},
        "topk_softmax": {"score_before_topk": False},
        "topk_softmax_gate_bias": {"score_before_topk": False, "gate_bias": True},
        "group_max": {**_GROUPS, "group_mask_value": 0.0, "routed_scaling_factor": 1.5},
        "group_top2_bias": {**_SIGMOID_BIAS, **_GROUPS_TOP2, "renorm_eps": 1e-20, "routed_scaling_factor": 2.5},
        "group_top2": {**_GROUPS_TOP2, "group_mask_value": 0.0, "renormalize": True, "renorm_eps": 1e-20},
        "sigmoid_bias": _SIGMOID_BIAS,
        "sigmoid_bias_eps": {**_SIGMOID_BIAS, "renorm_eps": 1e-6, "routed_scaling_factor": 1.5},
        "sigmoid_bias_softcap": {**_SIGMOID_BIAS, "router_logit_softcap": 3.0},
        "sigmoid_bias_logit_scale": {**_SIGMOID_BIAS, "router_logit_scale": 0.5},
        "topk_sigmoid_bias": {**_SIGMOID_BIAS, "score_before_topk": False},
        "softmax_bias_clamp": {**_BIAS, "renormalize": True, "renorm_clamp_min": 0.4},
        "softmax_bias_zero_experts": {
            **_BIAS,
            "zero_expert_num": 4,
            "zero_expert_type": "identity",
            "routed_scaling_factor": 2.5,
        },
        "sigmoid": {"scoring_func": "sigmoid"},
        "sigmoid_renorm": {"scoring_func": "sigmoid", "renormalize": True},
        "topk_sigmoid": {"scoring_func": "sigmoid", "score_before_topk": False},
        "sigmoid_on_input": {
            "scoring_func": "sigmoid",
            "score_before_topk": False,
            "apply_router_weight_on_input": True,
            "top_k": 1,
        },
        "sqrtsoftplus_bias": {
            **_BIAS,
            "scoring_func": "sqrtsoftplus",
            "renormalize": True,
            "renorm_eps": 1e-20,
            "routed_scaling_factor": 1.5,
        },
        "sqrtsoftplus_hash": {
            "scoring_func": "sqrtsoftplus",
            "hash_routing": True,
            "renormalize": True,
            "renorm_eps": 1e-20,
            "routed_scaling_factor": 1.5,
        },
        "sparsemixer": {"sparsemixer_jitter": 0.1, "top_k": 2},
        "custom": {"custom_routing_function": softmax_by_hand, "renormalize": True},
    }
)
"""Name -> fields of routers that choose row by row. ``hash_routing`` needs ``input_ids``."""

CALL_FAMILIES: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "simulated_uniform": {"simulated_routing": "uniform", "simulated_seed": 3},
        "simulated_zipf": {"simulated_routing": "zipf", "simulated_zipf_skew": 1.2},
        "capacity_top1": {"expert_capacity": 2, "top_k": 1},
        "capacity_top2": {"expert_capacity": 3, "top_k": 2, "renormalize": True},
    }
)
"""Name -> fields of routers under which a row depends on its place in the call, so that no batch equals its parts."""

EXPERT_VARIANTS: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "silu": {},
        "gelu": {"activation": "gelu"},
        "gelu_tanh": {"activation": "gelu_tanh"},
        "relu": {"activation": "relu"},
        "relu2": {"activation": "relu2"},
        "silu_ungated": {"gated": False},
        "gelu_tanh_ungated": {"activation": "gelu_tanh", "gated": False},
        "relu2_ungated": {"activation": "relu2", "gated": False},
        "bias": {"expert_bias": True},
        "bias_ungated": {"expert_bias": True, "activation": "relu2", "gated": False},
        "interleaved": {"w13_interleaved": True},
        "interleaved_bias_gelu": {"w13_interleaved": True, "expert_bias": True, "activation": "gelu"},
        "swiglu_limit": {"swiglu_limit": 0.5},
        "swiglu_limit_gelu": {"swiglu_limit": 0.5, "activation": "gelu"},
        "swiglu_alpha": {"swiglu_limit": 0.7, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
        "swiglu_alpha_interleaved_bias": {
            "swiglu_limit": 0.7,
            "swiglu_alpha": 1.702,
            "swiglu_beta": 1.0,
            "w13_interleaved": True,
            "expert_bias": True,
        },
        "post_expert_norm": {"post_expert_norm_eps": 1e-6},
        "post_expert_norm_scale_first": {"post_expert_norm_eps": 1e-6, "post_expert_norm_scale_first": True},
        "weight_on_input": {"apply_router_weight_on_input": True, "scoring_func": "sigmoid", "top_k": 1},
        "weight_on_input_bias": {
            "apply_router_weight_on_input": True,
            "scoring_func": "sigmoid",
            "top_k": 1,
            "expert_bias": True,
            "activation": "relu2",
            "gated": False,
        },
        "custom_activation": {"activation": quick_gelu},
        "situ": {"custom_activation_function": situ},
        "swiglustep": {"custom_activation_function": swiglustep},
    }
)
"""Name -> fields of the routed experts. Limits are small, so that random tensors reach them."""

_SHARED: Fields = {"shared_intermediate_size": 40}

SHARED_VARIANTS: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "shared": _SHARED,
        "shared_gate": {**_SHARED, "shared_expert_gate": True},
        "shared_bias": {**_SHARED, "shared_expert_bias": True},
        "shared_average": {**_SHARED, "num_shared_experts": 2, "shared_expert_combination": "average"},
        "shared_gate_average": {**_SHARED, "shared_expert_gate": True, "shared_expert_combination": "average"},
        "shared_ungated": {**_SHARED, "gated": False, "activation": "relu2"},
        "shared_interleaved_limit": {**_SHARED, "w13_interleaved": True, "swiglu_limit": 0.5},
        "shared_weights_scaled": {**_SHARED, "routed_scaling_factor": 2.5},
        "shared_output_scaled": {**_SHARED, "routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
        "shared_average_output_scaled": {
            **_SHARED,
            "shared_expert_combination": "average",
            "routed_scaling_factor": 2.5,
            "apply_routed_scale_to_output": True,
        },
    }
)
"""Name -> fields of layers with shared experts."""


def _quantised(scheme: str, quant: Mapping[str, Any] = MappingProxyType({}), **fields: Any) -> Fields:
    # Neither size is a multiple of a block of 128, of a group of 64 or (the inner one) of 32.
    sizes = {"hidden_size": 160, "intermediate_size": 112, "num_experts": 8, "top_k": 2, "renormalize": True}
    return {**sizes, "quant": QuantConfig(scheme, **quant), **fields}


_GPT_OSS: Fields = {"w13_interleaved": True, "expert_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}

QUANT_VARIANTS: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "fp8_tensor": _quantised("fp8_tensor"),
        "fp8_channel": _quantised("fp8_channel", expert_bias=True),
        "fp8_block": _quantised("fp8_block", {"block_shape": (128, 128)}),
        "fp8_block_shared": _quantised(
            "fp8_block", {"block_shape": (128, 128), "shared_scheme": "fp8_block"}, shared_intermediate_size=96
        ),
        "int8_w8a8": _quantised("int8_w8a8"),
        "int8_row": _quantised("int8_weight_only", gated=False, activation="relu2"),
        "int8_zero_32": _quantised("int8_weight_only", {"group_size": 32, "symmetric": False}),
        "int4_row": _quantised("int4_weight_only", w13_interleaved=True),
        "int4_zero_64": _quantised("int4_weight_only", {"group_size": 64, "symmetric": False}),
        "int4_128": _quantised("int4_weight_only", {"group_size": 128}, expert_bias=True, shared_intermediate_size=40),
        "mxfp4": _quantised("mxfp4", **_GPT_OSS, swiglu_beta=1.0),
        "nvfp4": _quantised("nvfp4"),
    }
)
"""Name -> fields of quantised layers; the harness fills in their dtype."""


def random_weights(
    config: MoEConfig,
    *,
    seed: int = 0,
    vocabulary: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MoEWeights:
    """Every tensor that ``config`` asks for, random, biases and scales too; equal for equal seeds.

    Those of a quantised layer are quantised from those of the plain one.

    Args:
        vocabulary: rows of ``tid2eid`` where the layer routes by token id.
    """
    if config.quant is not None:
        plain = dataclasses.replace(config, quant=None)
        drawn = random_weights(plain, seed=seed, vocabulary=vocabulary, dtype=dtype, device=device)
        return quantise(plain, drawn, config.quant)[1]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name in ("per_expert_scale", "post_expert_norm_weight"):
            values = 1 + 0.3 * values
        elif name == "gate_weight":
            values *= 2 / math.sqrt(shape[-1])
        elif not name.endswith("_bias"):
            values /= math.sqrt(shape[-1])
        tensors[name] = values.to(device=device, dtype=dtype)
    rows = config.num_router_outputs
    if config.e_score_correction_bias:
        tensors["e_score_correction_bias"] = torch.randn(rows, generator=generator).mul_(0.3).to(device)
    if config.hash_routing:
        choices = torch.rand(vocabulary, rows, generator=generator).argsort(dim=1)
        tensors["tid2eid"] = choices[:, : config.top_k].to(device)
    return MoEWeights(**tensors)
