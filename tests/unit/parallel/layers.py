"""Layers on simulated ranks beside the same layer in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_core import MoEConfig, MoERunner, MoEWeights
from moe_core.parallel import Parallel, SimulatedMesh, simulate
from moe_core.testing import random_weights, tolerance

SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 16, "top_k": 4, "renormalize": True}
SHARED = {"shared_intermediate_size": 40, "shared_expert_gate": True}


def config_of(**fields: Any) -> MoEConfig:
    return MoEConfig(**{**SIZES, **fields})


def whole(config: MoEConfig, weights: MoEWeights, rows: Tensor, **options: Any) -> Tensor:
    return MoERunner(config, weights, **options)(rows)


def spread(
    config: MoEConfig,
    weights: MoEWeights,
    inputs: Any,
    axes: dict[str, int],
    *,
    worlds: list[Any] | None = None,
    runner: dict[str, Any] | None = None,
    **options: Any,
) -> list[Tensor]:
    """The result of each rank; ``inputs(mesh)`` are a rank's rows."""

    def rank(mesh: SimulatedMesh) -> Tensor:
        if worlds is not None and mesh.rank == 0:
            worlds.append(mesh.world)
        return MoERunner(config, weights, mesh=Parallel(mesh, **options), **(runner or {}))(inputs(mesh))

    return simulate(rank, **axes)


def parts(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    assert sum(counts) == rows.shape[0]
    return list(rows.split(list(counts)))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert torch.isfinite(found).all()
    error = (found.double() - wanted.double()).norm()
    assert error <= tolerance(found.dtype, "layer") * wanted.double().norm(), float(error)


__all__ = ["SHARED", "SIZES", "assert_near", "config_of", "parts", "random_weights", "spread", "whole"]
