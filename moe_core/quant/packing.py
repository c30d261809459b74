"""Codes of four bits in bytes, and the two small float formats that torch has no dtype for."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import E2M1_VALUES


def pack(codes: Tensor) -> Tensor:
    """[..., K] codes of 0 to 15 to bytes [..., ceil(K / 2)]: column 2i in the lower half, 2i + 1 in the upper one."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2)).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 [..., columns]."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :columns]


def e2m1_codes(values: Tensor) -> Tensor:
    """float32 to the nearest e2m1 number, ties to the even code, beyond 6 to 6: uint8 codes.

    Source: OCP Microscaling Formats 1.0, section 5.3.3.
    """
    size = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    # Half-way values; where the lower neighbour has an odd code, they belong to the upper one.
    for i, (low, high) in enumerate(itertools.pairwise(E2M1_VALUES)):
        middle = (low + high) / 2
        code += (size >= middle) if i % 2 else (size > middle)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """float32 of e2m1 codes."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    return table[codes.long()]


def e8m0_values(codes: Tensor) -> Tensor:
    """float32 2 ** (code - 127); 255 is NaN."""
    exponents = codes.view(torch.uint8).to(torch.float32) - 127
    return torch.exp2(exponents).masked_fill(codes.view(torch.uint8) == 255, float("nan"))
