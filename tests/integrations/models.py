"""Small random whole models: one for each of transformers' modules that hold routed experts, found by looking."""

from __future__ import annotations

import copy
import importlib
import inspect
from functools import cache
from typing import Any

import torch
import zoo
from transformers import PreTrainedModel

TOKENS = torch.arange(12).reshape(2, 6) + 3

# What a whole model needs beside zoo.SMALL; as there, only the names that a config knows are passed.
SMALL: dict[str, Any] = zoo.SMALL | {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_heads": 4,
    "n_heads": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "d_kv": 8,
    "kv_channels": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "ssm_state_size": 8,
    "n_groups": 1,
    "router_hidden_size": 16,
    "partial_rotary_factor": 1.0,
    "sliding_window": 8,
    "max_position_embeddings": 128,
    "max_seq_len": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 0,
    "num_layers": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    # Every layer is an MoE layer.
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "encoder_sparse_step": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "interleave_moe_layer_step": 1,
    "moe_layer_start_index": 0,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "attn_layer_period": 1,
    "attn_layer_offset": 0,
}

_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
_FULL = {"layer_types": ["full_attention", "full_attention"]}

# module -> what its config needs besides.
PASSED: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {**_FULL, **_SPARSE},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [zoo.I, 16], **_SPARSE, **_MROPE},
    "glm4v_moe": _MROPE,
    "glm5_next": {"index_topk": 64, "qk_rope_head_dim": 0, **_SPARSE},
    "lfm2_moe": _FULL,
    "mimo_v2_flash": _FULL,
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
}

# module -> dotted attributes that are set when the config is there, because its __init__ computes or ignores them.
SET: dict[str, dict[str, Any]] = {
    "beam": _SPARSE,
    "dbrx": {
        "ffn_config.hidden_size": zoo.H,
        "ffn_config.ffn_hidden_size": zoo.I,
        "ffn_config.moe_num_experts": zoo.E,
        "ffn_config.moe_top_k": zoo.K,
        "attn_config.rope_theta": 1e4,
        "attn_config.clip_qkv": 8.0,
    },
    "step3p7": _SPARSE,
}

_ENDINGS = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "Model")


def modules() -> list[str]:
    """The names of transformers' model modules that hold routed experts."""
    return sorted({found.module for found in (*zoo.experts_classes(), *zoo.block_classes())})


def model_class(module: str) -> type:
    """The smallest whole model of ``module``: a causal one, or what comes next."""
    found = importlib.import_module(module)
    classes = [c for c in vars(found).values() if inspect.isclass(c) and issubclass(c, PreTrainedModel)]
    classes = [c for c in classes if c.__module__ == module and not c.__name__.endswith("PreTrainedModel")]
    for ending in _ENDINGS:
        for cls in classes:
            if cls.__name__.endswith(ending):
                return cls
    raise LookupError(f"{module} has no class that ends with one of {', '.join(_ENDINGS)}")


def config_for(config_class: type, values: dict[str, Any]) -> Any:
    """An instance with those of ``values`` that it knows, down to its parts."""
    fields = zoo.fields_of(config_class)
    mapped = getattr(config_class, "attribute_map", {})
    passed = {k: v for k, v in values.items() if k in fields and mapped.get(k) not in fields}
    parts = getattr(config_class, "sub_configs", None) or {}
    passed |= {k: config_for(part, values) for k, part in parts.items() if inspect.isclass(part) and "text" in k}
    return config_class(**passed)


@cache
def _built(module: str) -> PreTrainedModel:
    cls, short = model_class(module), module.split(".")[2]
    config = config_for(cls.config_class, {**SMALL, **PASSED.get(short, {})})
    for path, value in SET.get(short, {}).items():
        owner, _, leaf = path.rpartition(".")
        setattr(getattr(config, owner) if owner else config, leaf, value)
    config._experts_implementation = "eager"
    model = cls(config).eval()
    _randomize(model)
    return model


def build(module: str) -> PreTrainedModel:
    """A model of its own, in eval mode and float32, with random weights; correction biases are not zero."""
    return copy.deepcopy(_built(module))


def _randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "tid2eid" in name:
                rows = [torch.randperm(zoo.E, generator=generator)[: tensor.shape[1]] for _ in range(tensor.shape[0])]
                tensor.copy_(torch.stack(rows))
            elif any(part in name for part in ("correction_bias", "expert_bias", "balancing_biases")):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1 and "A_log" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5)


def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same tokens for encoder and decoder."""
    taken = inspect.signature(model.forward).parameters
    return {name: TOKENS for name in ("input_ids", "decoder_input_ids") if name in taken}


def first(output: Any) -> torch.Tensor:
    """Logits, or the last hidden state."""
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
