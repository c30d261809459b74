"""Layers of public models, by the sizes in their configuration files: what aot.py compiles."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from moe_core import MoEConfig

MODELS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "qwen3-30b-a3b": {
            "hidden_size": 2048,
            "intermediate_size": 768,
            "num_experts": 128,
            "top_k": 8,
            "renormalize": True,
        },
        "olmoe": {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "top_k": 8},
        "mixtral-8x7b": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_experts": 8,
            "top_k": 2,
            "renormalize": True,
        },
        "deepseek-v3": {
            "hidden_size": 7168,
            "intermediate_size": 2048,
            "num_experts": 256,
            "top_k": 8,
            "scoring_func": "sigmoid",
            "renormalize": True,
            "renorm_eps": 1e-20,
            "e_score_correction_bias": True,
            "num_expert_group": 8,
            "topk_group": 4,
            "group_score": "top2_sum",
            "routed_scaling_factor": 2.5,
            "shared_intermediate_size": 2048,
        },
    }
)


def config_of(name: str) -> MoEConfig:
    """The layer of one model."""
    return MoEConfig(**MODELS[name])
