"""transformers' routed experts, as MoEConfig fields and slots.

Most classes carry transformers' experts decorator, whose flags (``is_transposed``, ``is_concatenated``, ``has_bias``,
``has_gate``, ``has_post_expert_norm``) say all there is to know about the layout; the others have a reader each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...errors import ConversionError
from . import activations
from .slots import FirstRows, OnePlus, PerExpert, Slot, Transposed

FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")


@dataclass
class Part:
    """What one module contributes: MoEConfig fields, and where its tensors are."""

    fields: dict[str, Any] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)


def read_experts(experts: nn.Module, prefix: str = "") -> Part:
    """Fields and slots of a routed experts module; ``prefix`` is its path in the block, with the dot.

    Raises:
        ConversionError: a class that is neither decorated nor known.
    """
    name = type(experts).__name__
    if name in READERS:
        return READERS[name](experts, prefix)
    if is_decorated(experts):
        return _decorated(experts, prefix)
    raise ConversionError(
        f"experts class {name} is not recognised: it lacks {', '.join(f for f in FLAGS if not hasattr(experts, f))} of "
        f"transformers' experts decorator and is none of {', '.join(READERS)}; use moe_core.MoERunner with its weights"
    )


def is_decorated(module: nn.Module) -> bool:
    """Whether it carries transformers' experts decorator."""
    return all(hasattr(module, flag) for flag in FLAGS)


def _decorated(experts: Any, prefix: str) -> Part:
    packed = "gate_up_proj" if experts.has_gate else "up_proj"
    w13, w2 = getattr(experts, packed, None), getattr(experts, "down_proj", None)
    if not (isinstance(w13, nn.Parameter) and isinstance(w2, nn.Parameter) and w13.dim() == w2.dim() == 3):
        raise ConversionError(
            f"experts class {type(experts).__name__}: expected 3-D parameters {packed} and down_proj, found "
            f"{type(w13).__name__} and {type(w2).__name__}"
        )
    view = Transposed() if experts.is_transposed else None
    w13_shape, w2_shape = (w.transpose(1, 2).shape if experts.is_transposed else w.shape for w in (w13, w2))
    part = Part(
        {
            "num_experts": w13_shape[0],
            "expert_hidden_size": w13_shape[2],
            "intermediate_size": w2_shape[2],
            "gated": bool(experts.has_gate),
            "w13_interleaved": bool(experts.has_gate) and not experts.is_concatenated,
            **gating(experts),
        },
        [Slot("w13_weight", (f"{prefix}{packed}",), view), Slot("w2_weight", (f"{prefix}down_proj",), view)],
    )
    if experts.has_bias:
        part.slots += [
            Slot("w13_bias", (f"{prefix}{packed}_bias",)),
            Slot("w2_bias", (f"{prefix}down_proj_bias",)),
        ]
    if getattr(experts, "has_post_expert_norm", False):  # a later flag than the others
        _norm_behind(experts.post_expert_norm, part, f"{prefix}post_expert_norm.weight")
    return part


def _norm_behind(norm: Any, part: Part, name: str) -> None:
    if not type(norm).__name__.endswith("InputScaledRMSNorm"):
        raise ConversionError(f"post_expert_norm is a {type(norm).__name__}, expected a ...InputScaledRMSNorm")
    part.fields |= {"post_expert_norm_eps": float(norm.eps), "post_expert_norm_scale_first": True}
    part.slots.append(Slot("post_expert_norm_weight", (name,), OnePlus()))


def gating(module: Any) -> dict[str, Any]:
    """The activation fields of an experts module.

    Of a class that is not among transformers' own and gates in its own way, that function is called, as transformers'
    contract with experts implementations has it.
    """
    name = type(module).__name__
    if name in GATINGS:
        return GATINGS[name](module)
    own = getattr(type(module), "_apply_gate", None)
    if any(getattr(own, "__qualname__", "") == f"{cls.__qualname__}._apply_gate" for cls in type(module).__mro__):
        return {"custom_activation_function": activations.AsTheClassGates(own, activations.Settings(module))}
    return {"activation": activations.activation(module.act_fn)}


def limited(limit: float | None, **fields: Any) -> dict[str, Any]:
    """``swiglu_limit`` where there is a finite one."""
    return fields if limit is None or math.isinf(limit) else {"swiglu_limit": float(limit), **fields}


def swiglu(alpha: float, limit: float | None) -> dict[str, Any]:
    """gpt-oss's gating: clamped, with alpha, and up + 1."""
    return limited(limit, activation="silu", swiglu_alpha=float(alpha), swiglu_beta=1.0)


# How the classes that override transformers' gating gate.
GATINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "BeamExperts": lambda m: {"activation": activations.activation(m.act_fn)},  # the reference gates in float32 anyway
    "DeepseekV4Experts": lambda m: limited(m.limit, activation=activations.activation(m.act_fn)),
    "Glm5NextTextExperts": lambda m: limited(m.swiglu_limit, activation="silu"),
    "GptOssExperts": lambda m: swiglu(m.alpha, m.limit),
    "HYV4Experts": lambda m: limited(m.swiglu_limit, activation="silu"),
    "Inkling2Experts": lambda m: {"custom_activation_function": activations.OfGateAndUp(m.act_fn)},
    "MiniMaxM3VLExperts": lambda m: swiglu(m.swiglu_alpha, m.swiglu_limit),
    "OpenAIPrivacyFilterExperts": lambda m: swiglu(m.alpha, m.limit),
}


def _llama4(experts: Any, prefix: str) -> Part:
    count, hidden, rows = experts.gate_up_proj.shape
    return Part(
        {
            "num_experts": count,
            "expert_hidden_size": hidden,
            "intermediate_size": rows // 2,
            "activation": activations.activation(experts.act_fn),
        },
        [
            Slot("w13_weight", (f"{prefix}gate_up_proj",), Transposed()),
            Slot("w2_weight", (f"{prefix}down_proj",), Transposed()),
        ],
    )


def jetmoe(block: Any) -> Part:
    """JetMoe's block keeps both products of its experts itself."""
    count, rows, hidden = block.input_linear.weight.shape
    return Part(
        {
            "num_experts": count,
            "expert_hidden_size": hidden,
            "intermediate_size": rows // 2,
            "activation": activations.activation(block.activation),
        },
        [Slot("w13_weight", ("input_linear.weight",)), Slot("w2_weight", ("output_linear.weight",))],
    )


def _longcat(experts: Any, prefix: str) -> Part:
    if experts.gate_up_proj is None:
        raise ConversionError("LongcatFlashExperts without routed experts has nothing to convert")
    held = experts.num_routed_experts
    zeros = int(experts.zero_expert_num)
    fields = {
        "num_experts": held,
        "expert_hidden_size": experts.hidden_size,
        "intermediate_size": experts.intermediate_size,
        "activation": activations.activation(experts.act_fn),
    }
    if zeros:
        fields |= {"zero_expert_num": zeros, "zero_expert_type": "identity"}
    # Rows of zero experts are there in gate_up_proj and never read.
    view = FirstRows(held) if zeros else None
    return Part(
        fields, [Slot("w13_weight", (f"{prefix}gate_up_proj",), view), Slot("w2_weight", (f"{prefix}down_proj",))]
    )


def _step3p7(experts: Any, prefix: str) -> Part:
    count, rows, hidden = experts.gate_up_proj.shape
    return Part(
        {
            "num_experts": count,
            "expert_hidden_size": hidden,
            "intermediate_size": rows // 2,
            **activate_then_clamp(experts.act_fn, experts.limit),
        },
        [Slot("w13_weight", (f"{prefix}gate_up_proj",)), Slot("w2_weight", (f"{prefix}down_proj",))],
    )


def activate_then_clamp(act: Any, limit: float) -> dict[str, Any]:
    """Fields of a clamp behind the activation; without a limit it is a plain gated activation."""
    if math.isinf(limit):
        return {"activation": activations.activation(act)}
    return {"custom_activation_function": activations.ActivateThenClamp(act, float(limit))}


def _dbrx(experts: Any, prefix: str) -> Part:
    count, inner, hidden = experts.num_experts, experts.ffn_hidden_size, experts.hidden_size
    return Part(
        {
            "num_experts": count,
            "expert_hidden_size": hidden,
            "intermediate_size": inner,
            "activation": activations.activation(experts.mlp.activation_fn),
        },
        [
            Slot("w13_weight", (f"{prefix}mlp.w1", f"{prefix}mlp.v1"), piece=(count, inner, hidden), dim=1),
            Slot("w2_weight", (f"{prefix}mlp.w2",), PerExpert(count, transposed=True)),
        ],
    )


def _one_module_an_expert(up: str, down: str, bias: bool) -> Callable[[Any, str], Part]:
    def read(experts: Any, prefix: str) -> Part:
        names = list(experts._modules)
        names = [name for name in names if name.startswith("expert_")]
        first = experts[names[0]]
        inner, hidden = getattr(first, up).weight.shape
        shapes = {"w13_weight": (1, inner, hidden), "w2_weight": (1, hidden, inner)}
        part = Part(
            {
                "num_experts": len(names),
                "expert_hidden_size": hidden,
                "intermediate_size": inner,
                "gated": False,
                "activation": activations.activation(first.act),
            },
            [
                Slot(name, tuple(f"{prefix}{e}.{layer}.weight" for e in names), piece=shapes[name])
                for name, layer in (("w13_weight", up), ("w2_weight", down))
            ],
        )
        if bias:
            part.slots += [
                Slot(name, tuple(f"{prefix}{e}.{layer}.bias" for e in names), piece=(1, width))
                for name, layer, width in (("w13_bias", up, inner), ("w2_bias", down, hidden))
            ]
        return part

    return read


READERS: dict[str, Callable[[Any, str], Part]] = {
    "Llama4TextExperts": _llama4,
    "LongcatFlashExperts": _longcat,
    "Step3p7Experts": _step3p7,
    "DbrxExperts": _dbrx,
    "NllbMoeExperts": _one_module_an_expert("fc1", "fc2", bias=True),
    "SwitchTransformersExperts": _one_module_an_expert("wi", "wo", bias=False),
}
