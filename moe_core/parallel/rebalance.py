"""Bringing a plan to a bound runner: experts move between ranks, and the layer computes what it did."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..weights import MoEWeights
from .agree import check_agreement
from .comm import Comm
from .mesh import Ranks
from .placement import Placement
from .shard import BY_EXPERT, shard_weights

if TYPE_CHECKING:
    from ..runner import MoERunner


def measured_load(runner: MoERunner, tokens_per_expert: Tensor) -> list[int]:
    """[E] of all ranks together, from what each has recorded (``runner.recording()``); every rank has to call this."""
    ranks = _ranks_of(runner)
    total = tokens_per_expert[: runner.config.num_experts].clone()
    for axis in ("dp", "ep"):
        if axis == "dp" or ranks.dispatches:
            gathered = ranks.comms[axis].start_all_gather(total).wait()
            total = gathered.sum(0)
    return [int(count) for count in total.tolist()]


def apply_placement(runner: MoERunner, placement: Placement) -> None:
    """Move the experts of a runner to where a plan wants them; every rank has to call this between two calls.

    Each expert comes from the first rank that holds it, unless it is there already. A rank has old and new experts in
    memory until it is done.

    Raises:
        ConfigError: a placement for another layer or number of ranks.
        ParallelError: ranks that were given different placements.
    """
    ranks = _ranks_of(runner)
    old, comm = ranks.placement, ranks.comms["ep"]
    if placement.ranks != old.ranks or placement.num_experts != old.num_experts:
        raise ConfigError(
            f"placement of {placement.num_experts} experts on {placement.ranks} ranks: expected {old.num_experts} on "
            f"{old.ranks}, as the runner has them"
        )
    new = dataclasses.replace(ranks, placement=placement)
    check_agreement(new, runner.dtype)
    found = dict(shard_weights(runner.config, runner.weights, ranks).named_tensors())
    for name in BY_EXPERT:
        if name in found and found[name].ndim:
            found[name] = _moved(found[name], old, placement, comm)
    config = dataclasses.replace(runner.config, num_local_experts=len(placement.slots[comm.rank]))
    runner.rebind(config, MoEWeights(**found), new)


def _moved(tensor: Tensor, old: Placement, new: Placement, comm: Comm) -> Tensor:
    """[new local experts, ...] from [old local experts, ...]."""
    here = comm.rank
    source = {e: next(rank for rank, held in enumerate(old.slots) if e in held) for e in range(old.num_experts)}
    lacks = [[e for e in held if e not in old.slots[rank]] for rank, held in enumerate(new.slots)]
    goes = [[e for e in wanted if source[e] == here] for wanted in lacks]
    comes = [[e for e in lacks[here] if source[e] == rank] for rank in range(comm.size)]
    local = {e: slot for slot, e in enumerate(old.slots[here])}
    index = torch.tensor([local[e] for each in goes for e in each], dtype=torch.int64, device=tensor.device)
    arrived = comm.start_all_to_all(tensor[index], [len(each) for each in goes], [len(each) for each in comes]).wait()
    place = {e: tensor.shape[0] + number for number, e in enumerate(e for each in comes for e in each)}
    wanted = [local.get(e, place.get(e, -1)) for e in new.slots[here]]
    out = tensor.new_empty((len(wanted), *tensor.shape[1:]))
    for slot, at in enumerate(wanted):
        out[slot].copy_(tensor[at] if at < tensor.shape[0] else arrived[at - tensor.shape[0]])
    return out


def _ranks_of(runner: MoERunner) -> Ranks:
    if runner.parallel is None:
        raise InputError("mesh=None: this runner is one process, its experts have nowhere to go; bind it with mesh=")
    return runner.parallel
