"""The direct way on simulated ranks: memory that others write into, and signals that wait for each other."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_core import MoERunner
from moe_core.errors import ConfigError
from moe_core.parallel import Parallel, simulate
from moe_core.parallel.direct import Direct

sys.path.insert(0, str(Path(__file__).parent))

from layers import SHARED, assert_near, config_of, parts, random_weights, whole


class Shared:
    """What all ranks see: every rank's buffer, and the signals that are up."""

    def __init__(self) -> None:
        self.changed, self.up = threading.Condition(), set()
        self.buffers: dict[tuple[int, int, int], Tensor] = {}


class Memory:
    """One rank's view; a signal that is up has to be taken before it is put again, as on a device."""

    def __init__(self, shared: Shared, rank: int) -> None:
        self.shared, self.rank = shared, rank

    def reserve(self, *sizes: int) -> None:
        pass

    def slot(self, rank: int, region: int, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with self.shared.changed:
            buffer = self.shared.buffers.setdefault((rank, region, source), torch.full((1 << 16,), 255).byte())
        count = dtype.itemsize * shape[0] * shape[1]
        return buffer[:count].view(dtype).view(shape)

    @contextlib.contextmanager
    def beside(self, tensor: Tensor):
        yield

    def signal(self, rank: int, channel: int) -> None:
        key = (rank, self.rank, channel)
        with self.shared.changed:
            assert self.shared.changed.wait_for(lambda: key not in self.shared.up, 20)
            self.shared.up.add(key)
            self.shared.changed.notify_all()

    def wait(self, rank: int, channel: int) -> None:
        key = (self.rank, rank, channel)
        with self.shared.changed:
            assert self.shared.changed.wait_for(lambda: key in self.shared.up, 20)
            self.shared.up.remove(key)
            self.shared.changed.notify_all()


KINDS = {"plain": {}, "shared": SHARED, "zero experts": {"zero_expert_num": 3, "zero_expert_type": "identity"}}


@torch.no_grad()
@pytest.mark.parametrize("split_from", [0, 1000], ids=["parts", "together"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_calls_of_changing_sizes_equal_one_process(kind, ranks, split_from, monkeypatch) -> None:
    monkeypatch.setattr(Direct, "split_from", split_from)
    config = config_of(**KINDS[kind])
    weights, shared = random_weights(config), Shared()
    calls = [[5, 0, 7, 1][:ranks], [2, 2, 2, 2][:ranks], [0, 9, 0, 3][:ranks], [4, 1, 8, 6][:ranks]]
    rows = [parts(torch.randn(sum(counts), 32), counts) for counts in calls]

    def rank(mesh):
        runner = MoERunner(config, weights, mesh=Parallel(mesh, dispatch="all_gather"))
        runner.parallel.__dict__["exchange"] = Direct(runner.parallel, Memory(shared, mesh.rank))
        return [runner(each[mesh.rank]) for each in rows]

    found = simulate(rank, ep=ranks)
    assert not shared.up
    for call, each in enumerate(rows):
        wanted = whole(config, weights, torch.cat(each))
        assert_near(torch.cat([result[call] for result in found]), wanted)


def test_it_is_refused_where_memories_are_apart() -> None:
    config = config_of()
    with torch.no_grad(), pytest.raises(ConfigError, match="reach each other"):
        simulate(
            lambda mesh: MoERunner(config, random_weights(config), mesh=Parallel(mesh, dispatch="direct"))(
                torch.randn(2, 32)
            ),
            ep=2,
        )
