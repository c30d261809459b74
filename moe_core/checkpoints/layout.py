"""Where the tensors of MoEWeights lie in a checkpoint, as data."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import CheckpointError
from ..weights import MoEWeights

EXPERT_FIELDS = ("w13_weight", "w2_weight", "w13_bias", "w2_bias")
"""Fields with one slice an expert."""

GATE_AND_UP = ("w13_weight", "w13_bias", "shared_w13_weight", "shared_w13_bias")
"""Fields whose rows are those of gate and up."""

AS_CONFIG = "as_config"
"""``Entry.interleaved``: the file's rows are in the order of ``config.w13_interleaved``, whichever that is."""

_FIELDS = tuple(field.name for field in dataclasses.fields(MoEWeights))


@dataclass(frozen=True)
class Entry:
    """Where one field of MoEWeights lies.

    Args:
        field: its name in MoEWeights.
        names: tensor names below the layer's prefix; ``{e}`` stands for an expert's global id, and a leading ``../``
            for one level above the prefix. Several names are pieces that are joined along the rows: gate, then up.
        transposed: the file has [in, out]. None: the shapes tell.
        interleaved: rows alternate gate, up, gate, up. None: neither names nor shapes tell, the caller has to say.
        flat: the experts are joined along the first dimension of the file: [E * rows, columns].
        unsqueezed: the file has a leading dimension of 1. None: the shape tells.

    Raises:
        CheckpointError: no such field, or names that do not fit it.
    """

    field: str
    names: tuple[str, ...]
    transposed: bool | None = False
    interleaved: bool | str | None = False
    flat: bool = False
    unsqueezed: bool | None = False

    def __post_init__(self) -> None:
        if self.field not in _FIELDS:
            raise CheckpointError(f"Entry.field={self.field!r}: expected a field of MoEWeights: {', '.join(_FIELDS)}")
        object.__setattr__(self, "names", tuple(self.names))
        if len(self.names) != 1 and not (len(self.names) == 2 and self.field in GATE_AND_UP):
            raise CheckpointError(
                f"Entry.names={self.names!r}: expected one name for {self.field}, or two (gate, up) for any of "
                f"{', '.join(GATE_AND_UP)}"
            )
        counts = {name.count("{e}") for name in self.names}
        if len(counts) > 1 or max(counts) > 1 or (1 in counts and self.field not in EXPERT_FIELDS):
            raise CheckpointError(
                f"Entry.names={self.names!r}: expected {{e}} once in every name or in none, and only in those of "
                f"{', '.join(EXPERT_FIELDS)}"
            )

    @property
    def per_expert(self) -> bool:
        """Whether every expert has tensors of its own."""
        return "{e}" in self.names[0]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one tensor in the file, from the canonical shape of the field with all experts."""
        experts, shape = (shape[:1], shape[1:]) if self.field in EXPERT_FIELDS else ((), shape)
        shape = (shape[0] // len(self.names), *shape[1:])
        if self.transposed:
            shape = shape[::-1]
        if self.flat:
            return (experts[0] * shape[0], *shape[1:])
        if self.unsqueezed:
            shape = (1, *shape)
        return shape if self.per_expert else (*experts, *shape)

    def row_slices(self, piece: int, rows: int, interleaved: bool) -> list[tuple[slice, slice]]:
        """Which rows of a stored piece are which rows of the field.

        Args:
            piece: index into ``names``.
            rows: of the whole field (of one expert).
            interleaved: the order in which MoEWeights has them, ``config.w13_interleaved``.
        Returns:
            pairs (rows in the file's piece, rows in MoEWeights).
        """
        half = rows // 2
        packed = (slice(0, half), slice(half, rows))
        alternating = (slice(0, rows, 2), slice(1, rows, 2))
        if len(self.names) == 2:
            return [(slice(0, half), (alternating if interleaved else packed)[piece])]
        if self.field not in GATE_AND_UP or self.interleaved in (AS_CONFIG, interleaved):
            return [(slice(0, rows), slice(0, rows))]
        if interleaved:
            return list(zip(packed, alternating, strict=True))
        return list(zip(alternating, packed, strict=True))


@dataclass(frozen=True)
class Layout:
    """How one MoE layer is stored: an entry for each field that is there."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        fields = [entry.field for entry in self.entries]
        repeated = sorted({field for field in fields if fields.count(field) > 1})
        if repeated:
            raise CheckpointError(f"Layout has more than one entry for {', '.join(repeated)}; leave one of them")

    def entry(self, field: str) -> Entry | None:
        """The entry of a field, or None."""
        return next((entry for entry in self.entries if entry.field == field), None)

    def replace(self, field: str, **changes: Any) -> Layout:
        """A layout in which the entry of ``field`` has these attributes."""
        return Layout(
            tuple(dataclasses.replace(e, **changes) if e.field == field else e for e in self.entries),
        )

    def __str__(self) -> str:
        return "\n".join(f"  {entry.field:<24}{' + '.join(entry.names)}" for entry in self.entries)


@cache
def pattern(name: str) -> re.Pattern[str]:
    """What a name matches, whole: an exact name, or one with an expert's id in decimal without leading zeros."""
    return re.compile(r"(0|[1-9]\d*)".join(re.escape(part) for part in name.split("{e}")))


def normalise(prefix: str) -> str:
    """``model.layers.0.mlp`` with the dot behind it; "" stays."""
    prefix = prefix.strip(".")
    return f"{prefix}." if prefix else ""


def absolute(prefix: str, name: str) -> str | None:
    """The full name of a tensor; None where ``../`` leads above the top."""
    while name.startswith("../"):
        if not prefix:
            return None
        prefix, name = normalise(prefix[:-1].rpartition(".")[0]), name[3:]
    return prefix + name
