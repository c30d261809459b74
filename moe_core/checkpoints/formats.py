"""From the tensors of published formats to those of docs/quantisation.md, one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant.layout import E4M3, Matrix
from ..quant.packing import pack

Parts = dict[str, Tensor]
"""What goes with a matrix ("" for itself, "_scale", "_zero_point", "_scale_2", "_input_scale") -> tensor."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns the i-th four bits of an AWQ word are."""


def convert(matrix: Matrix, rows: int, raw: Mapping[str, Tensor], name: str) -> Parts:
    """The canonical tensors of ``rows`` rows of a matrix, or of several experts' with a leading dimension.

    Args:
        raw: what a tensor is called in its format -> tensor.
        name: of the weights, for messages.
    Raises:
        CheckpointError: a scale is missing, or the format is used in a way that no scheme has.
    """
    code = matrix.scheme.code
    if code == "e2m1":
        return _four_bit_floats(matrix, rows, raw, name)
    if matrix.scheme.scales == "group":
        if "qweight" in raw:
            return _by_columns(matrix, raw, name)
        return _integers(matrix, rows, raw, name)
    weight = _needed(raw, name, "weight")
    wanted = E4M3 if code == "e4m3" else torch.int8
    if weight.dtype is not wanted:
        raise CheckpointError(
            f"{name} has dtype {weight.dtype}, expected {wanted} with scheme {matrix.scheme_name}; mend config.quant, "
            f"or load it unquantised and use moe_core.quant.quantise"
        )
    lead = weight.shape[:-2]
    scale = _needed(raw, name, "weight_scale_inv", "weight_scale", "scale").float()
    if matrix.scheme.scales == "block":
        parts = {"": weight, "_scale": scale}
    elif matrix.scheme.scales == "channel":
        parts = {"": weight, "_scale": scale.reshape(*lead, -1)}
    else:
        parts = {"": weight, "_scale": scale.reshape(*lead, -1)}
        if "input_scale" in raw:
            parts["_input_scale"] = raw["input_scale"].float().amax().reshape(1)
    return parts


def _needed(raw: Mapping[str, Tensor], name: str, *keys: str) -> Tensor:
    for key in keys:
        if key in raw:
            return raw[key]
    raise CheckpointError(
        f"{name} has no {' or '.join(keys)} beside it, without which its numbers mean nothing; there is "
        f"{', '.join(raw)}: mend config.quant, or the file"
    )


def _four_bit_floats(matrix: Matrix, rows: int, raw: Mapping[str, Tensor], name: str) -> Parts:
    blocks = _needed(raw, name, "blocks", "weight_packed", "weight")
    if blocks.dtype.itemsize != 1:
        raise CheckpointError(f"{name} has dtype {blocks.dtype}, expected bytes of two weights; mend config.quant")
    weight = blocks.view(torch.uint8)
    weight = weight.flatten(-2) if "blocks" in raw else weight
    scale = _needed(raw, name, "scales", "weight_scale", "weight_scale_inv", "scale")
    if matrix.scheme_name == "mxfp4":
        return {"": weight, "_scale": scale.view(torch.uint8)}
    lead = weight.shape[:-2]
    if "weight_global_scale" in raw:
        whole = 1 / raw["weight_global_scale"].float()
    else:
        whole = _needed(raw, name, "weight_scale_2").float()
    return {"": weight, "_scale": scale, "_scale_2": whole.reshape(*lead, -1)}


def unpack_words(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [..., n] to uint8 [..., n * 32 / bits]; the lowest bits first, or as ``order`` has them."""
    each = 32 // bits
    codes = torch.stack([(words >> (bits * i)) & (2**bits - 1) for i in range(each)], dim=-1).to(torch.uint8)
    if order is not None:
        codes = codes[..., [order.index(i) for i in range(each)]]
    return codes.flatten(-2)


def _integers(matrix: Matrix, rows: int, raw: Mapping[str, Tensor], name: str) -> Parts:
    """compressed-tensors' formats, and MoEWeights' own."""
    four, symmetric = matrix.scheme.code == "int4", matrix.quant.symmetric
    if "weight_g_idx" in raw:
        raise CheckpointError(f"{name}: weight_g_idx gives columns groups out of order, which no scheme here has")
    scale = _needed(raw, name, "weight_scale")
    scale = scale if scale.ndim > 1 else scale[:, None]
    parts = {"_scale": scale}
    stored = _needed(raw, name, "weight_packed", "weight")
    zero = None if symmetric else _needed(raw, name, "weight_zero_point")
    if stored.dtype is torch.int32:
        codes = unpack_words(stored, 4 if four else 8)[..., : matrix.columns]
        if zero is not None and zero.dtype is torch.int32:
            zero = unpack_words(zero.transpose(-1, -2), 4 if four else 8).transpose(-1, -2)[..., :rows, :]
        parts[""] = _coded(codes, matrix)
    else:
        parts[""] = stored
    if zero is not None:
        parts["_zero_point"] = zero.to(torch.uint8)
    return parts


def _coded(codes: Tensor, matrix: Matrix) -> Tensor:
    """Unsigned codes [..., rows, columns] as a scheme stores them; symmetric ones are around the middle."""
    if matrix.scheme.code == "int4":
        return pack(codes)
    return (codes.to(torch.int16) - 128).to(torch.int8) if matrix.quant.symmetric else codes


def _by_columns(matrix: Matrix, raw: Mapping[str, Tensor], name: str) -> Parts:
    """GPTQ, whose words hold columns of a row, and AWQ, whose words hold rows; both transposed."""
    bits, words, scales = (4 if matrix.scheme.code == "int4" else 8), raw["qweight"], _needed(raw, name, "scales")
    gptq = words.shape[1] == scales.shape[1]
    zeros = _needed(raw, name, "qzeros")
    if gptq:
        codes = unpack_words(words.t(), bits)
        zero = unpack_words(zeros, bits).t()
        index = raw.get("g_idx")
        if index is not None:
            expected = torch.arange(matrix.columns, device=index.device) // matrix.group
            if not torch.equal(index.long(), expected):
                raise CheckpointError(f"{name}: g_idx gives columns groups out of order, which no scheme here has")
    else:
        codes, zero = unpack_words(words, bits, AWQ_ORDER).t(), unpack_words(zeros, bits, AWQ_ORDER).t()
    parts = {"": _coded(codes.contiguous(), matrix), "_scale": scales.t().contiguous()}
    middle = 2 ** (bits - 1)
    if matrix.quant.symmetric:
        # GPTQ's first format has zero points less 1.
        if not bool(((zero == middle) | (gptq & (zero == middle - 1))).all()):
            raise CheckpointError(
                f"{name} has zero points other than {middle}, expected none but that with config.quant.symmetric=True; "
                f"pass symmetric=False"
            )
        return parts
    zero = (zero + 1) & (2 * middle - 1) if gptq else zero
    return {**parts, "_zero_point": zero.contiguous()}
