"""The default of ``moe_dispatch`` and ``moe_combine``: which way tokens travel, and what all ways share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import MoEConfig
from ..types import Dispatched, ExpertsOut, Plan, Routing
from .comm import Flight
from .mesh import Ranks
from .peer import within_reach

REACHES_MOST = 0.75
"""From this share of the ranks on that a token reaches, all rows to all ranks are about as many bytes as each row where
it is needed, and need neither sizes on the host nor an order of rows."""


@dataclass
class Call:
    """What one pass knows besides the arguments of its hooks.

    Args:
        counts: tokens of each rank of "ep"; None where nobody needed to know.
        early: the rows on their way to the other ranks already, by the tensor that holds them; None where nobody has to
            wait for them.
        sum_rows: [N, H] in a given dtype from [N, K, H] and its routing, by the layer's own reduce stage; None where
            the experts have to sum.
        in_pieces: set by a dispatch whose combine would rather sum rows itself, piece by piece.
    """

    counts: list[int] | None = None
    early: dict[int, Flight | None] = field(default_factory=dict)
    sum_rows: Callable[[Tensor, Routing, torch.dtype], Tensor] | None = None
    in_pieces: bool = False


current: ContextVar[Call | None] = ContextVar("moe_core_parallel_call", default=None)


class Exchange(Protocol):
    """One way for tokens to travel.

    ``needs_counts``: the host has to know how many tokens each rank brings; ``leaves_early``: rows leave before the
    gate has run, so that they travel beside it and the shared experts.
    """

    name: str
    needs_counts: bool
    leaves_early: bool

    def begin(self, call: Call, hidden_states: Tensor) -> None:
        """Send what does not depend on the routing, before there is one."""

    def dispatch(self, plan: Plan, hidden_states: Tensor, routing: Routing) -> Dispatched | Iterator[Dispatched]:
        """Rows for this rank's experts."""

    def combine(self, plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> ExpertsOut | None:
        """This rank's own rows, summed."""


def choose(ranks: Ranks) -> Exchange:
    """By the option, or for ``auto`` by how many ranks a token reaches, and whether their memories are within reach."""
    from .all_gather import AllGather
    from .all_to_all import AllToAll

    ways: dict[str, Any] = {"all_to_all": AllToAll, "all_gather": AllGather}
    name = ranks.options.dispatch
    if name == "auto" and share_reached(ranks) >= REACHES_MOST:
        name = "direct" if within_reach(ranks.comms["ep"], ranks.device) else "all_gather"
    if name == "direct":
        from .direct import Direct

        return Direct(ranks)
    found: Exchange = ways["all_to_all" if name == "auto" else name](ranks)
    return found


def share_reached(ranks: Ranks) -> float:
    """Share of the ranks of "ep" that hold one of a token's experts, if routing is even."""
    size = ranks.comms["ep"].size
    return float(1 - (1 - 1 / size) ** ranks.config.top_k)


def weighted_sum(config: MoEConfig, experts_out: ExpertsOut, routing: Routing) -> Tensor:
    """[N, H]: what the experts returned, weighted, summed and scaled where they left that to others."""
    value = experts_out.value[..., : config.expert_hidden_size]
    if experts_out.reduced:
        return value
    # Whatever stands in a row of nobody's expert is not looked at: zero times NaN is NaN.
    value = torch.where((routing.topk_ids < 0).unsqueeze(-1), 0.0, value.float())
    if not config.apply_router_weight_on_input:
        value = value * routing.topk_weights.unsqueeze(-1)
    return value.sum(1) * config.output_scale


def pack_routing(places: Tensor, topk_weights: Tensor) -> Tensor:
    """[T, 2K] int32 that travel together: places, and the bits of the weights."""
    return torch.cat([places, topk_weights.contiguous().view(torch.int32)], 1)


def unpack_routing(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Places [N, K] int32 and weights [N, K] float32."""
    k = packed.shape[1] // 2
    return packed[:, :k], packed[:, k:].contiguous().view(torch.float32)


def sum_dtype(config: MoEConfig, plan: Plan) -> torch.dtype:
    """Of the routed sum: float32 where something is still added to it."""
    return torch.float32 if config.has_shared_experts else plan.dtype
