"""The floor of a cell: what no implementation can beat on the ceilings that were measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .shapes import Shape


@dataclass(frozen=True)
class Work:
    """The fewest bytes that have to move, and the floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Floor:
    """Seconds, and what sets them: ``memory`` or ``compute``."""

    seconds: float
    bound: str


def work(
    shape: Shape, stage: str, tokens: int, experts_hit: int, itemsize: int, expert_bytes: float | None = None
) -> Work:
    """Count one call.

    Args:
        shape: the layer.
        stage: ``experts`` or ``layer``, which adds the router, the shared experts and their gate.
        tokens: T.
        experts_hit: how many experts the routing of this call chose at all.
        itemsize: bytes of one value of weights, input and output.
        expert_bytes: of one routed expert as it is stored, with its scales; None counts ``itemsize`` a weight.
    Returns:
        Work: weights of the experts hit once, input and output once; two operations a multiply-add of the products.
        Intermediates are left out: a perfect kernel keeps them on the chip.
    """
    h, i, k = shape.hidden_size, shape.intermediate_size, shape.top_k
    routed = experts_hit * (3 * h * i * itemsize if expert_bytes is None else expert_bytes)
    values = 2 * tokens * h
    flops = 6 * tokens * k * h * i
    if stage == "layer":
        gates = shape.num_experts + bool(shape.config(stage).shared_expert_gate)
        values += gates * h + 3 * h * shape.shared_intermediate_size
        flops += 2 * tokens * h * gates + 6 * tokens * h * shape.shared_intermediate_size
    return Work(round(routed) + values * itemsize, flops)


def floor(task: Work, read_bytes_per_second: float, flops_per_second: float) -> Floor:
    """max(bytes / bandwidth, operations / peak)."""
    memory, compute = task.bytes / read_bytes_per_second, task.flops / flops_per_second
    return Floor(max(memory, compute), "memory" if memory >= compute else "compute")


def mean_floor(tasks: Sequence[Work], read_bytes_per_second: float, flops_per_second: float) -> Floor:
    """The mean over several routing draws, which calls take in turn; bound by what binds most of them."""
    floors = [floor(task, read_bytes_per_second, flops_per_second) for task in tasks]
    bounds = [each.bound for each in floors]
    return Floor(sum(each.seconds for each in floors) / len(floors), max(sorted(set(bounds)), key=bounds.count))
