"""The layouts that detection knows, part by part: experts, router, correction bias, shared experts.

The parts combine freely: a part is not one model's, but a way in which many of them store the same tensors.
"""

from __future__ import annotations

from .layout import AS_CONFIG, Entry

Group = tuple[Entry, ...]

MODULE = (".weight", ".bias")
PARAMETER = ("", "_bias")
NAMED = ("_weight", "_bias")


def _experts(
    first: tuple[str, ...],
    last: str,
    suffixes: tuple[str, str],
    *,
    transposed: bool | None = False,
    interleaved: bool | str | None = False,
    interleaved_with_bias: bool | str | None = False,
) -> tuple[Group, Group]:
    """The group of tensors without biases, and the one with them."""
    weight, bias = suffixes

    def weights(order: bool | str | None) -> Group:
        return (
            Entry("w13_weight", tuple(name + weight for name in first), transposed, order),
            Entry("w2_weight", (last + weight,), transposed),
        )

    biases = (
        Entry("w13_bias", tuple(name + bias for name in first), interleaved=interleaved_with_bias),
        Entry("w2_bias", (last + bias,)),
    )
    return weights(interleaved), (*weights(interleaved_with_bias), *biases)


def _each(stem: str, first: tuple[str, ...], last: str, order: bool | None = False) -> tuple[Group, Group]:
    """Linear layers of its own for each expert, below ``stem``."""
    names = tuple(f"{stem}.{name}" for name in first)
    return _experts(names, f"{stem}.{last}", MODULE, interleaved=order, interleaved_with_bias=order)


def _shared(stem: str, first: tuple[str, ...], last: str) -> tuple[Group, Group]:
    weights = (
        Entry("shared_w13_weight", tuple(f"{stem}.{name}.weight" for name in first)),
        Entry("shared_w2_weight", (f"{stem}.{last}.weight",)),
    )
    biases = (
        Entry("shared_w13_bias", tuple(f"{stem}.{name}.bias" for name in first)),
        Entry("shared_w2_bias", (f"{stem}.{last}.bias",)),
    )
    return weights, (*weights, *biases)


# Where the names of one group are among those of another, the larger one is meant. None asks: for an orientation the
# shapes, for an order of rows the caller, since both orders are in use under the same names.
EXPERTS: tuple[Group, ...] = (
    *_each("experts.{e}", ("gate_proj", "up_proj"), "down_proj"),
    *_each("experts.{e}", ("w1", "w3"), "w2"),
    *_each("experts.{e}", ("fc1", "fc3"), "fc2"),
    *_each("experts.{e}", ("gate_up_proj",), "down_proj", None),
    *_each("experts.{e}", ("w13",), "w2", None),
    *_each("experts.{e}", ("up_proj",), "down_proj"),
    *_each("experts.expert_{e}", ("fc1",), "fc2"),
    *_each("experts.expert_{e}", ("wi",), "wo"),
    *_experts(("experts.gate_up_proj",), "experts.down_proj", PARAMETER, transposed=None, interleaved_with_bias=None),
    *_experts(("experts.up_proj",), "experts.down_proj", PARAMETER),
    *_experts(("experts.w1", "experts.w3"), "experts.w2", PARAMETER),
    *_experts(("experts.w13",), "experts.w2", NAMED, interleaved=None, interleaved_with_bias=None),
    *_experts(("experts.fc1",), "experts.fc2", MODULE, transposed=None),
    *_experts(("input_linear",), "output_linear", MODULE, transposed=None),
    *_experts(("gate_proj", "up_proj"), "down_proj", MODULE),
    (
        Entry("w13_weight", ("experts.mlp.w1", "experts.mlp.v1"), flat=True),
        Entry("w2_weight", ("experts.mlp.w2",), transposed=True, flat=True),
    ),
    *_experts(("w13",), "w2", NAMED, interleaved=AS_CONFIG, interleaved_with_bias=AS_CONFIG),
)

SHARED: tuple[Group, ...] = tuple(
    group
    for stem in ("shared_expert", "shared_experts", "shared_mlp", "share_expert", "../shared_mlp", "../share_expert")
    for first, last in (
        (("gate_proj", "up_proj"), "down_proj"),
        (("w1", "w3"), "w2"),
        (("linear_gate", "up_proj"), "down_proj"),
        (("gate_up_proj",), "down_proj"),
        (("input_linear",), "output_linear"),
        (("up_proj",), "down_proj"),
    )
    for group in _shared(stem, first, last)
) + tuple(
    tuple(Entry(field, (field,), interleaved=AS_CONFIG) for field in fields)
    for fields in (
        ("shared_w13_weight", "shared_w2_weight"),
        ("shared_w13_weight", "shared_w2_weight", "shared_w13_bias", "shared_w2_bias"),
    )
)

SINGLE: dict[str, tuple[str, ...]] = {
    "gate_weight": (
        "gate.weight",
        "router.weight",
        "router.gate.weight",
        "router.layer.weight",
        "router.classifier.weight",
        "gate.wg.weight",
        "gate_weight",
    ),
    "gate_bias": ("router.bias", "gate_bias"),
    "e_score_correction_bias": (
        "gate.e_score_correction_bias",
        "router.e_score_correction_bias",
        "experts.e_score_correction_bias",
        "moe_statics.e_score_correction_bias",
        "gate.moe_statics.e_score_correction_bias",
        "e_score_correction_bias",
        "gate.expert_bias",
        "router.expert_bias",
        "expert_bias",
        "router_bias",
        "../moe.router.expert_bias",
    ),
    "shared_gate_weight": ("shared_expert_gate.weight", "shared_gate_weight"),
    "per_expert_scale": ("router.per_expert_scale", "per_expert_scale"),
    "tid2eid": ("gate.tid2eid", "tid2eid"),
    "post_expert_norm_weight": ("post_expert_norm_weight",),
}
"""Field -> the names that it goes by, one of which may be there."""

EITHER_BIAS = ("gate.bias",)
"""Names that some give to the router's bias and others to the correction bias: the config has to say."""

QUANTISED = (
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_packed",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_global_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "absmax",
    "quant_map",
    "SCB",
)
"""Last components of names that only quantised weights have."""

QUANTISED_ENDINGS = ("_blocks", "_scales", "_scale_inv", "_weight_scale", "_proj_scale", "_input_scale", "_zero_point")
"""Ends of the last component that say the same where the tensors are stacked."""
