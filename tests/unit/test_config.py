"""Every ConfigError: the impossible is refused at construction, with the field, its value and the remedy."""

from __future__ import annotations

import dataclasses
import math

import pytest

from moe_core import MoEConfig, QuantConfig
from moe_core.errors import ConfigError

BASE = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "top_k": 2}
GROUPS = {"num_expert_group": 4, "topk_group": 2}
REFUSED = [
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": 64.0}, "hidden_size=64.0"),
    ({"intermediate_size": -1}, "intermediate_size=-1"),
    ({"num_experts": 0}, "num_experts=0"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_k": 9}, "top_k=9"),
    ({"shared_intermediate_size": 0}, "shared_intermediate_size=0"),
    ({"moe_latent_size": -4}, "moe_latent_size=-4"),
    ({"num_local_experts": 9}, "num_local_experts=9"),
    ({"scoring_func": "softmin"}, "scoring_func='softmin'"),
    ({"renorm_eps": -1e-20, "renormalize": True}, "renorm_eps=-1e-20"),
    ({"routed_scaling_factor": math.inf}, "routed_scaling_factor=inf"),
    ({"routed_scaling_factor": "2"}, "routed_scaling_factor='2'"),
    ({"renorm_clamp_min": 0.0, "renormalize": True}, "renorm_clamp_min=0.0"),
    ({"router_logit_softcap": 0.0}, "router_logit_softcap=0.0"),
    ({"router_logit_softcap": math.inf}, "router_logit_softcap=inf"),
    ({"router_logit_scale": 0.0}, "router_logit_scale=0.0"),
    ({"custom_activation_function": 1}, "custom_activation_function=1"),
    ({"post_expert_norm_scale_first": True}, "post_expert_norm_scale_first=True"),
    ({"score_before_topk": False, **GROUPS}, "num_expert_group=4"),
    ({"apply_router_weight_on_input": True}, "top_k=2"),
    ({"zero_expert_num": -1}, "zero_expert_num=-1"),
    ({"zero_expert_num": 2}, "zero_expert_type=None"),
    ({"zero_expert_num": 2, "zero_expert_type": "identity", **GROUPS}, "zero_expert_num=2"),
    ({"sparsemixer_jitter": 0.01, "top_k": 1}, "top_k=1"),
    ({"sparsemixer_jitter": -0.1}, "sparsemixer_jitter=-0.1"),
    ({"sparsemixer_jitter": math.nan}, "sparsemixer_jitter=nan"),
    ({"sparsemixer_jitter": 0.01, "scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ({"sparsemixer_jitter": 0.01, "score_before_topk": False}, "score_before_topk=False"),
    ({"sparsemixer_jitter": 0.01, **GROUPS}, "num_expert_group=4"),
    ({"hash_routing": True, "e_score_correction_bias": True}, "e_score_correction_bias=True"),
    ({"hash_routing": True, **GROUPS}, "num_expert_group=4"),
    ({"custom_routing_function": max, "e_score_correction_bias": True}, "e_score_correction_bias=True"),
    ({"custom_routing_function": max, "scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ({"custom_routing_function": max, "renormalize": True, "renorm_eps": 1e-6}, "renorm_eps=1e-06"),
    ({"custom_routing_function": max, "renormalize": True, "renorm_clamp_min": 0.1}, "renorm_clamp_min=0.1"),
    ({"simulated_routing": "zipf", "simulated_zipf_skew": -1.0}, "simulated_zipf_skew=-1.0"),
    ({"simulated_routing": "zipf", "simulated_seed": 0.5}, "simulated_seed=0.5"),
    ({"expert_capacity": 0}, "expert_capacity=0"),
    ({"expert_capacity": 4, "max_chunk_tokens": 8}, "max_chunk_tokens=8"),
    ({"expert_capacity": 4, "max_chunk_bytes": 8}, "max_chunk_bytes=8"),
    ({"simulated_routing": "normal"}, "simulated_routing='normal'"),
    ({"custom_routing_function": 3}, "custom_routing_function=3"),
    ({"simulated_routing": "uniform", "hash_routing": True}, "routing method"),
    ({"topk_group": 2}, "topk_group=2"),
    ({"num_expert_group": 3, "topk_group": 1}, "num_expert_group=3"),
    ({"num_expert_group": 4}, "topk_group=None"),
    ({"num_expert_group": 4, "topk_group": 5}, "topk_group=5"),
    ({"num_expert_group": 4, "topk_group": 1, "top_k": 3}, "top_k=3"),
    ({"num_expert_group": 8, "topk_group": 4, "group_score": "top2_sum"}, "group_score='top2_sum'"),
    ({"num_expert_group": 8, "topk_group": 1}, "top_k=2"),
    ({"num_expert_group": 0, "topk_group": 0}, "num_expert_group=0"),
    ({"num_expert_group": 4, "topk_group": 0}, "topk_group=0"),
    ({"num_expert_group": 4.0, "topk_group": 2}, "num_expert_group=4.0"),
    ({"num_expert_group": 1, "topk_group": 2}, "topk_group=2"),
    ({"group_mask_value": math.nan, **GROUPS}, "group_mask_value=nan"),
    ({"group_score": "mean"}, "group_score='mean'"),
    ({"group_mask_value": 1.0, **GROUPS}, "group_mask_value=1.0"),
    ({"activation": "swish7"}, "activation='swish7'"),
    ({"activation": 7}, "activation=7"),
    ({"swiglu_limit": 0.0}, "swiglu_limit=0.0"),
    ({"swiglu_limit": -7.0}, "swiglu_limit=-7.0"),
    ({"swiglu_limit": math.nan}, "swiglu_limit=nan"),
    ({"swiglu_beta": math.inf}, "swiglu_beta=inf"),
    ({"swiglu_limit": 7.0, "custom_activation_function": abs}, "swiglu_limit"),
    ({"post_expert_norm_eps": -1e-6}, "post_expert_norm_eps=-1e-06"),
    ({"swiglu_alpha": 1.7, "activation": "gelu"}, "swiglu_alpha"),
    ({"gated": False, "swiglu_limit": 7.0}, "gated=False"),
    ({"gated": False, "w13_interleaved": True}, "gated=False"),
    ({"quant": "fp8"}, "quant='fp8'"),
    ({"num_shared_experts": 0}, "num_shared_experts=0"),
    ({"shared_expert_combination": "max"}, "shared_expert_combination='max'"),
    ({"shared_experts_order": "never"}, "shared_experts_order='never'"),
    ({"shared_expert_gate": True}, "shared_expert_gate"),
    ({"nan_policy": "hope"}, "nan_policy='hope'"),
]


@pytest.mark.parametrize(("fields", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_impossible_config_is_refused_with_its_value(fields: dict, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MoEConfig(**{**BASE, **fields})
    message = str(caught.value)
    assert text in message
    assert "expected" in message
    assert ";" in message, "the remedy follows the semicolon"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scheme": "fp7"}, "scheme='fp7'"),
        ({"scheme": "mxfp4", "shared_scheme": "fp7"}, "shared_scheme='fp7'"),
        ({"scheme": "int4_weight_only", "group_size": 48}, "group_size=48"),
        ({"scheme": "fp8_block"}, "block_shape=None"),
        ({"scheme": "mxfp4", "block_shape": (128, 128)}, "block_shape=(128, 128)"),
    ],
)
def test_impossible_quantisation_is_refused(fields: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text.split("=")[0]):
        QuantConfig(**fields)


def test_config_is_frozen_and_hashable() -> None:
    config = MoEConfig(64, 32, 8, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3  # type: ignore[misc]
    assert hash(config) == hash(MoEConfig(64, 32, 8, 2))


def test_a_simulation_stands_in_for_any_router() -> None:
    """A benchmark replaces one field of a model's config and leaves the others."""
    MoEConfig(**BASE, **GROUPS, scoring_func="sigmoid", e_score_correction_bias=True, simulated_routing="zipf")


def test_one_group_is_no_grouping() -> None:
    assert not MoEConfig(64, 32, 8, 2, num_expert_group=1, topk_group=1).has_groups
    assert MoEConfig(64, 32, 8, 2, **GROUPS).has_groups
