"""Reading the quantised matrices of a layer: pieces and experts of any known format, joined in the canonical layout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import MoEConfig
from ..errors import CheckpointError
from ..quant.layout import Matrix, matrix_of, part_of
from .formats import Parts, convert
from .layout import Entry, absolute
from .stored import PlainNames, Stored


class QuantisedReader:
    """Reads entries whose config says that they are quantised.

    Args:
        names: of the checkpoint, seen as plain ones. ids: global ids of the experts to hold.
    """

    def __init__(self, names: PlainNames, prefix: str, config: MoEConfig, ids: list[int], device: torch.device) -> None:
        self.names, self.prefix, self.config, self.ids, self.device = names, prefix, config, ids, device

    def fields(self, entry: Entry) -> dict[str, Tensor]:
        """Field of MoEWeights -> tensor, of a matrix with all that goes with it."""
        matrix = matrix_of(self.config, entry.field)
        assert matrix is not None
        if entry.transposed or entry.flat:
            raise CheckpointError(
                f"{self.prefix}{entry.names[0]}: quantised matrices are read as [out, in] of each expert; these are "
                f"transposed or flat"
            )
        out: dict[str, Tensor] = {}
        for piece, template in enumerate(entry.names):
            for first, parts in self._pieces(matrix, entry, template):
                self._join(matrix, entry, piece, first, parts, out)
        for field, part in matrix.parts().items():
            if field not in out and not part.optional:  # no expert is held here
                out[field] = torch.empty(part.shape, dtype=part.dtypes[0], device=self.device)
        return out

    def _pieces(self, matrix: Matrix, entry: Entry, template: str) -> Iterator[tuple[int, Parts]]:
        """(local id of the first expert, canonical tensors with a leading dimension) of one name."""
        rows = matrix.rows // len(entry.names)
        if entry.per_expert:
            for local, expert in enumerate(self.ids):
                name = self._full(template.replace("{e}", str(expert)))
                raw = {key: self.names.files.read(full) for key, full in self._stored(name).parts.items()}
                yield local, _leading(self._converted(matrix, rows, raw, name))
            return
        name = self._full(template)
        parts = self._stored(name).parts
        if not matrix.lead:
            raw = {key: self.names.files.read(full) for key, full in parts.items()}
            yield 0, self._converted(matrix, rows, raw, name)
            return
        count = self.names[name][0]
        for local, expert in enumerate(self.ids):
            raw = {}
            for key, full in parts.items():
                has_experts = len(self.names.files[full]) > 0 and self.names.files[full][0] == count
                if has_experts:
                    raw[key] = self.names.files.read_rows(full, expert, expert + 1)[0]
                else:
                    raw[key] = self.names.files.read(full)
            yield local, _leading(self._converted(matrix, rows, raw, name))

    def _converted(self, matrix: Matrix, rows: int, raw: dict[str, Tensor], name: str) -> Parts:
        parts = convert(matrix, rows, raw, name)
        found, expected = tuple(parts[""].shape), (rows, matrix.parts()[matrix.field].shape[-1])
        if found != expected:
            raise CheckpointError(
                f"{name} holds {found} as stored by {matrix.scheme_name}, expected {expected} from the config's sizes; "
                f"mend one or the other"
            )
        return parts

    def _full(self, name: str) -> str:
        return absolute(self.prefix, name) or name

    def _stored(self, name: str) -> Stored:
        stored = self.names.stored.get(name)
        if stored is None:
            raise CheckpointError(
                f"{name} is not quantised in this file (or is missing), but config.quant={self.config.quant!r} says "
                f"so; mend config.quant, or load it unquantised and use moe_core.quant.quantise"
            )
        return stored

    def _join(self, matrix: Matrix, entry: Entry, piece: int, first: int, parts: Parts, out: dict[str, Tensor]) -> None:
        wanted = matrix.parts()
        for suffix, tensor in parts.items():
            field = matrix.field if not suffix else part_of(matrix.field, suffix)
            tensor = tensor.to(self.device)
            if suffix == "_input_scale":
                out[field] = torch.maximum(out[field], tensor) if field in out else tensor
                continue
            shape = wanted[field].shape
            if field not in out:
                out[field] = torch.zeros(shape, dtype=tensor.dtype, device=self.device)
            target = out[field][first : first + 1] if matrix.lead else out[field]
            target, tensor = (target, tensor) if matrix.lead else (target[None], tensor[None])
            if suffix == "_scale_2" or (suffix == "_scale" and matrix.scheme.scales == "tensor"):
                self._whole(matrix, entry, piece, first, target, tensor)
            elif suffix == "_scale" and matrix.scheme.scales == "block":
                self._blocks(matrix, entry, piece, target, tensor)
            else:
                for source, to in entry.row_slices(piece, matrix.rows, self.config.w13_interleaved):
                    _copy(target[:, to], tensor[:, source], field)

    def _whole(self, matrix: Matrix, entry: Entry, piece: int, first: int, target: Tensor, tensor: Tensor) -> None:
        """A scale of a whole piece; one that stands for both pieces is written twice."""
        if len(entry.names) == matrix.pieces:
            _copy(target[:, piece : piece + 1] if tensor.shape[1] == 1 else target, tensor, entry.field)
        elif len(entry.names) == 1:
            target.copy_(tensor.expand_as(target))
        elif piece and not torch.equal(target, tensor):
            raise CheckpointError(
                f"{entry.names[0]} and {entry.names[1]} have different scales, and interleaved rows share one; set "
                f"config.w13_interleaved=False"
            )
        else:
            _copy(target, tensor, entry.field)

    def _blocks(self, matrix: Matrix, entry: Entry, piece: int, target: Tensor, tensor: Tensor) -> None:
        """Scales of blocks; blocks of rows cannot be cut."""
        stored = entry.interleaved is True
        if len(entry.names) == 2 and matrix.pieces == 1:
            stored = True  # two matrices, of which the config wants the rows to alternate
        elif len(entry.names) == 1 and entry.field.endswith("w13_weight") and self.config.gated:
            stored = entry.interleaved not in ("as_config", self.config.w13_interleaved)
        high = matrix.block[0]
        cut = len(entry.names) == 1 and matrix.pieces == 2 and matrix.piece_rows % high
        if stored or (cut and tensor.shape[1] != target.shape[1]):
            raise CheckpointError(
                f"{entry.names[piece]}: blocks of {high} rows would be cut, by another order of gate and up rows or "
                f"because I={matrix.piece_rows} is no multiple of {high} in a fused tensor; keep the file's order with "
                f"config.w13_interleaved, or dequantise it"
            )
        if len(entry.names) == 1:
            _copy(target, tensor, entry.field)
        else:
            half = target.shape[1] // 2
            _copy(target[:, piece * half : (piece + 1) * half], tensor, entry.field)


def _leading(parts: Parts) -> Parts:
    """The tensors of one expert as those of several; an input scale is of no expert."""
    return {suffix: tensor if suffix == "_input_scale" else tensor[None] for suffix, tensor in parts.items()}


def _copy(target: Tensor, tensor: Tensor, field: str) -> None:
    if target.shape != tensor.shape:
        raise CheckpointError(
            f"{field}: what goes with it has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}; mend the "
            f"group size or block shape of config.quant"
        )
    target.copy_(tensor)
