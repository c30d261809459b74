"""What torchrun starts: every case on real process groups beside the same layer in one process, one JSON line a case.

torchrun --standalone --nproc-per-node=2 tests/parallel/ranks.py --out results.jsonl [--device cuda] [--die]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_core import MoEConfig, MoERunner
from moe_core.errors import ParallelError
from moe_core.parallel import (
    Parallel,
    Placement,
    apply_placement,
    load_local_weights,
    measured_load,
    plan_placement,
    token_counts,
)
from moe_core.parallel.direct import Direct
from moe_core.testing import random_weights, tolerance

SIZES = {"hidden_size": 64, "intermediate_size": 48, "num_experts": 16, "top_k": 4, "renormalize": True}
SHARED = {"shared_intermediate_size": 80, "shared_expert_gate": True}

Axes = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer on one mesh; ``own``: the axes along which ranks bring tokens of their own; ``direct``: attributes of
    that way."""

    axes: Axes
    own: tuple[str, ...] = ("ep",)
    config: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SHARED))
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    known: bool = False
    counts: tuple[int, ...] = (37, 0, 19, 64)
    direct: dict[str, int] = dataclasses.field(default_factory=dict)


def cases(world: int, device: str) -> dict[str, Case]:
    """Those of a number of ranks."""
    zero = {"zero_expert_num": 3, "zero_expert_type": "identity", "top_k": 6}
    biases = {**SHARED, "expert_bias": True, "shared_expert_bias": True}
    found = {
        "tp": Case({"tp": world}, ()),
        "tp biases": Case({"tp": world}, (), biases),
        "tp zero experts": Case({"tp": world}, (), zero),
        "sp": Case({"tp": world}, ("tp",), options={"sequence_parallel": True}),
        "ep all_to_all": Case({"ep": world}, options={"dispatch": "all_to_all"}),
        "ep all_to_all zero experts": Case({"ep": world}, config=zero, options={"dispatch": "all_to_all"}),
        "ep all_gather": Case({"ep": world}, options={"dispatch": "all_gather"}),
        "ep all_gather, counts known": Case({"ep": world}, options={"dispatch": "all_gather"}, known=True),
        "ep chunked": Case({"ep": world}, config={**SHARED, "max_chunk_tokens": 16}),
        "ep redundant": Case({"ep": world}, options={"placement": redundant(world)}),
        "ep inside tp": Case({"ep": world}, (), options={"tokens": "replicated"}),
        "dp": Case({"dp": world}, ("dp",)),
    }
    if world == 4:
        found |= {
            "tp x ep": Case({"ep": 2, "tp": 2}),
            "tp x ep biases": Case({"tp": 2, "ep": 2}, config=biases),
            "sp x ep": Case({"ep": 2, "tp": 2}, ("ep", "tp"), options={"sequence_parallel": True}),
            "dp x ep": Case({"dp": 2, "ep": 2}, ("dp", "ep")),
            "dp x tp": Case({"dp": 2, "tp": 2}, ("dp",)),
        }
    if device != "cpu":
        direct: dict[str, Any] = {"options": {"dispatch": "direct"}}
        beside: dict[str, Any] = {"direct": {"beside_from": 0, "piece": 1 << 10}}
        parts: dict[str, Any] = {"direct": {"split_from": 0}, "known": True}
        even: dict[str, Any] = {"counts": (33,) * 4}
        found["ep direct"] = Case({"ep": world}, **direct)
        found["ep direct beside"] = Case({"ep": world}, **direct, **beside)
        found["ep direct parts"] = Case({"ep": world}, **direct, **parts)
        found["ep direct even"] = Case({"ep": world}, **direct, **even)
        found["ep direct even beside"] = Case({"ep": world}, **direct, **even, **beside)
        # Enough rows for experts that leave the sum to combine.
        many: dict[str, Any] = {"counts": (300, 0, 190, 640)}
        found["ep direct pieces"] = Case({"ep": world}, **direct, **beside, **many)
        found["ep direct pieces biases"] = Case({"ep": world}, config=biases, **direct, **beside, counts=(310,) * 4)
        found["ep direct zero experts"] = Case({"ep": world}, config=zero, **direct, **even)
    return found


def redundant(ranks: int) -> Placement:
    """Uneven counts, and copies of the busiest."""
    return plan_placement([40.0, 30.0, *range(14)], ranks, redundant=3)


class Bench:
    """The process groups of this run, and its results."""

    def __init__(self, device: str) -> None:
        self.device, self.rank, self.world = device, dist.get_rank(), dist.get_world_size()
        self._meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}

    def mesh(self, axes: Axes) -> DeviceMesh:
        key = tuple(axes.items())
        if key not in self._meshes:
            self._meshes[key] = init_device_mesh(self.device, tuple(axes.values()), mesh_dim_names=tuple(axes))
        return self._meshes[key]

    def index(self, axes: Axes, own: tuple[str, ...]) -> tuple[int, int]:
        """This rank's number among those with tokens of their own, and how many there are."""
        mesh, number, count = self.mesh(axes), 0, 1
        for axis in axes:
            if axis in own:
                number, count = number * axes[axis] + mesh.get_local_rank(axis), count * axes[axis]
        return number, count

    def run(self, case: Case, dtype: torch.dtype) -> dict[str, Any]:
        """Relative error against one process on this rank's rows."""
        torch.manual_seed(7)
        config = MoEConfig(**{**SIZES, **case.config})
        weights = random_weights(config, dtype=dtype, device=self.device)
        number, count = self.index(case.axes, case.own)
        counts = list(case.counts[:count]) if count > 1 else [29]
        rows = torch.randn(sum(counts), 64).to(device=self.device, dtype=dtype)
        wanted = MoERunner(config, weights)(rows).split(counts)[number]
        runner = MoERunner(config, weights, mesh=Parallel(self.mesh(case.axes), **{"timeout": 60.0, **case.options}))
        known = token_counts(counts) if case.known else contextlib.nullcontext()
        with known:
            found = [runner(rows.split(counts)[number]) for _ in range(3)]
        assert all(torch.equal(found[0], again) for again in found[1:]), "not the same in every call"
        assert found[0].shape == wanted.shape
        error = float((found[0].double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
        assert torch.isfinite(found[0]).all()
        return {"error": error, "allowed": tolerance(dtype, "layer"), "ok": error <= tolerance(dtype, "layer")}


def moved_experts(bench: Bench) -> dict[str, Any]:
    """A plan from measured load, applied to a bound runner."""
    config = MoEConfig(**{**SIZES, **SHARED})
    torch.manual_seed(11)
    weights = random_weights(config, device=bench.device)
    mine = torch.randn(50, 64, device=bench.device)[: 50 - 20 * bench.rank]
    runner = MoERunner(config, weights, mesh=bench.mesh({"ep": bench.world}))
    with runner.recording() as record:
        before = runner(mine)
    load = measured_load(runner, record.tokens_per_expert)
    plan = plan_placement(load, bench.world, redundant=4)
    apply_placement(runner, plan)
    after = runner(mine)
    back = Placement.round_robin(16, bench.world)
    apply_placement(runner, back)
    again = runner(mine)
    error = float(max((after - before).norm(), (again - before).norm()) / before.norm())
    held = runner.report is not None and runner.parallel.placement == back
    return {"error": error, "allowed": tolerance(torch.float32, "layer"), "ok": error <= 1e-5 and held, "load": load}


def local_experts(bench: Bench) -> dict[str, Any]:
    """Each rank reads its experts and its slice from a checkpoint."""
    from moe_core.checkpoints import Entry, Layout, load_weights, save_weights

    folder = Path(tempfile.gettempdir()) / f"moe_core_parallel_{os.environ['MASTER_PORT']}"
    config = MoEConfig(**{**SIZES, **SHARED})
    torch.manual_seed(13)
    weights = random_weights(config)
    if bench.rank == 0:
        folder.mkdir(exist_ok=True)
        layout = Layout(tuple(Entry(name, (name,)) for name, _ in weights.named_tensors()))
        save_weights(weights, folder / "model.safetensors", "mlp", config, layout)
    dist.barrier()
    axes = {"ep": bench.world // 2, "tp": 2} if bench.world > 2 else {"ep": 2}
    mesh = Parallel(bench.mesh(axes), placement=Placement.round_robin(16, axes["ep"]))
    part = load_local_weights(folder, "mlp", config, mesh, device=bench.device)
    whole = load_weights(folder, "mlp", config, device=bench.device)
    rows = torch.randn(21, 64).to(bench.device)
    wanted, found = MoERunner(config, whole)(rows), MoERunner(config, part, mesh=mesh)(rows)
    share = part.w13_weight.numel() / whole.w13_weight.numel()
    dist.barrier()
    if bench.rank == 0:
        (folder / "model.safetensors").unlink()
        folder.rmdir()
    error = float((found - wanted).norm() / wanted.norm())
    return {"error": error, "share": share, "ok": error <= 1e-5 and share == 1 / bench.world}


def mismatch(bench: Bench) -> dict[str, Any]:
    """One rank binds another layer."""
    config = MoEConfig(**{**SIZES, "top_k": 3 if bench.rank == 1 else 4})
    try:
        MoERunner(config, random_weights(config, device=bench.device), mesh=bench.mesh({"ep": bench.world}))
    except ParallelError as error:
        text = str(error)
        return {"ok": "config.top_k" in text and "rank 1 has 3" in text, "text": text}
    return {"ok": False, "text": "bound"}


def bury(bench: Bench) -> dict[str, Any]:
    """The last rank ends without a word; the others' next call says so."""
    config = MoEConfig(**SIZES)
    mesh = Parallel(bench.mesh({"ep": bench.world}), timeout=10.0)
    runner = MoERunner(config, random_weights(config, device=bench.device), mesh=mesh)
    rows = torch.randn(5, 64, device=bench.device)
    runner(rows)
    dist.barrier()
    if bench.rank == bench.world - 1:
        os._exit(0)  # status 0: torchrun must not end the others before they have noticed
    started = time.monotonic()
    try:
        runner(rows)
        if bench.device != "cpu":
            torch.accelerator.synchronize()
    except ParallelError as error:
        return {"ok": True, "seconds": time.monotonic() - started, "text": str(error)}
    return {"ok": False, "seconds": time.monotonic() - started, "text": "no error"}


def main() -> None:
    """Run all cases; rank 0 writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="cases whose names contain this")
    parser.add_argument("--die", action="store_true", help="at the end, let the last rank end without a word")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")
    bench = Bench(arguments.device)
    out = Path(arguments.out)

    def note(name: str, run: Callable[[], dict[str, Any]], alone: bool = False) -> None:
        if arguments.only and arguments.only not in name:
            return
        started = time.monotonic()
        try:
            result = run()
        except Exception as error:
            result = {"ok": False, "text": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        every: list[Any] = [result]
        if not alone:
            every = [None] * bench.world
            dist.all_gather_object(every, result)
        if bench.rank == 0:
            worst = max(every, key=lambda each: (not each["ok"], each.get("error", 0.0)))
            line = {"case": name, **worst, "took": time.monotonic() - started}
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(name, "ok" if worst["ok"] else f"FAILED {worst}", flush=True)

    with torch.no_grad():
        # One dtype on a GPU: kernels are compiled for each, which takes longer than all of the rest.
        dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
        for name, case in cases(bench.world, arguments.device).items():
            usual = {attribute: getattr(Direct, attribute) for attribute in case.direct}
            for attribute, value in case.direct.items():
                setattr(Direct, attribute, value)
            note(name, lambda case=case: bench.run(case, dtype))
            for attribute, value in usual.items():
                setattr(Direct, attribute, value)
        for function in (moved_experts, local_experts, mismatch):
            note(function.__name__, lambda function=function: function(bench))
        if arguments.die:
            note("bury", lambda: bury(bench), alone=True)
    sys.stdout.flush()
    if arguments.die:
        os._exit(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
