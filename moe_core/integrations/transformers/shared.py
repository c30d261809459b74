"""transformers' shared experts, as MoEConfig fields and slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...errors import ConversionError
from .activations import activation
from .experts import Part, activate_then_clamp, limited, swiglu
from .slots import OneExpert, Slot


def read_shared(mlp: Any) -> tuple[Part, dict[str, Any]]:
    """Slots of an MLP under its own names, and its activation's MoEConfig fields.

    Raises:
        ConversionError: its projections have other names than those known here.
    """
    children = dict(mlp.named_children())
    if {"gate_proj", "up_proj", "down_proj"} <= set(children):
        first: tuple[str, ...] = ("gate_proj", "up_proj")
    elif {"gate_up_proj", "down_proj"} <= set(children):
        first = ("gate_up_proj",)
    elif {"up_proj", "down_proj"} <= set(children):
        first = ("up_proj",)
    else:
        raise ConversionError(
            f"shared experts {type(mlp).__name__} have {', '.join(sorted(children)) or 'no submodules'}, expected "
            f"gate_proj, up_proj and down_proj (or gate_up_proj, or up_proj alone)"
        )
    part = Part({"shared_intermediate_size": int(mlp.down_proj.in_features)})
    part.slots = [
        Slot("shared_w13_weight", tuple(f"{name}.weight" for name in first)),
        Slot("shared_w2_weight", ("down_proj.weight",)),
    ]
    if mlp.down_proj.bias is not None:
        part.slots += [
            Slot("shared_w13_bias", tuple(f"{name}.bias" for name in first)),
            Slot("shared_w2_bias", ("down_proj.bias",)),
        ]
    return part, {"gated": first != ("up_proj",), **_gating(mlp)}


# How the MLPs that clamp do; the others compute act_fn(gate) * up, or act_fn(up).
GATINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "DeepseekV4MLP": lambda m: limited(m.limit, activation=activation(m.act_fn)),
    "Glm5NextTextMLP": lambda m: limited(m.swiglu_limit, activation=activation(m.act_fn)),
    "Llama4TextMLP": lambda m: {"activation": activation(m.activation_fn)},
    "MiniMaxM3VLDenseMLP": lambda m: swiglu(m.swiglu_alpha, m.swiglu_limit),
    "Step3p7MLP": lambda m: activate_then_clamp(m.act_fn, m.limit),
}


def _gating(mlp: Any) -> dict[str, Any]:
    name = type(mlp).__name__
    return GATINGS[name](mlp) if name in GATINGS else {"activation": activation(mlp.act_fn)}


_ACTIVATION = ("activation", "swiglu_limit", "swiglu_alpha", "swiglu_beta", "custom_activation_function")


def fits(fields: dict[str, Any], act: dict[str, Any]) -> bool:
    """Whether shared experts of activation ``act`` compute as the routed ones of ``fields``: one config serves both."""
    return fields.get("gated", True) == act["gated"] and all(
        _same(fields.get(key), act.get(key)) for key in _ACTIVATION
    )


def _same(a: Any, b: Any) -> bool:
    """Equal, or two instances of one activation module."""
    return bool(a == b) or (callable(a) and type(a) is type(b) and repr(a) == repr(b))


def apart(part: Part, act: dict[str, Any], hidden: int) -> Part:
    """The same MLP as routed experts, of which there is one."""
    width = part.fields["shared_intermediate_size"]
    shapes = {"w13_weight": (1, width, hidden), "w13_bias": (1, width)}
    slots = []
    for slot in part.slots:
        field = slot.field.removeprefix("shared_")
        if len(slot.names) > 1:
            slots.append(Slot(field, slot.names, piece=shapes[field], dim=1))
        else:
            slots.append(Slot(field, slot.names, OneExpert()))
    return Part({"num_experts": 1, "expert_hidden_size": hidden, "intermediate_size": width, **act}, slots)


def read_packed(shared: Any) -> Part:
    """Inkling's shared experts, packed as [S, I, H] each and weighted by the router: S experts that are all chosen."""
    count, inner, hidden = shared.gate_proj.shape
    fields = {
        "num_experts": count,
        "expert_hidden_size": hidden,
        "intermediate_size": inner,
        "activation": activation(shared.act_fn),
    }
    piece = (count, inner, hidden)
    return Part(
        fields,
        [Slot("w13_weight", ("gate_proj", "up_proj"), piece=piece, dim=1), Slot("w2_weight", ("down_proj",))],
    )


def chain(modules: list[nn.Module]) -> nn.Module | None:
    """The modules one after the other; None where there is none, or nothing but identities."""
    real = [module for module in modules if not isinstance(module, nn.Identity)]
    if not real:
        return None
    return real[0] if len(real) == 1 else nn.Sequential(*real)
