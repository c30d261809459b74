"""All-gather and reduce-scatter, the naive way: all rows to all ranks, each rank's sums back, no wait for a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Dispatched, ExpertsOut, Plan, Routing
from .comm import gather_ints
from .exchange import Call, current, pack_routing, sum_dtype, unpack_routing, weighted_sum
from .mesh import Ranks
from .sums import pad_rows


@dataclass(frozen=True)
class _Gathered:
    tokens: int
    width: int


class AllGather:
    """Rows are padded to the most of any rank; padding chooses no expert."""

    name, needs_counts, leaves_early = "all_gather", True, True

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.comm, self.places = ranks, ranks.comms["ep"], ranks.places

    def begin(self, call: Call, hidden_states: Tensor) -> None:
        """The rows leave before the gate has run."""
        assert call.counts is not None
        call.early[id(hidden_states)] = self.comm.start_all_gather(pad_rows(hidden_states, max(call.counts)))

    def dispatch(self, plan: Plan, hidden_states: Tensor, routing: Routing) -> Dispatched:
        """[ranks * width, H], with local ids; every other id is -1."""
        comm, tokens = self.comm, hidden_states.shape[0]
        call = current.get()
        counts = call.counts if call is not None else None
        if counts is None:
            counts = [row[0] for row in gather_ints(comm, [tokens], hidden_states.device)]
        width = max(counts)
        rows = call.early.pop(id(hidden_states), None) if call is not None else None
        packed = pack_routing(self.places.of(routing.topk_ids, comm.rank), routing.topk_weights)
        choice = comm.start_all_gather(pad_rows(packed, width, -1))
        if rows is None:
            rows = comm.start_all_gather(pad_rows(hidden_states, width))
        at, topk_weights = unpack_routing(choice.wait().flatten(0, 1))
        own: bool | Tensor = False
        if self.places.zero_experts and self.ranks.comms["tp"].rank == 0:
            number = torch.arange(comm.size * width, device=at.device)
            own = (torch.div(number, max(1, width), rounding_mode="floor") == comm.rank)[:, None]
        # The bits of -1 are a NaN; weights of padding are never looked at, but a sum over rows would be.
        if min(counts) < width:
            topk_weights = topk_weights.masked_fill(at < 0, 0.0)
        local = Routing(topk_weights, self.places.local(at, comm.rank, own))
        return Dispatched(rows.wait().flatten(0, 1), local, _Gathered(tokens, width))

    def combine(self, plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> ExpertsOut:
        """[T, H]: this rank's rows of every rank's sums."""
        gathered: _Gathered = dispatched.handle
        partial = weighted_sum(plan.config, experts_out, dispatched.routing).to(plan.dtype)
        even = [gathered.width] * self.comm.size
        parts = self.comm.start_all_to_all(partial, even, even).wait()
        parts = parts.view(self.comm.size, gathered.width, partial.shape[1])[:, : gathered.tokens]
        return ExpertsOut(parts.sum(0, dtype=sum_dtype(plan.config, plan)), True)
