"""From stored weights to the numbers that they mean: the definition of every scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import MATRICES, Matrix, matrices, part_of
from .packing import e2m1_values, e8m0_values, unpack

if TYPE_CHECKING:
    from ..config import MoEConfig
    from ..weights import MoEWeights


def spread(scale: Tensor, matrix: Matrix, kind: str) -> Tensor:
    """A scale a weight: [..., rows, columns] from the scales as they are stored, by which weights share one."""
    rows, columns = matrix.rows, matrix.columns
    if kind == "tensor":
        return scale.repeat_interleave(matrix.piece_rows, dim=-1)[..., None].expand(*scale.shape[:-1], rows, columns)
    if kind == "channel":
        return scale[..., None].expand(*scale.shape, columns)
    if kind == "group":
        return scale.repeat_interleave(matrix.group, dim=-1)[..., :columns]
    height, width = matrix.block
    scale = scale.repeat_interleave(width, dim=-1)[..., :columns]
    # Blocks begin anew at the first up row.
    pieces: Tensor = scale.unflatten(-2, (matrix.pieces, -1))
    pieces = pieces.repeat_interleave(height, dim=-2)[..., : matrix.piece_rows, :]
    return pieces.flatten(-3, -2)


def dequantise_matrix(matrix: Matrix, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """float32 [..., rows, columns].

    Args:
        tensors: field of MoEWeights -> tensor; those of one expert may lack the leading dimension.
    """
    scheme, field = matrix.scheme, matrix.field
    stored, scale = tensors[field], tensors[part_of(field, "_scale")]
    assert stored is not None and scale is not None
    if scheme.code == "e2m1":
        values = e2m1_values(unpack(stored, matrix.columns))
        if matrix.scheme_name == "mxfp4":
            return values * spread(e8m0_values(scale), matrix, "group")
        whole = tensors[part_of(field, "_scale_2")]
        assert whole is not None
        return values * spread(scale.float(), matrix, "group") * spread(whole, matrix, "tensor")
    if scheme.code == "int4":
        values = unpack(stored, matrix.columns).float()
    else:
        values = stored.float()
    if scheme.scales == "group":
        zero = tensors.get(part_of(field, "_zero_point"))
        if zero is not None:
            values = values - spread(zero.float(), matrix, "group")
        elif scheme.code == "int4":
            values = values - 8
    return values * spread(scale.float(), matrix, scheme.scales)


def tensors_of(weights: MoEWeights, matrix: Matrix) -> dict[str, Tensor | None]:
    """The tensors of one matrix, by their fields."""
    return {field: getattr(weights, field) for field in matrix.parts()}


def dequantise(
    config: MoEConfig, weights: MoEWeights, dtype: torch.dtype | None = None
) -> tuple[MoEConfig, MoEWeights]:
    """The same layer unquantised: the oracle of weight-only schemes, for backends without kernels for them.

    Args:
        dtype: of the result's matrices; None is the layer's, ``config.quant.dtype``.
    Returns:
        the config without ``quant``, and weights of which every other tensor is shared with ``weights``.
    """
    if config.quant is None:
        return config, weights
    dtype = dtype or getattr(torch, config.quant.dtype)
    changes: dict[str, Tensor | None] = {}
    for field, matrix in matrices(config).items():
        tensors = tensors_of(weights, matrix)
        changes |= dict.fromkeys(tensors, None)
        stored = tensors[field]
        if stored is None:
            continue
        if matrix.lead:
            # Expert by expert: the float32 values of all of them would need eight times the room of four bits.
            out = torch.empty(*matrix.lead, matrix.rows, matrix.columns, dtype=dtype, device=stored.device)
            for expert in range(matrix.lead[0]):
                out[expert] = dequantise_matrix(matrix, slice_of(matrix, tensors, expert))
            changes[field] = out
        else:
            changes[field] = dequantise_matrix(matrix, tensors).to(dtype)
    changes |= {
        field: tensor.to(dtype)
        for field, tensor in weights.named_tensors()
        if field in MATRICES and field not in changes
    }
    return dataclasses.replace(config, quant=None), dataclasses.replace(weights, **changes)


def slice_of(matrix: Matrix, tensors: Mapping[str, Tensor | None], expert: int | Tensor) -> dict[str, Tensor | None]:
    """The tensors of one expert; ``expert`` may be a tensor [1] that holds its index and is not waited for."""
    held, whole = matrix.lead[0] if matrix.lead else 0, part_of(matrix.field, "_input_scale")

    def one(field: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or field == whole or not held:
            return tensor
        if isinstance(expert, int):
            return tensor[expert]
        # float8 has no index_select everywhere; bytes have.
        data = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        return data.index_select(0, expert)[0].view(tensor.dtype)

    return {field: one(field, tensor) for field, tensor in tensors.items()}
