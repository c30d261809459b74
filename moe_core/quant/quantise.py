"""Quantisation of a layer at load: from its bfloat16 (or other float) weights to a scheme's tensors."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import WeightsError
from .config import QuantConfig
from .dequantise import spread
from .layout import E4M3, Matrix, matrices, part_of
from .packing import e2m1_codes, e8m0_values, pack

if TYPE_CHECKING:
    from ..config import MoEConfig
    from ..weights import MoEWeights


def quantise(config: MoEConfig, weights: MoEWeights, quant: QuantConfig) -> tuple[MoEConfig, MoEWeights]:
    """Quantise a layer: round to nearest, scales from the largest magnitude that shares them.

    Args:
        config: of the layer, unquantised. weights: its tensors; matrices that ``quant`` names are replaced, all others
            are shared with the result.
        quant: the schemes.
    Returns:
        the config with ``quant``, and the quantised weights, for :class:`MoERunner`.
    Raises:
        WeightsError: the weights are quantised already.
    """
    if config.quant is not None:
        raise WeightsError(
            f"config.quant={config.quant!r}: expected None, the weights are quantised already; "
            f"moe_core.quant.dequantise gives plain ones"
        )
    config = dataclasses.replace(config, quant=quant)
    changes: dict[str, Tensor] = {}
    for field, matrix in matrices(config).items():
        value = getattr(weights, field)
        if value is None:
            raise WeightsError(f"{field}=None: expected the tensor that scheme {matrix.scheme_name} is to quantise")
        value = value.detach()
        if not matrix.lead:
            changes |= quantise_matrix(matrix, value.float())
            continue
        each = [quantise_matrix(matrix, one.float()) for one in value]
        parts = matrix.parts()
        if not each:  # no expert is held here
            changes |= {
                name: torch.empty(part.shape, dtype=part.dtypes[0], device=value.device)
                for name, part in parts.items()
                if not part.optional
            }
            continue
        for name in each[0]:
            changes[name] = torch.stack([tensors[name].view(_bytes(tensors[name])) for tensors in each]).view(
                each[0][name].dtype
            )
    return config, dataclasses.replace(weights, **changes)


def _bytes(tensor: Tensor) -> torch.dtype:
    return torch.uint8 if tensor.dtype is E4M3 else tensor.dtype


def quantise_matrix(matrix: Matrix, value: Tensor) -> dict[str, Tensor]:
    """Field -> tensor of one matrix [rows, columns] float32 (without its leading dimension)."""
    scheme, field = matrix.scheme, matrix.field
    scale_field = part_of(field, "_scale")
    if scheme.code == "e2m1":
        return _four_bit_floats(matrix, value)
    if scheme.scales == "group":
        return _integer_groups(matrix, value)
    most = 448.0 if scheme.code == "e4m3" else 127.0
    scale = _largest(matrix, value, scheme.scales) / most
    values = value / _divisor(spread(scale, matrix, scheme.scales))
    codes = values.clamp(-most, most)
    stored = codes.to(E4M3) if scheme.code == "e4m3" else codes.round().to(torch.int8)
    return {field: stored, scale_field: scale}


def _largest(matrix: Matrix, value: Tensor, kind: str) -> Tensor:
    """The largest magnitude of each set of weights that share a scale, in the shape of the scales."""
    size = value.abs()
    if kind == "tensor":
        return size.reshape(matrix.pieces, -1).amax(dim=1)
    if kind == "channel":
        return size.amax(dim=1)
    if kind == "group":
        return _groups(matrix, size).amax(dim=-1)
    height, width = matrix.block
    pieces = size.reshape(matrix.pieces, matrix.piece_rows, matrix.columns)
    pieces = F.pad(pieces, (0, -matrix.columns % width, 0, -matrix.piece_rows % height))
    high, wide = pieces.shape[1] // height, pieces.shape[2] // width
    blocks = pieces.reshape(matrix.pieces, high, height, wide, width)
    return blocks.amax(dim=(2, 4)).flatten(0, 1)


def _groups(matrix: Matrix, value: Tensor) -> Tensor:
    padded = F.pad(value, (0, -matrix.columns % matrix.group))
    return padded.reshape(*padded.shape[:-1], -1, matrix.group)


def _divisor(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, 1.0)


def _integer_groups(matrix: Matrix, value: Tensor) -> dict[str, Tensor]:
    bits = 8 if matrix.scheme.code == "int8" else 4
    steps, dtype = 2**bits - 1, getattr(torch, matrix.quant.dtype)
    tensors: dict[str, Tensor] = {}
    if matrix.quant.symmetric:
        # The scale is rounded first, and the codes belong to what is stored.
        scale = (_largest(matrix, value, "group") / (steps // 2)).to(dtype)
        codes = (value / _divisor(spread(scale.float(), matrix, "group"))).round().clamp(-(steps // 2) - 1, steps // 2)
        if bits == 8:
            codes = codes.clamp(min=-127).to(torch.int8)
        else:
            codes = codes + 8
    else:
        groups = _groups(matrix, value)
        low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
        scale = ((high - low) / steps).to(dtype)
        zero = (-low / _divisor(scale.float())).round().clamp(0, steps)
        codes = (value / _divisor(spread(scale.float(), matrix, "group"))).round()
        codes = (codes + spread(zero, matrix, "group")).clamp(0, steps)
        tensors[part_of(matrix.field, "_zero_point")] = zero.to(torch.uint8)
        if bits == 8:
            codes = codes.to(torch.uint8)
    stored = pack(codes) if bits == 4 else codes
    return {matrix.field: stored, part_of(matrix.field, "_scale"): scale, **tensors}


def _four_bit_floats(matrix: Matrix, value: Tensor) -> dict[str, Tensor]:
    largest, scale_field = _largest(matrix, value, "group"), part_of(matrix.field, "_scale")
    if matrix.scheme_name == "mxfp4":
        # 2 ** floor(log2(largest)) is shared, less the exponent of the largest e2m1 number, 4.
        exponent = torch.frexp(largest).exponent.clamp(min=-124) - 3
        codes = (exponent + 127).clamp(0, 254).masked_fill(largest == 0, 0).to(torch.uint8)
        divided = value / spread(e8m0_values(codes), matrix, "group")
        return {matrix.field: pack(e2m1_codes(divided)), scale_field: codes}
    whole = _largest(matrix, value, "tensor") / (6.0 * 448.0)
    each = largest / 6.0 / _divisor(whole.repeat_interleave(matrix.piece_rows)[:, None])
    scale = each.clamp(max=448.0).to(E4M3)
    spread_out = spread(scale.float(), matrix, "group") * spread(whole, matrix, "tensor")
    return {
        matrix.field: pack(e2m1_codes(value / _divisor(spread_out))),
        scale_field: scale,
        part_of(matrix.field, "_scale_2"): whole,
    }
