"""The canonical weight layout, and the check that tensors have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import MoEConfig
from .errors import WeightsError
from .quant.layout import Part, quantised_parts

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class MoEWeights:
    """The tensors of one MoE layer; E is the number of experts held here.

    Args:
        gate_weight: [E, H] (E plus the zero experts). gate_bias: the same count.
        e_score_correction_bias: as many, float32, selection only.
        w13_weight: [E, 2I, H], gate rows first ([E, I, H] when not gated). w13_bias: [E, 2I].
        w2_weight: [E, H, I]. w2_bias: [E, H].
        shared_w13_weight: [2I_s, H]. shared_w2_weight: [H, I_s]. Their biases: [2I_s] and [H].
        shared_gate_weight: [1, H].
        per_expert_scale: [E]. tid2eid: [vocabulary, K] expert ids by token id. post_expert_norm_weight: [H].
        w13_weight_scale, w13_weight_zero_point, w13_weight_scale_2, w13_input_scale, and those of w2 and of the shared
            matrices: as the scheme of ``config.quant`` has them, which docs/quantisation.md lists.
    """

    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    e_score_correction_bias: Tensor | None = None
    w13_weight: Tensor | None = None
    w2_weight: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    shared_w13_weight: Tensor | None = None
    shared_w2_weight: Tensor | None = None
    shared_w13_bias: Tensor | None = None
    shared_w2_bias: Tensor | None = None
    shared_gate_weight: Tensor | None = None
    per_expert_scale: Tensor | None = None
    tid2eid: Tensor | None = None
    post_expert_norm_weight: Tensor | None = None
    w13_weight_scale: Tensor | None = None
    w2_weight_scale: Tensor | None = None
    w13_weight_zero_point: Tensor | None = None
    w2_weight_zero_point: Tensor | None = None
    w13_weight_scale_2: Tensor | None = None
    w2_weight_scale_2: Tensor | None = None
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None
    shared_w13_weight_scale: Tensor | None = None
    shared_w2_weight_scale: Tensor | None = None
    shared_w13_weight_zero_point: Tensor | None = None
    shared_w2_weight_zero_point: Tensor | None = None
    shared_w13_weight_scale_2: Tensor | None = None
    shared_w2_weight_scale_2: Tensor | None = None
    shared_w13_input_scale: Tensor | None = None
    shared_w2_input_scale: Tensor | None = None

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are present, with their field names."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def release(self, name: str, expert: int | None = None) -> None:
        """A backend says in ``moe_prepare`` that it reads a tensor, or one expert of it, no more: it has its own copy.

        The memory is freed where the caller allowed it (``consume_weights``) and no other stage reads the tensor;
        otherwise nothing happens.
        """

    @property
    def device(self) -> torch.device:
        """The device of the expert weights."""
        return self._required("w13_weight").device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the expert weights: of the layer too, unless they are quantised (:func:`layer_dtype`)."""
        return self._required("w13_weight").dtype

    def _required(self, name: str) -> Tensor:
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise WeightsError(
                f"{name}={value!r}: expected a tensor, which this config asks for; pass it, or change the config"
            )
        return value


def layer_dtype(config: MoEConfig, weights: MoEWeights) -> torch.dtype:
    """Of hidden states and results."""
    found: torch.dtype = weights.dtype if config.quant is None else getattr(torch, config.quant.dtype)
    return found


def resolve_config(config: MoEConfig, weights: MoEWeights) -> MoEConfig:
    """Settle the fields that say "as the weights have it".

    Raises:
        WeightsError: the config says a bias is there (or is not) and the weights say otherwise.
    """
    has_expert_bias = weights.w13_bias is not None or weights.w2_bias is not None
    found = {
        "gate_bias": ("gate_bias", weights.gate_bias is not None),
        "e_score_correction_bias": ("e_score_correction_bias", weights.e_score_correction_bias is not None),
        "expert_bias": ("w13_bias and w2_bias", has_expert_bias),
        "shared_expert_bias": ("shared_w13_bias and shared_w2_bias", weights.shared_w13_bias is not None),
    }
    changes: dict[str, Any] = {}
    for field, (tensors, present) in found.items():
        asked = getattr(config, field)
        if asked is None:
            changes[field] = present
        elif asked != present and not (field == "gate_bias" and weights.gate_weight is None):
            state = "are present" if present else "are missing"
            raise WeightsError(
                f"{tensors} {state}, but config.{field}={asked}; pass config.{field}={present} or "
                f"{'leave the tensors out' if present else 'add the tensors'}"
            )
    return dataclasses.replace(config, **changes)


def canonical_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Field -> shape of the tensors of :class:`MoEWeights` whose shape the config settles, present or not."""
    experts, rows, hidden = config.num_held_experts, config.num_router_outputs, config.hidden_size
    inner, width, shared = config.intermediate_size, config.expert_hidden_size, config.shared_intermediate_size or 0
    shared_rows = shared * (2 if config.gated else 1)
    return {
        "gate_weight": (rows, hidden),
        "gate_bias": (rows,),
        "e_score_correction_bias": (rows,),
        "per_expert_scale": (rows,),
        "w13_weight": (experts, config.w13_rows, width),
        "w2_weight": (experts, width, inner),
        "w13_bias": (experts, config.w13_rows),
        "w2_bias": (experts, width),
        "shared_w13_weight": (shared_rows, hidden),
        "shared_w2_weight": (hidden, shared),
        "shared_w13_bias": (shared_rows,),
        "shared_w2_bias": (hidden,),
        "shared_gate_weight": (1, hidden),
        "post_expert_norm_weight": (width,),
    }


def asked_fields(config: MoEConfig) -> dict[str, tuple[str, bool]]:
    """Field of :class:`MoEWeights` -> the config's field that asks for it, and whether it does: a tensor that is not
    asked for would have no effect, and one that is must be there."""
    return {
        "shared_w13_weight": ("shared_intermediate_size", config.has_shared_experts),
        "shared_w2_weight": ("shared_intermediate_size", config.has_shared_experts),
        "shared_gate_weight": ("shared_expert_gate", config.shared_expert_gate),
        "per_expert_scale": ("per_expert_scale", config.per_expert_scale),
        "tid2eid": ("hash_routing", config.hash_routing),
        "post_expert_norm_weight": ("post_expert_norm_eps", config.post_expert_norm_eps is not None),
    }


def required_fields(config: MoEConfig) -> list[str]:
    """The fields of :class:`MoEWeights` that a layer of this config cannot do without."""
    return ["w13_weight", "w2_weight", *(name for name, (_, wanted) in asked_fields(config).items() if wanted)]


def check_weights(config: MoEConfig, weights: MoEWeights) -> None:
    """Compare every tensor with the shape, dtype and device that ``config`` implies.

    Raises:
        WeightsError: names the tensor, what it has and what was expected.
    """
    parts = quantised_parts(config)
    shapes = canonical_shapes(config) | {name: part.shape for name, part in parts.items()}
    if weights.tid2eid is not None:
        shapes["tid2eid"] = (*weights.tid2eid.shape[:1], config.top_k)
    for name in required_fields(config):
        weights._required(name)
    for name, (field, wanted) in asked_fields(config).items():
        if not wanted and getattr(weights, name) is not None:
            raise WeightsError(
                f"{name} is present, but config.{field}={getattr(config, field)}: it would have no effect; set the "
                f"field or leave the tensor out"
            )
    _check_scales(config, weights, parts)
    device = weights.device
    for name, tensor in weights.named_tensors():
        _check_tensor(name, tensor, shapes.get(name), device, config, parts.get(name))
    _check_table(config, weights.tid2eid)


def _check_scales(config: MoEConfig, weights: MoEWeights, parts: Mapping[str, Part]) -> None:
    """Every scale and zero point that the schemes ask for is there, and none else."""
    scheme = "None" if config.quant is None else config.quant.scheme
    for name, part in parts.items():
        if not part.optional and getattr(weights, name) is None:
            raise WeightsError(
                f"{name}=None: expected a tensor {part.shape} of {_names(part.dtypes)}, without which scheme {scheme} "
                f"says nothing; pass it, or mend config.quant"
            )
    for name, _ in weights.named_tensors():
        if name not in parts and name.endswith(("_scale", "_zero_point", "_scale_2")) and name != "per_expert_scale":
            raise WeightsError(
                f"{name} is present, but config.quant={config.quant!r} has no such tensor: it would have no effect; "
                f"describe the weights with config.quant, or leave the tensor out"
            )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def _check_table(config: MoEConfig, table: Tensor | None) -> None:
    if table is None or table.is_meta or not table.numel():
        return
    least, most, limit = int(table.min()), int(table.max()), config.num_router_outputs
    if least < -1 or most >= limit:
        raise WeightsError(
            f"tid2eid holds {least if least < -1 else most}, expected expert ids from -1 (none) to {limit - 1}; check "
            f"that the table belongs to this layer of {config.num_experts} experts"
        )


def _check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...] | None,
    device: torch.device,
    config: MoEConfig,
    part: Part | None,
) -> None:
    if shape is not None and tuple(tensor.shape) != shape:
        raise WeightsError(
            f"{name} has shape {tuple(tensor.shape)}, expected {shape} from {_sizes(config)}; "
            f"transpose or slice the tensor, or mend the config"
        )
    if tensor.device != device:
        raise WeightsError(
            f"{name} is on {tensor.device}, expected {device} like w13_weight; move it with .to({str(device)!r})"
        )
    if name == "e_score_correction_bias":
        if tensor.dtype != torch.float32:
            raise WeightsError(
                f"{name} has dtype {tensor.dtype}, expected torch.float32: a rounded bias changes which experts "
                f"are chosen; pass {name}.float() of the original values"
            )
    elif name == "tid2eid":
        if tensor.dtype not in (torch.int32, torch.int64):
            raise WeightsError(f"{name} has dtype {tensor.dtype}, expected torch.int32 or torch.int64")
    elif part is not None:
        if tensor.dtype not in part.dtypes:
            raise WeightsError(
                f"{name} has dtype {tensor.dtype}, expected {_names(part.dtypes)} with {config.quant!r}; see the "
                f"scheme in docs/quantisation.md, or mend config.quant"
            )
    elif tensor.dtype not in FLOAT_DTYPES:
        raise WeightsError(
            f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, FLOAT_DTYPES))}; convert it, or "
            f"describe quantised weights with config.quant"
        )


def _sizes(config: MoEConfig) -> str:
    return (
        f"MoEConfig(hidden_size={config.hidden_size}, intermediate_size={config.intermediate_size}, "
        f"num_experts={config.num_experts}, top_k={config.top_k}, "
        f"shared_intermediate_size={config.shared_intermediate_size}, gated={config.gated})"
    )
