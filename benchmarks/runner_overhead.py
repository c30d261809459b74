"""What a bound runner costs on top of its stages: MoERunner against the four reference stage functions by hand.

Interleaved in one process, so that drift of the machine hits both alike.

    python benchmarks/runner_overhead.py [--json benchmarks/runner_overhead.json]
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from moe_core import MoEConfig, MoELayer, MoERunner, reference
from moe_core.types import Plan

BATCH, ROUNDS = 200, 60


def main(json_: Annotated[Path | None, typer.Option("--json", help="write the record here")] = None) -> None:
    """Time both, print medians and spread, and the difference in microseconds a call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(64, 32, 8, 2, shared_intermediate_size=32))
    x = torch.randn(1, 64)
    with torch.no_grad():
        runner = MoERunner(layer.config, layer.weights(), backend="reference")
        plan = Plan(runner.config, runner.weights, x.device, x.dtype)

        def by_hand() -> torch.Tensor:
            shared = reference.moe_shared_experts(plan, x)
            routing = reference.moe_gate(plan, x, None, None)
            return reference.moe_reduce(plan, routing, reference.moe_experts(plan, x, routing), shared)

        assert torch.equal(by_hand(), runner(x))
        times: dict[str, list[float]] = {"by_hand": [], "runner": []}
        for _ in range(ROUNDS):
            for name, call in (("by_hand", by_hand), ("runner", lambda: runner(x))):
                times[name].append(_microseconds(call))
    added = statistics.median(r - h for r, h in zip(times["runner"], times["by_hand"], strict=True))
    record = {
        "what": "microseconds a call, T=1, H=64, I=32, E=8, K=2, shared 32, float32, 1 thread",
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "calls_per_round": BATCH,
        **{name: _summary(values) for name, values in times.items()},
        "runner_adds_us": round(added, 2),
    }
    print(json.dumps(record, indent=2))
    if json_ is not None:
        json_.write_text(json.dumps(record, indent=2) + "\n")


def _microseconds(call: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    for _ in range(BATCH):
        call()
    return (time.perf_counter() - start) / BATCH * 1e6


def _summary(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": round(statistics.median(values), 2), "p25": round(low, 2), "p75": round(high, 2)}


if __name__ == "__main__":
    typer.run(main)
