"""Rows and sums by copies between the devices of one host, beside gate and experts.

Each rank writes its rows into every other rank's memory while its gate runs, and ids and weights behind it. All rows
are computed together, from the memory in which they arrived, and each rank's sums leave in pieces: the next travels
while one is added. Where there are several pieces, the experts are asked to leave the sum: the others' rows are summed
piece by piece, and this rank's own while those are on their way. From ``split_from`` rows on a rank computes the
others' rows first and its own last, so that their sums travel meanwhile; this reads the experts' weights once for each
rank.

One buffer is enough. A rank writes rows again only behind its last call, in which every reader of the last ones has
sent back their sums; and it writes sums again only once their owner has sent new rows, and so has read the last sums.
Where the sizes change, and slots with them, all ranks meet first (``PeerMemory.arrange``).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import Dispatched, ExpertsOut, Plan, Routing
from .comm import ProcessComm, gather_ints
from .exchange import Call, current, sum_dtype, weighted_sum
from .mesh import Ranks
from .peer import FENCE, PeerMemory, shared_memory
from .placement import split_points

ROWS, IDS, WEIGHTS, SUMS = 0, 1, 2, 3
"""Regions of the shared memory."""
ROWS_THERE, CHOICE_THERE, SUMS_THERE = FENCE + 1, FENCE + 2, FENCE + 3
"""Channels of the signals; pieces of sums take the last and those behind it."""


OWN = 1
"""The lane beside the stream in which a rank's own rows move; all that goes to other ranks is in the first."""


@dataclass(frozen=True)
class _Part:
    """Whose rows they are: one rank's, or everybody's (-1)."""

    source: int
    counts: list[int]
    beside: bool


class Direct:
    """Needs devices of one host that reach each other's memory."""

    name, needs_counts, leaves_early = "direct", True, True
    split_from = 1 << 20
    """Most tokens of a rank from which on its rows are a part of their own; it was slower wherever it was measured."""
    beside_from = 1 << 20
    """Bytes of a rank's rows from which on they travel beside the caller's stream; fewer are there before the host has
    changed streams."""
    piece = 12 << 20
    """Bytes of a piece of sums at least, if there is more than one: each piece is several launches and a pause of the
    copy engine."""
    most_pieces = 4
    """Of one rank's sums."""

    def __init__(self, ranks: Ranks, memory: PeerMemory | None = None) -> None:
        comm = ranks.comms["ep"]
        if memory is None and isinstance(comm, ProcessComm) and ranks.device.type != "cpu":
            memory = shared_memory(comm, ranks.device)
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
        counts = call.counts
        assert counts is not None
        call.early[id(hidden_states)] = None
        width, row, choice = max(counts), _bytes(hidden_states), self.ranks.config.top_k * 4
        if not width:
            return
        self.memory.arrange(width * row, width * choice, width * choice, width * row)
        if not counts[self.comm.rank]:
            return
        if not self._beside(counts, hidden_states):
            self._put(ROWS, [hidden_states], self._dense(counts))
            return
        into = self._slots(ROWS, self.others, hidden_states)
        with self.memory.beside(hidden_states):
            for rank, target in zip(self.others, into, strict=True):
                target.copy_(hidden_states, non_blocking=True)
                self.memory.signal(rank, ROWS_THERE)
        if self._dense(counts):
            with self.memory.beside(hidden_states, lane=OWN):
                self._slots(ROWS, [self.comm.rank], hidden_states)[0].copy_(hidden_states)

    def dispatch(self, plan: Plan, hidden_states: Tensor, routing: Routing) -> Iterator[Dispatched]:
        """All rows at once; or those of each rank, this one's last."""
        comm, call = self.comm, current.get() or Call()
        if call.counts is None:
            call.counts = [row[0] for row in gather_ints(comm, [hidden_states.shape[0]], hidden_states.device)]
        if id(hidden_states) not in call.early:
            self.begin(call, hidden_states)
        call.early.clear()
        counts = call.counts
        ids = self.places.of(routing.topk_ids, comm.rank)
        if counts[comm.rank]:
            self._put(IDS, [ids, routing.topk_weights.view(torch.int32)], self._dense(counts))
            for rank in self.others:
                self.memory.signal(rank, CHOICE_THERE)
        call.in_pieces = (
            call.sum_rows is not None
            and not self._splits(counts)
            and self._number(max(counts) * _bytes(hidden_states)) > 1
        )
        own = Routing(routing.topk_weights, ids)
        if self._dense(counts):
            return self._in_place(hidden_states, own, counts)
        return (self._parts if self._splits(counts) else self._together)(hidden_states, own, counts)

    def _in_place(self, hidden_states: Tensor, own: Routing, counts: list[int]) -> Iterator[Dispatched]:
        """All ranks' rows where they have arrived, this rank's among them."""
        memory, rank, total = self.memory, self.comm.rank, sum(counts)
        beside = self._beside(counts, hidden_states)
        for source in self.others:
            memory.wait(source, CHOICE_THERE)
        shape = (total, own.topk_ids.shape[1])
        weights = memory.slot(rank, WEIGHTS, 0, shape, torch.float32)
        routing = self._local(Routing(weights, memory.slot(rank, IDS, 0, shape, torch.int32)), self._mine(counts))
        if beside:
            memory.join(OWN)
            for source in self.others:
                memory.wait(source, ROWS_THERE)
        rows = memory.slot(rank, ROWS, 0, (total, hidden_states.shape[1]), hidden_states.dtype)
        yield Dispatched(rows, routing, _Part(-1, counts, beside))

    def _parts(self, hidden_states: Tensor, own: Routing, counts: list[int]) -> Iterator[Dispatched]:
        beside = self._beside(counts, hidden_states)
        for source in self.others:
            if counts[source]:
                rows, routing = self._arrived(source, counts[source], hidden_states, own, beside)
                yield Dispatched(rows, self._local(routing, False), _Part(source, counts, beside))
        yield Dispatched(hidden_states, self._local(own, True), _Part(self.comm.rank, counts, beside))

    def _together(self, hidden_states: Tensor, own: Routing, counts: list[int]) -> Iterator[Dispatched]:
        beside = self._beside(counts, hidden_states)
        every = [(hidden_states, own)] * self.comm.size
        for source in self.others:
            every[source] = self._arrived(source, counts[source], hidden_states, own, beside)
        rows = torch.cat([rows for rows, _ in every])
        weights = torch.cat([routing.topk_weights for _, routing in every])
        ids = torch.cat([routing.topk_ids for _, routing in every])
        yield Dispatched(rows, self._local(Routing(weights, ids), self._mine(counts)), _Part(-1, counts, beside))

    def _arrived(self, source: int, count: int, rows: Tensor, own: Routing, beside: bool) -> tuple[Tensor, Routing]:
        """Rows and routing of another rank, once they are there."""
        if not count:
            return rows[:0], Routing(own.topk_weights[:0], own.topk_ids[:0])
        memory, rank, shape = self.memory, self.comm.rank, (count, own.topk_ids.shape[1])
        memory.wait(source, CHOICE_THERE)
        if beside:
            memory.wait(source, ROWS_THERE)
        weights = memory.slot(rank, WEIGHTS, source, shape, torch.float32)
        routing = Routing(weights, memory.slot(rank, IDS, source, shape, torch.int32))
        return memory.slot(rank, ROWS, source, (count, rows.shape[1]), rows.dtype), routing

    def combine(self, plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> ExpertsOut | None:
        """The others' sums leave; behind this rank's own, the sums that the others made are added."""
        part: _Part = dispatched.handle
        rank, counts, call = self.comm.rank, part.counts, current.get()
        dtype, sent = sum_dtype(plan.config, plan), list[Tensor]()
        if part.source == -1 and not experts_out.reduced and call is not None and call.in_pieces:
            partial, sent = self._sum_and_send(call, experts_out.value, dispatched, plan.dtype, dtype)
        else:
            partial = weighted_sum(plan.config, experts_out, dispatched.routing).to(plan.dtype)
            if part.source not in (rank, -1):
                self._send(partial, part.source, part.beside)
                return None
            if part.source == -1:
                every = partial.split(counts)
                for source in self.others:
                    if counts[source]:
                        self._send(every[source], source, part.beside)
                partial = every[rank]
        total = partial
        if counts[rank]:
            found = [self.memory.slot(rank, SUMS, r, tuple(partial.shape), plan.dtype) for r in self.others]
            pair = len(found) == 1 and dtype is partial.dtype
            total = torch.empty_like(partial) if pair else partial.to(torch.float32, copy=True)
            for number, piece in enumerate(self._pieces(found[0])):
                for source, sums in zip(self.others, found, strict=True):
                    self.memory.wait(source, SUMS_THERE + number)
                    if pair:
                        torch.add(partial[piece], sums[piece], out=total[piece])
                    else:
                        total[piece] += sums[piece]
        if sent and part.beside:  # what was made for the others must not be written over before it has left
            self.memory.join()
        return ExpertsOut(total.to(dtype), True)

    def _sum_and_send(
        self, call: Call, value: Tensor, dispatched: Dispatched, dtype: torch.dtype, own_dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The others' rows leave as they are summed. This rank's own sums, made while those travel; and what left."""
        part: _Part = dispatched.handle
        value = value[..., : self.ranks.config.expert_hidden_size]
        bounds = list(itertools.accumulate(part.counts, initial=0))

        def sums_of(start: int, stop: int, dtype: torch.dtype) -> Tensor:
            assert call.sum_rows is not None
            weights, ids = dispatched.routing
            return call.sum_rows(value[start:stop], Routing(weights[start:stop], ids[start:stop]), dtype)

        sent = []
        for source in self.others:
            if not part.counts[source]:
                continue
            shape = (part.counts[source], value.shape[-1])
            target = self.memory.slot(source, SUMS, self.comm.rank, shape, dtype)
            for number, piece in enumerate(self._pieces(target)):
                sums = sums_of(bounds[source] + piece.start, bounds[source] + piece.stop, dtype)
                sent.append(sums)
                with self.memory.beside() if part.beside else contextlib.nullcontext():
                    target[piece].copy_(sums, non_blocking=True)
                    self._announce(source, number, part.beside)
        return sums_of(bounds[self.comm.rank], bounds[self.comm.rank + 1], own_dtype), sent

    def _send(self, sums: Tensor, to: int, beside: bool) -> None:
        (target,) = self._slots(SUMS, [to], sums)
        with self.memory.beside(sums) if beside else contextlib.nullcontext():
            for number, piece in enumerate(self._pieces(sums)):
                target[piece].copy_(sums[piece], non_blocking=True)
                self._announce(to, number, beside)

    def _announce(self, to: int, number: int, beside: bool) -> None:
        """A piece of sums, behind its copy; beside the next one, which would wait for the signal's kernel."""
        with self.memory.beside() if beside else contextlib.nullcontext():
            self.memory.signal(to, SUMS_THERE + number)

    def _pieces(self, sums: Tensor) -> list[slice]:
        bounds = split_points(sums.shape[0], self._number(sums.shape[0] * _bytes(sums)))
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def _number(self, size: int) -> int:
        """Pieces of so many bytes of sums."""
        return min(self.most_pieces, max(1, size // self.piece))

    def _put(self, region: int, tensors: list[Tensor], here_too: bool) -> None:
        """Into the other ranks' memory, and this rank's own, in one launch; the tensors' regions follow each other."""
        to = [*self.others, self.comm.rank] if here_too else self.others
        into, given = [], []
        for number, tensor in enumerate(tensors):
            into += self._slots(region + number, to, tensor)
            given += [tensor] * len(to)
        torch._foreach_copy_(into, given)

    def _slots(self, region: int, to: list[int], tensor: Tensor) -> list[Tensor]:
        """This rank's on each of those ranks."""
        shape, dtype = tuple(tensor.shape), tensor.dtype
        return [self.memory.slot(rank, region, self.comm.rank, shape, dtype) for rank in to]

    def _local(self, routing: Routing, own: bool | Tensor) -> Routing:
        if self.ranks.comms["tp"].rank:
            own = False
        return Routing(routing.topk_weights, self.places.local(routing.topk_ids, self.comm.rank, own))

    def _mine(self, counts: list[int]) -> bool | Tensor:
        """[N, 1]: which of all ranks' rows are this rank's; only zero experts ask."""
        if not self.places.zero_experts:
            return True
        first = sum(counts[: self.comm.rank])
        number = torch.arange(sum(counts), device=self.ranks.device)[:, None]
        return (number >= first) & (number < first + counts[self.comm.rank])

    # The same on all ranks, as counts and dtypes are.

    def _splits(self, counts: list[int]) -> bool:
        return max(counts) >= self.split_from

    def _dense(self, counts: list[int]) -> bool:
        """Whether all rows lie behind each other where they arrive."""
        return 0 < max(counts) == min(counts) and not self._splits(counts)

    def _beside(self, counts: list[int], rows: Tensor) -> bool:
        return max(counts) * _bytes(rows) >= self.beside_from


def _bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.dtype.itemsize
