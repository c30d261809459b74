"""Reading from a checkpoint only what this rank holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..checkpoints import load_weights
from ..config import MoEConfig
from ..weights import MoEWeights
from .mesh import Parallel, Ranks
from .shard import shard_weights


def load_local_weights(path: str | Path, prefix: str, config: MoEConfig, mesh: Any, **options: Any) -> MoEWeights:
    """This rank's part of one layer; ``MoERunner(config, weights, mesh=mesh)`` takes it.

    Args:
        path, prefix, options: as for :func:`moe_core.checkpoints.load_weights`.
        config: of the whole layer.
        mesh: a DeviceMesh or a :class:`Parallel`, as the runner will get it; no rank waits for another here.
    Returns:
        MoEWeights: the experts that the placement gives this rank, in its order, and of them the slice of "tp". Only
        their bytes are read, but for "tp" those of all columns.
    Raises:
        CheckpointError: as for load_weights.
        ConfigError: a layer that cannot be spread so.
    """
    ranks = Ranks.settle(Parallel.of(mesh), config)
    held = ranks.placement.slots[ranks.comms["ep"].rank]
    part = dataclasses.replace(config, num_local_experts=len(held))
    return shard_weights(part, load_weights(path, prefix, part, experts=held, **options), ranks)
