"""All-to-all with variable splits: a row travels once to each rank with one of its experts, and one sum comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Dispatched, ExpertsOut, Plan, Routing
from .exchange import Call, pack_routing, sum_dtype, unpack_routing, weighted_sum
from .mesh import Ranks


@dataclass(frozen=True)
class _Sent:
    """What has to be known to bring results back: which rows went to which rank, and how many came from each."""

    rows: list[Tensor]
    send: list[int]
    receive: list[int]
    tokens: int


class AllToAll:
    """Waits for the device once a call, because the host has to know how many rows go where."""

    name, needs_counts, leaves_early = "all_to_all", False, False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.comm, self.places = ranks, ranks.comms["ep"], ranks.places

    def begin(self, call: Call, hidden_states: Tensor) -> None:
        """Nothing is known before the routing is."""

    def dispatch(self, plan: Plan, hidden_states: Tensor, routing: Routing) -> Dispatched:
        """Rows of all ranks that have an expert here, with local ids; every other id is -1."""
        comm, width = self.comm, self.places.width
        places = self.places.of(routing.topk_ids, comm.rank)
        # Zero experts need no other rank: their tokens' own rank adds them.
        target = torch.where(places >= self.places.end, comm.rank, torch.div(places, width, rounding_mode="floor"))
        target = target.long().masked_fill_(places < 0, comm.size)
        goes = torch.zeros(places.shape[0], comm.size + 1, dtype=torch.bool, device=places.device)
        goes = goes.scatter_(1, target, True)[:, : comm.size].t()
        send_counts = goes.sum(1)
        receive_counts = comm.start_all_to_all(send_counts, [1] * comm.size, [1] * comm.size)
        rank_of, row_of = goes.nonzero(as_tuple=True)
        send, receive = comm.read(torch.stack([send_counts, receive_counts.wait()]))
        # Of a row's experts each copy carries those of its rank.
        there = target[row_of] == rank_of[:, None]
        packed = pack_routing(
            torch.where(there, places[row_of], -1), routing.topk_weights[row_of].masked_fill(~there, 0.0)
        )
        flights = [comm.start_all_to_all(tensor, send, receive) for tensor in (packed, hidden_states[row_of])]
        got, x = (flight.wait() for flight in flights)
        at, topk_weights = unpack_routing(got)
        own: bool | Tensor = False
        if self.places.zero_experts and self.ranks.comms["tp"].rank == 0:
            rows = torch.arange(got.shape[0], device=got.device)
            first = sum(receive[: comm.rank])
            own = ((rows >= first) & (rows < first + receive[comm.rank]))[:, None]
        local = Routing(topk_weights, self.places.local(at, comm.rank, own))
        return Dispatched(x, local, _Sent(list(row_of.split(send)), send, receive, hidden_states.shape[0]))

    def combine(self, plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> ExpertsOut:
        """[T, H]: what came back, summed in float32 in the order of the ranks."""
        sent: _Sent = dispatched.handle
        partial = weighted_sum(plan.config, experts_out, dispatched.routing).to(plan.dtype)
        back = self.comm.start_all_to_all(partial, sent.receive, sent.send).wait()
        total = torch.zeros(sent.tokens, partial.shape[1], dtype=torch.float32, device=partial.device)
        for rows, part in zip(sent.rows, back.split(sent.send), strict=True):
            # A rank's rows are distinct, so this is the same sum in every run.
            total.index_add_(0, rows, part.float())
        return ExpertsOut(total.to(sum_dtype(plan.config, plan)), True)
