"""Which tensors a quantised matrix consists of, with their shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .config import SCHEMES, QuantConfig, Scheme

if TYPE_CHECKING:
    from ..config import MoEConfig

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MATRICES = ("w13_weight", "w2_weight", "shared_w13_weight", "shared_w2_weight")
"""Fields of MoEWeights that may be quantised."""

SUFFIXES = ("_scale", "_zero_point", "_scale_2")
"""Of the fields that go with a matrix: ``w13_weight_scale`` and so on; its input scale is ``w13_input_scale``."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a code; the fourth is the sign."""


def cdiv(size: int, by: int) -> int:
    """How many pieces of ``by`` cover ``size``."""
    return -(-size // by)


def part_of(field: str, suffix: str) -> str:
    """The field that goes with a matrix: ``w13_weight`` and ``_scale`` give ``w13_weight_scale``."""
    return field.removesuffix("_weight") + suffix if suffix == "_input_scale" else field + suffix


@dataclass(frozen=True)
class Part:
    """One tensor of a quantised matrix: what it must be like."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix of a layer: [*lead, rows, columns] in meaning.

    Args:
        field: of MoEWeights. lead: (E,) for routed experts, () for shared ones.
        pieces: matrices that were joined along the rows and have scales of their own: 2 where gate rows come before up
            rows, 1 otherwise.
    """

    field: str
    scheme_name: str
    quant: QuantConfig
    lead: tuple[int, ...]
    rows: int
    columns: int
    pieces: int

    @property
    def scheme(self) -> Scheme:
        """What its scheme stores."""
        return SCHEMES[self.scheme_name]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        group = self.quant.group_of(self.scheme_name)
        return self.columns if group == -1 else group

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        assert self.quant.block_shape is not None
        return self.quant.block_shape

    @property
    def piece_rows(self) -> int:
        """Rows of one piece."""
        return self.rows // self.pieces

    def parts(self) -> dict[str, Part]:
        """Field of MoEWeights -> what it must be like."""
        scheme, lead, columns = self.scheme, self.lead, self.columns
        stored = (*lead, self.rows, cdiv(columns, 2) if scheme.packed else columns)
        weight = {"e4m3": E4M3, "int8": torch.int8 if self.quant.symmetric else torch.uint8}.get(
            scheme.code, torch.uint8
        )
        if scheme.code == "int8" and scheme.scales == "channel":
            weight = torch.int8
        parts = {self.field: Part(stored, (weight,))}
        floats: tuple[torch.dtype, ...] = (torch.float32,)
        if scheme.scales == "tensor":
            shape: tuple[int, ...] = (*lead, self.pieces)
            parts[part_of(self.field, "_input_scale")] = Part((1,), floats, optional=True)
        elif scheme.scales == "channel":
            shape = (*lead, self.rows)
        elif scheme.scales == "block":
            rows, width = self.block
            shape = (*lead, self.pieces * cdiv(self.piece_rows, rows), cdiv(columns, width))
        else:
            shape = (*lead, self.rows, cdiv(columns, self.group))
            if scheme.code == "e2m1":
                floats = (torch.uint8,) if self.scheme_name == "mxfp4" else (E4M3,)
            else:
                floats = FLOATS
                if not self.quant.symmetric:
                    parts[part_of(self.field, "_zero_point")] = Part(shape, (torch.uint8,))
        parts[part_of(self.field, "_scale")] = Part(shape, floats)
        if self.scheme_name == "nvfp4":
            parts[part_of(self.field, "_scale_2")] = Part((*lead, self.pieces), (torch.float32,))
        return parts


def matrix_of(config: MoEConfig, field: str) -> Matrix | None:
    """A matrix of the layer; None where it is not quantised, not there, or no matrix."""
    if field not in MATRICES:
        return None
    quant = config.quant
    scheme = None if quant is None else quant.scheme_of(field)
    shared = field.startswith("shared_")
    if quant is None or scheme is None or (shared and not config.has_shared_experts):
        return None
    inner = (config.shared_intermediate_size or 0) if shared else config.intermediate_size
    width = config.hidden_size if shared else config.expert_hidden_size
    lead = () if shared else (config.num_held_experts,)
    if field.endswith("w13_weight"):
        pieces = 2 if config.gated and not config.w13_interleaved else 1
        return Matrix(field, scheme, quant, lead, inner * (2 if config.gated else 1), width, pieces)
    return Matrix(field, scheme, quant, lead, width, inner, 1)


def matrices(config: MoEConfig) -> dict[str, Matrix]:
    """Field -> every quantised matrix of the layer."""
    found = {field: matrix_of(config, field) for field in MATRICES}
    return {field: matrix for field, matrix in found.items() if matrix is not None}


def quantised_parts(config: MoEConfig) -> Mapping[str, Part]:
    """Field of MoEWeights -> what it must be like, for every tensor that this config's quantisation asks for."""
    return {field: part for matrix in matrices(config).values() for field, part in matrix.parts().items()}
