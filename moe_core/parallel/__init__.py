"""More than one device: tensor, expert, sequence and data parallel layers on torch.distributed; docs/parallel.md."""

from .comm import Comm
from .context import token_counts
from .load import load_local_weights
from .mesh import Parallel, Ranks
from .placement import Placement
from .planner import imbalance, plan_placement
from .rebalance import apply_placement, measured_load
from .shard import shard_weights
from .simulate import SimulatedMesh, simulate
from .spread import spread_model

__all__ = [
    "Comm",
    "Parallel",
    "Placement",
    "Ranks",
    "SimulatedMesh",
    "apply_placement",
    "imbalance",
    "load_local_weights",
    "measured_load",
    "plan_placement",
    "shard_weights",
    "simulate",
    "spread_model",
    "token_counts",
]
