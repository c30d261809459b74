"""More than one device: tensor, expert, sequence and data parallel layers on torch.distributed; docs/parallel.md."""

from .comm import Comm
from .context import token_counts
from .mesh import Parallel, Ranks
from .placement import Placement
from .shard import shard_weights
from .simulate import SimulatedMesh, simulate

__all__ = [
    "Comm",
    "Parallel",
    "Placement",
    "Ranks",
    "SimulatedMesh",
    "shard_weights",
    "simulate",
    "token_counts",
]
