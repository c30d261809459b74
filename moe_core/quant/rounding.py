"""Activations as a W8A8 scheme sees them: rounded to eight bits, each row (or piece of one) with a scale of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import E4M3, Matrix

LARGEST = {"e4m3": 448.0, "int8": 127.0}
"""The largest number of a code."""


def quantise_rows(x: Tensor, code: str, group: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations: ``x`` is about ``codes * scales``.

    Args:
        x: [n, K] float32.
        code: ``e4m3`` or ``int8``.
        group: columns that share a scale; the last group of a row may be shorter.
        scale: [1], fixed beforehand for all; None takes largest magnitude / largest number of the code.
    Returns:
        codes [n, K] float8_e4m3fn or int8, and float32 scales [n, ceil(K / group)]; 0 where a group holds only zeros.
    """
    rows, columns = x.shape
    pieces = F.pad(x, (0, -columns % group)).view(
        rows, -(-columns // group), group
    )  # not -1: of no rows nobody can tell
    if scale is None:
        scales = pieces.abs().amax(dim=-1) / LARGEST[code]
    else:
        scales = scale.expand(rows, pieces.shape[1])
    most = LARGEST[code]
    values = (pieces / scales.masked_fill(scales == 0, 1.0)[..., None]).clamp(-most, most).flatten(1)[:, :columns]
    codes = values.to(E4M3) if code == "e4m3" else torch.round(values).to(torch.int8)
    return codes, scales


def rounded(x: Tensor, matrix: Matrix, input_scale: Tensor | None) -> Tensor:
    """[n, K] float32 as the product with ``matrix`` sees it: unchanged where its scheme leaves activations alone."""
    code = matrix.scheme.activations
    if code is None:
        return x
    columns = x.shape[1]
    group = matrix.block[1] if matrix.scheme.scales == "block" else columns
    codes, scales = quantise_rows(x, code, group, input_scale)
    return codes.float() * scales.repeat_interleave(group, dim=1)[:, :columns]
