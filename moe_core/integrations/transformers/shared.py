"""transformers' shared experts, as MoEConfig fields and slots."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import ConversionError
from .activations import activation
from .experts import Part, activate_then_clamp, limited
from .slots import Slot


def read_shared(mlp: Any, prefix: str) -> tuple[Part, dict[str, Any]]:
    """Slots of an MLP, and its activation's MoEConfig fields, which have to equal those of the routed experts.

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
    width = mlp.down_proj.in_features
    part = Part({"shared_intermediate_size": int(width)})
    part.slots = [
        Slot("shared_w13_weight", tuple(f"{prefix}{name}.weight" for name in first)),
        Slot("shared_w2_weight", (f"{prefix}down_proj.weight",)),
    ]
    if mlp.down_proj.bias is not None:
        part.slots += [
            Slot("shared_w13_bias", tuple(f"{prefix}{name}.bias" for name in first)),
            Slot("shared_w2_bias", (f"{prefix}down_proj.bias",)),
        ]
    return part, {"gated": first != ("up_proj",), **_activation(mlp)}


def _activation(mlp: Any) -> dict[str, Any]:
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if getattr(mlp, "swiglu_alpha", None) is not None:
        alpha = float(mlp.swiglu_alpha)
        return limited(mlp.swiglu_limit, activation="silu", swiglu_alpha=alpha, swiglu_beta=1.0)
    if type(mlp).__name__ == "Step3p7MLP":
        return activate_then_clamp(act, mlp.limit)
    limit = getattr(mlp, "swiglu_limit", None) or getattr(mlp, "limit", None)
    return limited(limit, activation=activation(act))


def as_experts(shared: Any) -> Part:
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
