"""Where the tensors of MoEWeights come from: names in transformers' modules, and what lies between the two layouts.

A slot stores one parameter or buffer. Where transformers has the tensor whole, that very object is stored, and what
differs (a transposition, a slice) is a view taken at bind: nothing is copied. Where it has the tensor in pieces (gate
and up apart, one module an expert), the pieces are packed once, and state_dict takes them apart again under their
names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Transposed:
    """[E, A, B] -> [E, B, A]."""

    def __call__(self, stored: Tensor) -> Tensor:
        return stored.transpose(-1, -2)


@dataclass(frozen=True)
class FirstRows:
    """[M, ...] -> [count, ...]."""

    count: int

    def __call__(self, stored: Tensor) -> Tensor:
        return stored[: self.count]


@dataclass(frozen=True)
class PerExpert:
    """[E * A, B] -> [E, A, B], transposed if asked."""

    experts: int
    transposed: bool = False

    def __call__(self, stored: Tensor) -> Tensor:
        split = stored.view(self.experts, -1, stored.shape[-1])
        return split.transpose(1, 2) if self.transposed else split


@dataclass(frozen=True)
class OnePlus:
    """1 + weight, in float32: norms that store their distance from one."""

    def __call__(self, stored: Tensor) -> Tensor:
        return 1.0 + stored.float()


@dataclass(frozen=True)
class FlatFloat:
    """Any shape -> [n] float32; a copy only where the dtype differs."""

    def __call__(self, stored: Tensor) -> Tensor:
        return stored.reshape(-1).float()


@dataclass(frozen=True)
class Slot:
    """One tensor of MoEWeights.

    Args:
        field: its name in MoEWeights.
        names: where transformers keeps it, or its pieces, as in the block's state_dict.
        view: from what is stored to the canonical layout.
        piece: the shape in which pieces are joined along ``dim``; None leaves them as they are.
        dim: the dimension along which pieces are joined.
    """

    field: str
    names: tuple[str, ...]
    view: View | None = None
    piece: tuple[int, ...] | None = None
    dim: int = 0

    def pack(self, pieces: list[Tensor]) -> Tensor:
        """What is stored; the one piece itself, where there is one."""
        if len(pieces) == 1:
            return pieces[0]
        if self.piece is not None:
            pieces = [piece.reshape(self.piece) for piece in pieces]
        return torch.cat(pieces, dim=self.dim)

    def unpack(self, stored: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        """The pieces again, in their own shapes."""
        if len(self.names) == 1:
            return [stored]
        sizes = [shape[self.dim] if self.piece is None else self.piece[self.dim] for shape in shapes]
        return [piece.reshape(shape) for piece, shape in zip(stored.split(sizes, self.dim), shapes, strict=True)]


@dataclass(frozen=True)
class StoredSlot:
    """A slot, the shapes of its pieces, and whether its view computes something that a later write leaves stale."""

    slot: Slot
    shapes: tuple[torch.Size, ...]

    @property
    def computed(self) -> bool:
        """Whether the view is more than a view."""
        return isinstance(self.slot.view, OnePlus | FlatFloat)


def find(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that dotted name; None where there is none."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    found = getattr(owner, leaf, None)
    return found if isinstance(found, Tensor) else None


def store(target: nn.Module, source: nn.Module, slots: list[Slot]) -> tuple[StoredSlot, ...]:
    """Register every slot's tensor on ``target`` under its field's name."""
    stored = []
    for slot in slots:
        pieces = []
        for name in slot.names:
            piece = find(source, name)
            if piece is None:
                raise KeyError(name)
            pieces.append(piece)
        value: Any = pieces[0]
        if len(pieces) > 1:
            with torch.no_grad():
                value = slot.pack(pieces)
            if isinstance(pieces[0], nn.Parameter):
                value = nn.Parameter(value, requires_grad=any(piece.requires_grad for piece in pieces))
        if isinstance(value, nn.Parameter):
            target.register_parameter(slot.field, value)
        else:
            target.register_buffer(slot.field, value)
        stored.append(StoredSlot(slot, tuple(piece.shape for piece in pieces)))
    return tuple(stored)


def save_names(slots: tuple[StoredSlot, ...], state: dict[str, Any], prefix: str) -> None:
    """Rename a state_dict's canonical entries to transformers', in place."""
    for stored in slots:
        value = state.pop(prefix + stored.slot.field, None)
        if value is not None:
            pieces = stored.slot.unpack(value, list(stored.shapes))
            state.update({prefix + name: piece for name, piece in zip(stored.slot.names, pieces, strict=True)})


def load_names(slots: tuple[StoredSlot, ...], state: dict[str, Any], prefix: str) -> None:
    """The reverse of :func:`save_names`; entries that are missing stay missing and are reported by torch."""
    for stored in slots:
        names = [prefix + name for name in stored.slot.names]
        if all(name in state for name in names):
            state[prefix + stored.slot.field] = stored.slot.pack([state.pop(name) for name in names])
