"""Quantised matrices as the kernel's codes.h takes them: codes, scales a group, zero points and a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from moe_core import MoEConfig, MoEWeights
from moe_core.quant.layout import E2M1_VALUES, Matrix, matrix_of, part_of
from moe_core.quant.packing import e8m0_values, unpack

SCHEMES: Final = ("int8_weight_only", "int4_weight_only", "mxfp4", "nvfp4")
"""Weights alone are quantised, with a scale for a group of inputs."""
TABLES: Final[Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {
        "int4": tuple(range(16)),
        "e2m1": (*E2M1_VALUES, *(-value for value in E2M1_VALUES)),
    }
)


@dataclass(frozen=True)
class Coded:
    """[E, N, K] of codes; ``coded[expert]`` are those of one, a byte each.

    Attributes:
        dtype: in which the layer computes. bits: 8 (signed numbers) or 4 (places in ``table``).
        scales, zeros: [E, N, groups] float32; a weight is (number - zero) * scale. group: inputs that share a scale.
    """

    stored: Tensor
    matrix: Matrix
    dtype: torch.dtype
    bits: int
    scales: Tensor
    zeros: Tensor | None
    table: Tensor | None

    @classmethod
    def of(cls, config: MoEConfig, weights: MoEWeights, field: str) -> Coded | None:
        """A matrix of the layer; None where it is not quantised. Shared ones are one expert."""
        matrix = matrix_of(config, field)
        if matrix is None:
            return None
        tensors = {name: getattr(weights, name) for name in matrix.parts()}
        if not matrix.lead:
            tensors = {name: None if tensor is None else tensor[None] for name, tensor in tensors.items()}
        stored, scales = tensors[field], tensors[part_of(field, "_scale")]
        zeros = tensors.get(part_of(field, "_zero_point"))
        if matrix.scheme_name == "mxfp4":
            scales = e8m0_values(scales)
        elif matrix.scheme_name == "nvfp4":
            whole = tensors[part_of(field, "_scale_2")].repeat_interleave(matrix.piece_rows, dim=1)
            scales = scales.float() * whole[..., None]
        zeros = None if zeros is None else zeros.to(torch.float32, copy=True)
        table = TABLES.get(matrix.scheme.code)
        if table is None and stored.dtype is torch.uint8:
            zeros -= 128  # codes become signed below
        elif matrix.scheme.code == "int4" and zeros is None:
            table = tuple(value - 8 for value in table or ())
        return cls(
            stored,
            matrix,
            getattr(torch, matrix.quant.dtype),
            8 if table is None else 4,
            scales.float(),
            zeros,
            None if table is None else torch.tensor(table, dtype=torch.float32, device="cpu"),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, N, K."""
        return len(self.stored), self.matrix.rows, self.matrix.columns

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.matrix.group

    def __getitem__(self, expert: int) -> Tensor:
        """[N, K] of uint8; numbers of eight bits in two's complement."""
        stored = self.stored[expert]
        if self.bits == 4:
            return unpack(stored, self.matrix.columns)
        return stored ^ 128 if stored.dtype is torch.uint8 else stored.view(torch.uint8)
