"""Rows and sums by copies between the devices of one host, beside the experts.

Each rank writes its rows into every other rank's memory while its gate runs. A rank then computes the rows of the other
ranks first, and its own last, so that the sums of the others' rows travel while it computes its own. A few rows are
computed together instead: reading the experts' weights once counts for more than what travels meanwhile.

One buffer is enough. A rank writes rows again only behind its last call, in which every reader of the last ones has
sent back their sums; and it writes sums again only once their owner has sent new rows, and so has read the last sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import Dispatched, ExpertsOut, Plan, Routing
from .comm import ProcessComm, gather_ints
from .exchange import Call, current, pack_routing, sum_dtype, unpack_routing, weighted_sum
from .mesh import Ranks
from .peer import PeerMemory, shared_memory

ROWS, CHOICE, SUMS = 0, 1, 2
"""Regions of the shared memory, and channels of the signals; rows and choice are signalled together."""


@dataclass(frozen=True)
class _Part:
    """Whose rows they are: one rank's, or everybody's (-1)."""

    source: int
    counts: list[int]


class Direct:
    """Needs devices of one host that reach each other's memory."""

    name, needs_counts, leaves_early = "direct", True, True
    split_from = 2048
    """Most tokens of a rank from which on its rows are a part of their own."""

    def __init__(self, ranks: Ranks, memory: PeerMemory | None = None) -> None:
        comm = ranks.comms["ep"]
        if memory is None and isinstance(comm, ProcessComm) and ranks.device.type != "cpu":
            memory = shared_memory(comm, ranks.device, 3)
        if memory is None:
            raise ConfigError(
                f'Parallel.dispatch="direct" on {ranks.device}: expected devices of one host that reach each other\'s '
                f'memory, in processes of their own; leave dispatch="auto"'
            )
        self.ranks, self.comm, self.places = ranks, comm, ranks.places
        self.memory = memory
        self.others = [(comm.rank + step) % comm.size for step in range(1, comm.size)]

    def begin(self, call: Call, hidden_states: Tensor) -> None:
        """The rows leave before the gate has run."""
        assert call.counts is not None
        width, columns = max(call.counts), hidden_states.shape[1]
        row = columns * hidden_states.dtype.itemsize
        self.memory.reserve(width * row, width * 2 * self.ranks.config.top_k * 4, width * row)
        call.early[id(hidden_states)] = None
        self._push(hidden_states, self.others, ROWS)

    def dispatch(self, plan: Plan, hidden_states: Tensor, routing: Routing) -> Iterator[Dispatched]:
        """The rows of each rank, this one's last; or all at once."""
        comm, call = self.comm, current.get() or Call()
        if call.counts is None:
            call.counts = [row[0] for row in gather_ints(comm, [hidden_states.shape[0]], hidden_states.device)]
        if id(hidden_states) not in call.early:
            self.begin(call, hidden_states)
        call.early.clear()
        packed = pack_routing(self.places.of(routing.topk_ids, comm.rank), routing.topk_weights)
        if call.counts[comm.rank]:
            self._push(packed, self.others, CHOICE, ROWS)
        split = max(call.counts) >= self.split_from
        return (self._parts if split else self._together)(hidden_states, packed, call.counts)

    def _parts(self, hidden_states: Tensor, packed: Tensor, counts: list[int]) -> Iterator[Dispatched]:
        for source in self.others:
            if counts[source]:
                rows, choice = self._arrived(source, counts[source], hidden_states, packed)
                yield Dispatched(rows, self._local(choice, False), _Part(source, counts))
        yield Dispatched(hidden_states, self._local(packed, True), _Part(self.comm.rank, counts))

    def _together(self, hidden_states: Tensor, packed: Tensor, counts: list[int]) -> Iterator[Dispatched]:
        every = [(hidden_states, packed)] * self.comm.size
        for source in self.others:
            every[source] = (hidden_states[:0], packed[:0])
            if counts[source]:
                every[source] = self._arrived(source, counts[source], hidden_states, packed)
        own: bool | Tensor = True
        if self.places.zero_experts:
            first = sum(counts[: self.comm.rank])
            number = torch.arange(sum(counts), device=packed.device)[:, None]
            own = (number >= first) & (number < first + counts[self.comm.rank])
        rows, choice = (torch.cat(list(each)) for each in zip(*every, strict=True))
        yield Dispatched(rows, self._local(choice, own), _Part(-1, counts))

    def _arrived(self, source: int, count: int, rows: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        self.memory.wait(source, ROWS)
        rank = self.comm.rank
        return (
            self.memory.slot(rank, ROWS, source, (count, rows.shape[1]), rows.dtype),
            self.memory.slot(rank, CHOICE, source, (count, packed.shape[1]), packed.dtype),
        )

    def combine(self, plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> ExpertsOut | None:
        """Another rank's sums leave; behind this rank's own, the sums that the others made are added."""
        part: _Part = dispatched.handle
        rank, counts = self.comm.rank, part.counts
        partial = weighted_sum(plan.config, experts_out, dispatched.routing).to(plan.dtype)
        if part.source not in (rank, -1):
            self._push(partial, [part.source], SUMS, SUMS)
            return None
        if part.source == -1:
            every = partial.split(counts)
            for source in self.others:
                if counts[source]:
                    self._push(every[source], [source], SUMS, SUMS)
            partial = every[rank]
        dtype = sum_dtype(plan.config, plan)
        if not counts[rank]:
            return ExpertsOut(partial.to(dtype), True)
        found = []
        for source in self.others:
            self.memory.wait(source, SUMS)
            found.append(self.memory.slot(rank, SUMS, source, tuple(partial.shape), partial.dtype))
        if len(found) == 1 and dtype is partial.dtype:
            return ExpertsOut(partial + found[0], True)
        total = partial.to(torch.float32, copy=True)
        for piece in found:
            total += piece
        return ExpertsOut(total.to(dtype), True)

    def _local(self, packed: Tensor, own: bool | Tensor) -> Routing:
        places, topk_weights = unpack_routing(packed)
        if self.ranks.comms["tp"].rank:
            own = False
        return Routing(topk_weights, self.places.local(places, self.comm.rank, own))

    def _push(self, tensor: Tensor, to: list[int], region: int, channel: int | None = None) -> None:
        """Copy to other ranks beside the current stream, and signal that it is there."""
        with self.memory.beside(tensor):
            for rank in to:
                target = self.memory.slot(rank, region, self.comm.rank, tuple(tensor.shape), tensor.dtype)
                target.copy_(tensor, non_blocking=True)
                if channel is not None:
                    self.memory.signal(rank, channel)
