"""Sums and rows over real ranks: what a plan of sums asks for, and how the rows of a group come together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reduction import Collective
from .comm import Comm
from .mesh import Ranks


class RankGroup:
    """A plan's sums over real ranks; ``counts`` are the rows of each rank of "tp" in this call, under its sequence
    parallelism."""

    def __init__(self, ranks: Ranks, counts: list[int] | None = None) -> None:
        self.ranks, self.counts = ranks, counts

    def reduce(self, tensor: Tensor, collective: Collective) -> Tensor:
        """Sum over the axes, one after the other."""
        if collective.kind == "reduce_scatter":
            (axis,) = collective.axes
            assert self.counts is not None
            return reduce_scatter(self.ranks.comms[axis], tensor, self.counts)
        for axis in collective.axes:
            tensor = self.ranks.comms[axis].all_reduce(tensor)
        return tensor

    def keep_first(self, tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
        """Zeros where this is not the first rank along each axis."""
        first = all(self.ranks.comms[axis].rank == 0 for axis in axes)
        return tensor if first else torch.zeros_like(tensor)


def reduce_scatter(comm: Comm, tensor: Tensor, counts: list[int]) -> Tensor:
    """This rank's rows of the sum over ranks, from rows of all ranks in order; summed in float32, in order of ranks.

    Each row travels once to the rank that it belongs to, as many bytes as a ring would move, and nothing is rounded on
    the way.
    """
    own = counts[comm.rank]
    parts = comm.start_all_to_all(tensor, counts, [own] * comm.size).wait()
    return parts.view(comm.size, own, *tensor.shape[1:]).sum(0, dtype=torch.float32).to(tensor.dtype)


def gather_rows(comm: Comm, tensor: Tensor, counts: list[int]) -> Tensor:
    """The rows of all ranks in order, from any number on each."""
    width = max(counts)
    found = comm.start_all_gather(pad_rows(tensor, width)).wait()
    if min(counts) == width:
        return found.flatten(0, 1)
    return torch.cat([found[rank, :count] for rank, count in enumerate(counts)])


def pad_rows(tensor: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """``tensor`` with rows of ``value`` behind it; itself where there are enough."""
    missing = rows - tensor.shape[0]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)])
