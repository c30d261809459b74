"""Quantised tensors of a checkpoint, seen as the plain ones that they stand for: by whose names layouts are found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..config import QuantConfig
from ..errors import CheckpointError
from ..quant.config import SCHEMES
from .files import CheckpointFiles

LINEAR = (
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_packed",
    "input_scale",
    "input_global_scale",
    "qweight",
    "qzeros",
    "scales",
    "scale",
    "g_idx",
)
"""Last components of names beside, or in place of, ``weight`` of a linear layer."""

STACKED = ("_blocks", "_scale_inv", "_scales", "_input_scale", "_scale_2", "_scale", "_zero_point")
"""Ends of names beside, or in place of, a parameter that holds all experts."""

KEYS = {
    "_blocks": "blocks",
    "_scales": "scales",
    "_input_scale": "input_scale",
    "_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    "_scale_2": "weight_scale_2",
    "_zero_point": "weight_zero_point",
}
_MAIN = ("weight", "weight_packed", "qweight", "blocks")


@dataclass
class Stored:
    """The tensors of one quantised matrix: what each is called in its format -> its full name."""

    parts: dict[str, str] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """What the weights themselves are called in their format; "" where they are missing."""
        return next((key for key in _MAIN if key in self.parts), "")


class PlainNames(Mapping[str, tuple[int, ...]]):
    """Names and shapes of the layer as if it were not quantised.

    Args:
        files: the checkpoint. quant: its schemes, which say how many columns a byte holds.
    Attributes:
        stored: full name of a plain tensor -> what is there in its place, for quantised ones.
    """

    def __init__(self, files: CheckpointFiles, quant: QuantConfig) -> None:
        self.files, self.quant = files, quant
        self.stored: dict[str, Stored] = {}
        self._plain: dict[str, None] = {}
        for name in files:
            plain, key = self._belongs_to(name)
            if key:
                self.stored.setdefault(plain, Stored()).parts[key] = name
            else:
                self._plain[name] = None
        for plain, stored in self.stored.items():
            if plain in self._plain:
                stored.parts["weight"] = plain
            self._plain[plain] = None

    def _belongs_to(self, name: str) -> tuple[str, str]:
        stem, dot, last = name.rpartition(".")
        if last in LINEAR and (last != "scale" or f"{stem}.weight" in self.files):
            return f"{stem}.weight", last
        for end in STACKED:
            base = f"{stem}{dot}{last.removesuffix(end)}"
            if last.endswith(end) and (base in self.files or f"{base}_blocks" in self.files):
                return base, KEYS[end]
            if end == "_input_scale" and last.endswith(end) and f"{base}_weight" in self.files:
                return f"{base}_weight", "input_scale"
        return name, ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)

    def __contains__(self, name: object) -> bool:
        return name in self._plain

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """The shape that the tensor would have unquantised."""
        stored = self.stored.get(name)
        if stored is None:
            return self.files[name]
        if not stored.main:
            raise CheckpointError(
                f"{', '.join(stored.parts.values())}: no weights beside them, expected {name} or another of "
                f"{', '.join(_MAIN)}; the file is incomplete"
            )
        shape = self.files[stored.parts[stored.main]]
        if stored.main == "blocks":
            return (*shape[:-2], shape[-2] * shape[-1] * 2)
        if stored.main == "qweight":
            return self._qweight(stored, shape)
        each = 1
        if self.files.dtype(stored.parts[stored.main]) == "I32":
            each = 32 // self.bits
        elif self.files.dtype(stored.parts[stored.main]) in ("U8", "I8") and self.bits == 4:
            each = 2
        return (*shape[:-1], shape[-1] * each)

    @property
    def bits(self) -> int:
        """Of one stored weight."""
        return 4 if SCHEMES[self.quant.scheme].packed else 8

    def _qweight(self, stored: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
        # GPTQ packs columns of the matrix, AWQ rows; scales are [groups, rows] in both.
        rows = self.files[stored.parts["scales"]][1] if "scales" in stored.parts else 0
        each = 32 // self.bits
        return (rows, shape[0] * each) if shape[1] == rows else (rows, shape[0])
