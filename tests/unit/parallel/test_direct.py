"""The direct way on simulated ranks: memory that others write into, and signals that wait for each other."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe_core import MoERunner
from moe_core.errors import ConfigError
from moe_core.parallel import Parallel, exchange, peer, simulate
from moe_core.parallel.direct import Direct
from moe_core.parallel.mesh import Ranks
from moe_core.parallel.peer import REGIONS, PeerMemory

sys.path.insert(0, str(Path(__file__).parent))

from layers import SHARED, assert_near, config_of, parts, random_weights, whole


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
    def beside(self, tensor: Tensor):
        yield

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


KINDS = {"plain": {}, "shared": SHARED, "zero experts": {"zero_expert_num": 3, "zero_expert_type": "identity"}}


@torch.no_grad()
@pytest.mark.parametrize("split_from", [0, 1000], ids=["parts", "together"])
@pytest.mark.parametrize("few", [True, False], ids=["few bytes", "many bytes"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_calls_of_changing_sizes_equal_one_process(kind, ranks, few, split_from, monkeypatch) -> None:
    if not few:  # rows of 128 bytes beside the stream, sums in several pieces
        monkeypatch.setattr(Direct, "beside_from", 0)
        monkeypatch.setattr(Direct, "piece", 256)
    monkeypatch.setattr(Direct, "split_from", split_from)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(peer, "ROUND", 1 << 9)  # some of the calls have to grow the buffer
    config = config_of(**KINDS[kind])
    weights, shared = random_weights(config), Shared()
    calls = [[5, 0, 7, 1][:ranks], [2, 2, 2, 2][:ranks], [3, 3, 3, 3][:ranks], [0, 9, 0, 3][:ranks]]
    calls += [[0] * ranks, [9, 9, 9, 9][:ranks], [4, 1, 8, 6][:ranks]]
    rows = [parts(torch.randn(sum(counts), 32), counts) for counts in calls]

    def rank(mesh):
        runner = MoERunner(config, weights, mesh=Parallel(mesh, dispatch="all_gather"))
        runner.parallel.__dict__["exchange"] = Direct(runner.parallel, Memory(shared, ranks, mesh.rank))
        with torch.inference_mode():  # what it leaves behind serves calls outside as well
            runner(rows[0][mesh.rank])
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


@pytest.mark.parametrize(
    ("ranks", "reach", "way"), [(2, True, "direct"), (2, False, "all_gather"), (8, True, "all_to_all")]
)
def test_auto_takes_it_where_tokens_reach_most_ranks_and_memories_are_within_reach(
    ranks, reach, way, monkeypatch
) -> None:
    monkeypatch.setattr(exchange, "within_reach", lambda comm, device: reach)
    monkeypatch.setattr(Direct, "__init__", lambda self, ranks: None)
    config = config_of(num_experts=8, top_k=2)
    found = simulate(lambda mesh: Ranks.settle(Parallel(mesh), config).exchange.name, ep=ranks)
    assert found == [way] * ranks
