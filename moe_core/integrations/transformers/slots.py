"""Where the tensors of MoEWeights come from: names in transformers' modules, and what lies between the two layouts.

A slot stores one parameter or buffer. Where transformers has the tensor whole, that very object is stored under the
very name, and what differs (a transposition, a slice) is a view taken at bind: nothing is copied. Where it has the
tensor in pieces (gate and up apart, one module an expert), the pieces are packed once under the field's name, and
state_dict takes them apart again under theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConversionError

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
class OneExpert:
    """[A, B] -> [1, A, B]."""

    def __call__(self, stored: Tensor) -> Tensor:
        return stored.unsqueeze(0)


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
        piece: the shape in which pieces are joined along ``dim``; None joins them as they are.
        dim: the dimension along which pieces are joined.
    """

    field: str
    names: tuple[str, ...]
    view: View | None = None
    piece: tuple[int, ...] | None = None
    dim: int = 0

    @property
    def packed(self) -> bool:
        """Whether what is stored is joined from pieces."""
        return len(self.names) > 1 or self.piece is not None

    def below(self, prefix: str) -> Slot:
        """The same in a module that holds this one's under ``prefix``."""
        return replace(self, names=tuple(prefix + name for name in self.names))

    def pack(self, pieces: list[Tensor]) -> Tensor:
        """What is stored, from pieces."""
        if self.piece is not None:
            pieces = [piece.reshape(self.piece) for piece in pieces]
        return torch.cat(pieces, dim=self.dim)

    def unpack(self, stored: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        """The pieces again, in their own shapes."""
        sizes = [shape[self.dim] if self.piece is None else self.piece[self.dim] for shape in shapes]
        return [piece.reshape(shape) for piece, shape in zip(stored.split(sizes, self.dim), shapes, strict=True)]


@dataclass(frozen=True)
class StoredSlot:
    """A slot, the dotted name that its tensor is stored under, and the shapes of its pieces."""

    slot: Slot
    parents: tuple[str, ...]
    leaf: str
    shapes: tuple[torch.Size, ...]

    @property
    def path(self) -> str:
        """That name."""
        return ".".join((*self.parents, self.leaf))

    @property
    def computed(self) -> bool:
        """Whether its view computes something, which a later write to the stored tensor leaves stale."""
        return isinstance(self.slot.view, OnePlus | FlatFloat)

    def tensor(self, module: nn.Module) -> Tensor:
        """What ``module`` stores. Read at every call of a block: nn.Module's own look-up takes five times as long."""
        for name in self.parents:
            module = module._modules[name]  # type: ignore[assignment]
        found = module._parameters.get(self.leaf)
        return module._buffers[self.leaf] if found is None else found  # type: ignore[return-value]


class Holder(nn.Module):
    """Parameters under the names that transformers gives them, and nothing to call."""


def store(target: nn.Module, source: nn.Module, slots: list[Slot]) -> tuple[StoredSlot, ...]:
    """Register every slot's tensor on ``target``: under its own name, or packed under its field's.

    Raises:
        ConversionError: ``source`` has no such tensor, or not a plain one.
    """
    stored = []
    for slot in slots:
        pieces = [take(source, name) for name in slot.names]
        path = slot.field if slot.packed else slot.names[0]
        value: Any = pieces[0]
        if slot.packed:
            with torch.inference_mode(False), torch.no_grad():
                value = slot.pack(pieces)
            if isinstance(pieces[0], nn.Parameter):
                value = nn.Parameter(value, requires_grad=any(piece.requires_grad for piece in pieces))
        _place(target, path, value, persistent=_is_persistent(source, slot.names[0]))
        *parents, leaf = path.split(".")
        stored.append(StoredSlot(slot, tuple(parents), leaf, tuple(piece.shape for piece in pieces)))
    return tuple(stored)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(path), leaf
    except AttributeError:
        return nn.Module(), leaf


def take(source: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that dotted name.

    Raises:
        ConversionError: there is none, or it is no plain tensor.
    """
    owner, leaf = _owner(source, name)
    found: Tensor | None = owner._parameters.get(leaf)
    if found is None:
        found = owner._buffers.get(leaf)
    if found is None:
        raise ConversionError(
            f"{type(source).__name__} has no parameter or buffer {name!r}, which its adapter expects; was the model "
            f"quantised, parametrised or changed?"
        )
    if type(found) not in (Tensor, nn.Parameter):
        raise ConversionError(
            f"{type(source).__name__}.{name} is a {type(found).__name__}, expected a plain tensor; convert the model "
            f"before it is sharded, quantised or loaded lazily"
        )
    return found


def _is_persistent(source: nn.Module, name: str) -> bool:
    owner, leaf = _owner(source, name)
    return leaf not in owner._non_persistent_buffers_set


def _place(target: nn.Module, path: str, value: Tensor, *, persistent: bool) -> None:
    """``value`` under ``path``, where it may lie already because a submodule of the source was taken over whole."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in target._modules:
            target.add_module(name, Holder())
        target = target.get_submodule(name)
    if isinstance(value, nn.Parameter):
        target.register_parameter(leaf, value)
    else:
        target.register_buffer(leaf, value, persistent=persistent)


def save_names(slots: tuple[StoredSlot, ...], state: dict[str, Any], prefix: str) -> None:
    """Take a state_dict's packed entries apart, in place."""
    for stored in slots:
        value = state.pop(prefix + stored.path, None) if stored.slot.packed else None
        if value is not None:
            pieces = stored.slot.unpack(value, list(stored.shapes))
            state.update({prefix + name: piece for name, piece in zip(stored.slot.names, pieces, strict=True)})


def load_names(slots: tuple[StoredSlot, ...], state: dict[str, Any], prefix: str) -> None:
    """The reverse of :func:`save_names`; entries that are missing stay missing and are reported by torch."""
    for stored in slots:
        names = [prefix + name for name in stored.slot.names]
        if stored.slot.packed and all(name in state for name in names):
            state[prefix + stored.path] = stored.slot.pack([state.pop(name) for name in names])
