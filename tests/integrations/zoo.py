"""Small random instances of transformers' MoE modules, found by looking, not listed by hand."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers.models

H, I, E, K = 32, 24, 8, 2

# Whatever a config calls its sizes; only the names that a class knows are passed.
SMALL: dict[str, Any] = {
    "hidden_size": H,
    "d_model": H,
    "intermediate_size": I,
    "moe_intermediate_size": I,
    "expert_ffn_hidden_size": I,
    "ffn_hidden_size": I,
    "d_ff": I,
    "encoder_ffn_dim": I,
    "decoder_ffn_dim": I,
    "shared_expert_intermediate_size": I,
    "shared_intermediate_size": I,
    "shared_experts_intermediate_size": I,
    "moe_shared_expert_intermediate_size": I,
    "share_expert_dim": I,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": K,
    "moe_topk": K,
    "moe_top_k": K,
    "moe_k": K,
    "top_k_experts": K,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "norm_topk_prob": True,
    "swiglu_limit": 0.5,
    "routed_scaling_factor": 1.7,
    "zero_expert_num": 2,
    "zero_expert_type": "identity",
    "moe_hidden_size": 16,
    "moe_latent_size": 16,
    "enable_moe_block": True,
    "expert_capacity": 4,
    "adapter_in_dim": H,
}


@dataclass(frozen=True)
class Found:
    """A class of transformers that could hold routed experts."""

    module: str
    name: str

    @property
    def cls(self) -> type:
        return getattr(importlib.import_module(self.module), self.name)

    def __str__(self) -> str:
        return self.name


# A class at the margin, with its decorators; the sources are formatted, so its body is what is indented below it.
_CLASS = re.compile(r"^((?:@.*\n(?:[ )].*\n)*)*)class (\w+).*\n((?:[ )].*\n|\n)*)", re.MULTILINE)


@cache
def _classes() -> list[tuple[Found, str, str]]:
    """Every class of a module with routed experts, its decorators and its body; nothing is imported, nothing parsed."""
    root = Path(transformers.models.__path__[0])
    found = []
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "Experts" in text or "self.experts" in text:
            module = f"transformers.models.{path.parent.name}.{path.stem}"
            found += [(Found(module, m[2]), m[1], m[3]) for m in _CLASS.finditer(text)]
    return found


@cache
def experts_classes() -> tuple[Found, ...]:
    """Every class that carries transformers' experts decorator."""
    return tuple(found for found, decorators, _ in _classes() if "use_experts_implementation" in decorators)


@cache
def block_classes() -> tuple[Found, ...]:
    """Every class that makes itself a router and an attribute ``experts``, and is no decoder layer."""
    makes_experts = re.compile(r"self\.experts = \w+\(|self\.input_linear = \w+Experts\(")
    makes_router = re.compile(r"self\.(gate|router) = ")
    return tuple(
        found
        for found, _, body in _classes()
        if makes_experts.search(body)
        and makes_router.search(body)
        and ("MoELayer" in found.name or not found.name.endswith(("Layer", "MoA", "Model")))
    )


def find(name: str) -> Found:
    """The block or experts class of that name."""
    return next(found for found, _, _ in _classes() if found.name == name)


def _configs_for(cls: type) -> list[type]:
    """The config that ``cls.__init__`` is annotated with, or the module's that has the experts' fields."""
    module = importlib.import_module(cls.__module__)
    configuration = importlib.import_module(cls.__module__.replace(".modeling_", ".configuration_"))
    candidates = [
        c for c in vars(configuration).values() if inspect.isclass(c) and c.__module__ == configuration.__name__
    ]
    annotation = inspect.signature(inspect.unwrap(cls.__init__)).parameters["config"].annotation
    if isinstance(annotation, str):
        annotation = getattr(module, annotation, None)
    ordered = [c for c in candidates if c is annotation]
    ordered += sorted(
        (c for c in candidates if c is not annotation), key=lambda c: ("Vision" in c.__name__, "Text" not in c.__name__)
    )
    return ordered


def fields_of(config_class: type) -> set[str]:
    """The names that a config class takes."""
    names = set(getattr(config_class, "__dataclass_fields__", {})) | set(
        inspect.signature(config_class.__init__).parameters
    )
    return names | set(getattr(config_class, "attribute_map", {}))


def small_config(config_class: type, **overrides: Any) -> Any:
    """An instance with small sizes."""
    fields = fields_of(config_class)
    mapped = getattr(config_class, "attribute_map", {})
    values = {k: v for k, v in {**SMALL, **overrides}.items() if k in fields and mapped.get(k) not in fields}
    if config_class.__name__.startswith("Dbrx"):
        config = config_class(d_model=H)
        config.ffn_config = type(config.ffn_config)(ffn_hidden_size=I, moe_num_experts=E, moe_top_k=K, hidden_size=H)
        return config
    return config_class(**values)


# What some classes need besides, tried in turn.
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"moe_intermediate_size": [I, I]},
    {"num_experts_per_tok": 1},
    {"mamba_n_heads": 4, "mamba_d_head": 16},
    {"num_hidden_layers": 42, "num_attention_heads": 4},
)


def build(found: Found, **overrides: Any) -> torch.nn.Module:
    """One instance with random parameters and buffers, in eval mode and float32.

    Raises:
        LookupError: no config that was tried makes one; the message says what each raised.
    """
    errors = []
    for config_class in _configs_for(found.cls):
        for extra in EXTRAS:
            try:
                config = small_config(config_class, **extra, **overrides)
                config._experts_implementation = "eager"
                if not hasattr(config, "shared_expert_intermediate_size"):
                    config.shared_expert_intermediate_size = I  # some checkpoints carry it, their config class does not
                module = _instantiate(found.cls, config)
            except Exception as error:
                errors.append(f"{config_class.__name__}: {type(error).__name__}: {error}")
                continue
            _randomize(module)
            return module.eval()
    raise LookupError(f"{found.name} could not be built: {'; '.join(dict.fromkeys(errors))[:900]}")


def _instantiate(cls: type, config: Any) -> torch.nn.Module:
    if cls.__name__ == "DbrxExperts":
        config = config.ffn_config
    known: dict[str, Any] = {"layer_idx": 1, "ffn_dim": I}
    if isinstance(getattr(config, "moe_intermediate_size", None), list):
        known["intermediate_size"] = I
    if "Vision" in cls.__name__:
        known["layer_idx"] = config.num_hidden_layers - 1  # only its last layers are MoE layers
    parameters = inspect.signature(inspect.unwrap(cls.__init__)).parameters
    return cls(
        config,
        **{
            k: v
            for k, v in known.items()
            if k in parameters and (k != "layer_idx" or parameters[k].default is inspect.Parameter.empty)
        },
    )


def _randomize(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                tensor.copy_(
                    torch.stack(
                        [torch.randperm(E, generator=generator)[: tensor.shape[-1]] for _ in range(tensor.shape[0])]
                    )
                )
            elif tensor.dim() > 1 and "statics" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * max(tensor.shape[-1], 1) ** -0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1 + ("norm" in name or "scale" in name))


@cache
def all_experts_classes() -> tuple[type, ...]:
    """Decorated and undecorated classes whose name says Experts."""
    named = [found.cls for found, _, _ in _classes() if found.name.endswith("Experts")]
    return tuple(cls for cls in named if "forward" in vars(cls))


@cache
def routed_experts_classes() -> tuple[type, ...]:
    """Those without JetMoe's products, which its mixture of attention goes on using."""
    return tuple(cls for cls in all_experts_classes() if cls.__name__ != "JetMoeParallelExperts")
