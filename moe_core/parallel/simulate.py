"""Any number of ranks in one process, a thread each: for tests of what ranks do together, without a second process.

A rank that asks for another transfer than its peers, ends while they wait, or fails, is an error on every rank and
never a hang. ``World.log`` has the transfers of each rank, in order.
"""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, ParallelError
from .comm import Comm, Flight

PATIENCE = 60.0
"""Seconds after which ranks that wait for each other in a ring are given up."""


class World:
    """What the ranks of one simulation share."""

    def __init__(self, ranks: int) -> None:
        self.changed = threading.Condition()
        self.ended: set[int] = set()
        self.failed: BaseException | None = None
        self.log: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(ranks)]


class _Meeting:
    """Where the members of one group hand over what they brought, transfer by transfer."""

    def __init__(self, world: World, members: Sequence[int]) -> None:
        self.world, self.members = world, list(members)
        self.brought: dict[int, dict[int, tuple[str, Any]]] = {}
        self.turn = dict.fromkeys(self.members, 0)

    def exchange(self, member: int, what: str, value: Any) -> list[Any]:
        """What every member brought to this transfer."""
        world = self.world
        with world.changed:
            turn = self.turn[member]
            self.turn[member] += 1
            here = self.brought.setdefault(turn, {})
            here[member] = (what, value)
            world.changed.notify_all()

            def settled() -> bool:
                return len(here) == len(self.members) or world.failed is not None or bool(self._gone(here))

            if not world.changed.wait_for(settled, PATIENCE):
                raise ParallelError(f"rank {member}: {what}: waited {PATIENCE:g} s for ranks {self._missing(here)}")
            if len(here) < len(self.members):
                raise ParallelError(f"rank {member}: {what}: ranks {self._missing(here)} have ended or failed")
            kinds = {kind for kind, _ in here.values()}
            if len(kinds) > 1:
                raise ParallelError(
                    f"rank {member}: ranks made different transfers at once: "
                    + ", ".join(f"rank {rank} {kind}" for rank, (kind, _) in sorted(here.items()))
                )
            return [here[rank][1] for rank in self.members]

    def _missing(self, here: Mapping[int, Any]) -> list[int]:
        return [rank for rank in self.members if rank not in here]

    def _gone(self, here: Mapping[int, Any]) -> list[int]:
        return [rank for rank in self._missing(here) if rank in self.world.ended]


class SimulatedComm:
    """One rank's view of one group."""

    def __init__(self, axis: str, meeting: _Meeting, member: int) -> None:
        self.axis, self._meeting, self._member = axis, meeting, member
        self.rank, self.size = meeting.members.index(member), len(meeting.members)

    def _exchange(self, what: str, tensor: Tensor, value: Any) -> list[Any]:
        self._meeting.world.log[self._member].append((self.axis, what, tuple(tensor.shape)))
        return self._meeting.exchange(self._member, f"{what} over {self.axis!r}", value)

    def start_all_gather(self, tensor: Tensor) -> Flight:
        """[size, *shape]."""
        found = self._exchange("all_gather", tensor, tensor.clone())
        shapes = {(t.shape, t.dtype) for t in found}
        if len(shapes) > 1:
            raise ParallelError(f"all_gather over {self.axis!r}: ranks brought different shapes: {shapes}")
        return Flight(lambda: torch.stack(found))

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Flight:
        """Variable splits."""
        found = self._exchange("all_to_all", tensor, tensor.clone().split(list(send)))
        pieces = [pieces[self.rank] for pieces in found]
        if [piece.shape[0] for piece in pieces] != list(receive):
            raise ParallelError(
                f"all_to_all over {self.axis!r}: rank {self.rank} expected {list(receive)} rows, "
                f"{[piece.shape[0] for piece in pieces]} came"
            )
        return Flight(lambda: torch.cat(pieces))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in float32 at least."""
        found = self._exchange("all_reduce", tensor, tensor.clone())
        return torch.stack(found).sum(0, dtype=torch.promote_types(tensor.dtype, torch.float32)).to(tensor.dtype)

    def read(self, tensor: Tensor) -> Any:
        """There already."""
        return tensor.tolist()


class SimulatedMesh:
    """One rank of a simulated mesh; ``MoERunner(mesh=...)`` takes it as it takes a DeviceMesh."""

    def __init__(self, comms: Mapping[str, Comm], rank: int, world: World) -> None:
        self.comms, self.rank, self.world = dict(comms), rank, world

    def coordinate(self, axis: str) -> int:
        """This rank's place along an axis."""
        return self.comms[axis].rank


def simulate(function: Callable[[SimulatedMesh], Any], **axes: int) -> list[Any]:
    """Run ``function(mesh)`` on every rank of a mesh, each in a thread, and return the results by rank.

    Args:
        function: what one rank does; grad mode and context variables are the caller's.
        axes: names and sizes of the mesh's dimensions, the last varying fastest: ``simulate(f, ep=2, tp=4)``.
    Raises:
        InputError: no axes, or a size below 1.
        whatever a rank raised first.
    """
    if not axes or any(size < 1 for size in axes.values()):
        raise InputError(f"simulate(**{axes!r}): expected at least one axis, each of at least 1 rank")
    places = list(itertools.product(*(range(size) for size in axes.values())))
    world = World(len(places))
    number = {place: rank for rank, place in enumerate(places)}
    comms: list[dict[str, Comm]] = [{} for _ in places]
    for dim, axis in enumerate(axes):
        for place in places:
            if place[dim] == 0:
                line = [number[(*place[:dim], i, *place[dim + 1 :])] for i in range(axes[axis])]
                meeting = _Meeting(world, line)
                for member in line:
                    comms[member][axis] = SimulatedComm(axis, meeting, member)
    results: list[Any] = [None] * len(places)
    errors: dict[int, BaseException] = {}
    grad = torch.is_grad_enabled()

    def run(rank: int) -> None:
        try:
            with torch.set_grad_enabled(grad):
                results[rank] = function(SimulatedMesh(comms[rank], rank, world))
        except BaseException as error:
            with world.changed:
                errors[rank] = error
                world.failed = world.failed or error
        finally:
            with world.changed:
                world.ended.add(rank)
                world.changed.notify_all()

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(run, rank), name=f"rank {rank}", daemon=True)
        for rank in range(len(places))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failed is not None:
        raise world.failed
    return results
