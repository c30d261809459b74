"""Memory of simulated ranks that the others write into, and signals that wait as on a device: the direct way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoERunner, MoEWeights
from moe_core.parallel import Parallel, SimulatedMesh, peer, simulate
from moe_core.parallel.direct import Direct
from moe_core.parallel.peer import REGIONS, PeerMemory


class Shared:
    """What all ranks see: the signals that are up, and every buffer, by its number and rank."""

    def __init__(self) -> None:
        self.changed, self.up = threading.Condition(), set()
        self.buffers: dict[tuple[int, int], Tensor] = {}


class Memory(PeerMemory):
    """One rank's view; a signal that is up has to be taken before it is put again, as on a device."""

    def __init__(self, shared: Shared, ranks: int, rank: int) -> None:
        super().__init__(SimpleNamespace(size=ranks, rank=rank, seconds=20), torch.device("cpu"), REGIONS)
        self.shared, self.grown = shared, 0

    def _share(self, size: int):
        assert not self._peers
        self.grown += 1
        keys = [(self.grown, rank) for rank in range(self.comm.size)]
        with self.shared.changed:
            self.shared.buffers[keys[self.comm.rank]] = torch.full((size,), 255).byte()
            self.shared.changed.notify_all()
            assert self.shared.changed.wait_for(lambda: all(key in self.shared.buffers for key in keys), 20)
        return [self.shared.buffers[key] for key in keys], self

    @contextlib.contextmanager
    def beside(self, *tensors: Tensor, lane: int = 0):
        yield

    def join(self, lane: int = 0) -> None:
        pass

    def put_signal(self, rank: int, channel: int, milliseconds: int) -> None:
        key = (rank, self.comm.rank, channel)
        with self.shared.changed:
            assert self.shared.changed.wait_for(lambda: key not in self.shared.up, 20)
            self.shared.up.add(key)
            self.shared.changed.notify_all()

    def wait_signal(self, rank: int, channel: int, milliseconds: int) -> None:
        key = (self.comm.rank, rank, channel)
        with self.shared.changed:
            assert self.shared.changed.wait_for(lambda: key in self.shared.up, 20)
            self.shared.up.remove(key)
            self.shared.changed.notify_all()


def in_pieces(monkeypatch: pytest.MonkeyPatch, **attributes: int) -> None:
    """Attributes of the direct way; some of the calls have to grow the buffer."""
    for name, value in attributes.items():
        monkeypatch.setattr(Direct, name, value)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(peer, "ROUND", 1 << 9)


def directly(
    config: MoEConfig, weights: MoEWeights, calls: Sequence[Sequence[Tensor]], **options: Any
) -> list[list[Tensor]]:
    """The results of every rank, call by call, of the rows that each brings; no signal may be left."""
    shared, ranks = Shared(), len(calls[0])

    def rank(mesh: SimulatedMesh) -> list[Tensor]:
        runner = MoERunner(config, weights, mesh=Parallel(mesh, dispatch="all_gather"), **options)
        runner.parallel.__dict__["exchange"] = Direct(runner.parallel, Memory(shared, ranks, mesh.rank))
        with torch.inference_mode():  # what it leaves behind serves calls outside as well
            runner(calls[0][mesh.rank])
        return [runner(each[mesh.rank]) for each in calls]

    found = simulate(rank, ep=ranks)
    assert not shared.up
    return [[each[call] for each in found] for call in range(len(calls))]
