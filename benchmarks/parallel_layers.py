"""One layer on several devices beside the same layer on one: speed-up, error and parts, under torchrun.

Every rank makes the whole layer; one device alone runs all tokens, a rank-set shares them ("ep": each rank brings its
part; "tp": all bring the same). Calls are launched back to back, as a model launches its layers; a sample is the mean
of at least four behind two that are not counted, the slowest rank's. Numbers of tokens are known to all ranks
beforehand, as a serving engine knows them.

    torchrun --standalone --nproc-per-node=2 benchmarks/parallel_layers.py --json out.json [--shapes qwen3-30b-a3b] \
        [--tokens 256 4096 16384] [--ways together tp] [--parts] [--budget 120]
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moe_core import MoERunner
from moe_core.bench.device import device_facts, versions
from moe_core.bench.draw import make_weights
from moe_core.bench.shapes import SHAPES
from moe_core.parallel import Parallel, token_counts
from moe_core.parallel.direct import ROWS_THERE, Direct, _Part
from moe_core.parallel.exchange import Call as Pass
from moe_core.parallel.exchange import current
from moe_core.testing import tolerance
from moe_core.types import Dispatched, ExpertsOut

SAMPLES = 15
Call = Callable[[], Tensor]


def seconds(call: Call, samples: int) -> list[float]:
    """Mean seconds a call, of back-to-back calls, ``samples`` times."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    each = max(4, min(10, int(0.02 / (time.perf_counter() - start))))
    count = torch.tensor([each], device="cuda")
    dist.all_reduce(count, dist.ReduceOp.MIN)
    each, found = int(count), []
    for _ in range(samples):
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(2):  # the device is at work when the sample begins
            call()
        begin.record()
        for _ in range(each):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / each / 1e3)
    return found


def alone(call: Call, samples: int) -> list[float]:
    """The same on the first rank, while the others' devices rest."""
    found: list[Any] = [None]
    rest = torch.empty(0, device="cuda")
    if dist.get_rank() == 0:
        found = [seconds(call, samples)]
    else:
        seconds(lambda: rest, samples)
    dist.broadcast_object_list(found, 0)
    return found[0]  # type: ignore[no-any-return]


def together(call: Call, samples: int) -> list[float]:
    """Sample by sample the slowest rank's."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, seconds(call, samples))
    return [max(row) for row in zip(*every, strict=True)]


def summary(times: list[float]) -> dict[str, float]:
    """Median and spread in seconds."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "p10": ordered[tenth],
        "p90": ordered[-1 - tenth],
        "min": ordered[0],
        "n": len(ordered),
    }


WAYS: dict[str, dict[str, Any]] = {
    "ep/direct parts": {"axis": "ep", "dispatch": "direct", "split_from": 0},
    "ep/direct together": {"axis": "ep", "dispatch": "direct", "split_from": 1 << 30},
    "ep/all_gather": {"axis": "ep", "dispatch": "all_gather"},
    "ep/all_to_all": {"axis": "ep", "dispatch": "all_to_all"},
    "tp": {"axis": "tp"},
}


class Session:
    """One run: its meshes and its record."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.started = arguments, time.monotonic()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        names = ("ep", "tp")
        self.meshes = {name: init_device_mesh("cuda", (self.world,), mesh_dim_names=(name,)) for name in names}
        self.record: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "torchrun benchmarks/parallel_layers.py " + " ".join(sys.argv[1:]),
            "device": device_facts(self.device),
            "ranks": self.world,
            "versions": {**versions(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))},
            "notes": "seconds; one: the whole layer on one device, measured on rank 0 while the others rest; "
            "speed_up: medians of one over the slowest rank; tokens are those of the whole rank-set",
            "cells": [],
        }

    def write(self) -> None:
        """So far."""
        if self.rank == 0:
            Path(self.arguments.json).write_text(json.dumps(self.record, indent=1) + "\n")

    def late(self) -> bool:
        """Whether the time is up, by the first rank's clock."""
        flag = torch.tensor([time.monotonic() - self.started > self.arguments.budget], device="cuda")
        dist.broadcast(flag, 0)
        return bool(flag)

    def shape(self, name: str) -> None:
        """All numbers of tokens, all ways."""
        config = SHAPES[name].config("layer")
        weights = make_weights(SHAPES[name], torch.bfloat16, self.device, 0)
        one = MoERunner(config, weights)
        if self.rank == 0:
            print(name, one.report.summary(), flush=True)
        runners: dict[str, MoERunner] = {}
        for tokens in self.arguments.tokens:
            torch.manual_seed(tokens)
            rows = torch.randn(tokens, config.hidden_size, device=self.device, dtype=torch.bfloat16)
            wanted = one(rows)
            base = alone(functools.partial(one, rows), SAMPLES)
            cell = {"shape": SHAPES[name].as_dict(), "tokens": tokens, "dtype": "bfloat16", "one": summary(base)}
            cell["ways"] = {}
            self.record["cells"].append(cell)
            for way, facts in WAYS.items():
                if self.arguments.ways and not any(part in way for part in self.arguments.ways):
                    continue
                if self.late():
                    cell["ways"][way] = {"status": "not run: out of time"}
                    continue
                cell["ways"][way] = self.measure(way, facts, config, weights, runners, rows, wanted, base)
                self.write()
            if self.arguments.parts and tokens >= 4096:
                cell["parts"] = self.parts(config, runners, rows)
                self.write()
        del runners, one, weights
        torch.cuda.empty_cache()

    def measure(
        self,
        way: str,
        facts: dict[str, Any],
        config: Any,
        weights: Any,
        runners: dict[str, MoERunner],
        rows: Tensor,
        wanted: Tensor,
        base: list[float],
    ) -> dict[str, Any]:
        """One way; a failure is kept, if all ranks have it."""
        axis = facts["axis"]
        Direct.split_from = facts.get("split_from", Direct.split_from)
        counts = [part.shape[0] for part in rows.chunk(self.world)]
        mine = rows if axis == "tp" else rows.split(counts)[self.rank].contiguous()
        goal = wanted if axis == "tp" else wanted.split(counts)[self.rank]
        key = f"{axis} {facts.get('dispatch', '')}"
        try:
            if key not in runners:
                options = {"dispatch": facts["dispatch"]} if "dispatch" in facts else {}
                runners[key] = MoERunner(config, weights, mesh=Parallel(self.meshes[axis], timeout=60.0, **options))
            runner = runners[key]
            known = counts if axis == "ep" else [rows.shape[0]]
            with token_counts(known):
                found = runner(mine)
                error = float((found.float() - goal.float()).norm() / goal.float().norm())
                times = together(lambda: runner(mine), SAMPLES)
        except Exception as error:
            if self.rank == 0:
                print(way, "FAILED", error, flush=True)
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
        worst = torch.tensor([error], device="cuda")
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        error = float(worst)
        speed_up = statistics.median(base) / statistics.median(times)
        if self.rank == 0:
            print(
                f"{rows.shape[0]} {way}: {statistics.median(times) * 1e6:.0f} us, "
                f"one {statistics.median(base) * 1e6:.0f} us, speed-up {speed_up:.3f}, error {error:.2e}",
                flush=True,
            )
        ok = error <= tolerance(torch.bfloat16, "layer")
        return {"status": "ok" if ok else "wrong", "error": error, "times": summary(times), "speed_up": speed_up}

    def parts(self, config: Any, runners: dict[str, MoERunner], rows: Tensor) -> dict[str, Any]:
        """What a call of "ep" consists of, each part by itself: where the time goes."""
        found: dict[str, Any] = {}
        runner = runners.get("ep direct") or runners.get("ep all_gather")
        if runner is None:
            return found
        binding = runner.bound(False)
        counts = [part.shape[0] for part in rows.chunk(self.world)]
        mine = rows.split(counts)[self.rank].contiguous()
        comm = runner.parallel.comms["ep"]
        every, _ = binding._gating(rows, None, None, None)
        places = runner.parallel.places
        local = type(every)(every.topk_weights, places.local(places.of(every.topk_ids), comm.rank, False))
        experts, plan = binding._local_experts, binding._local_plan
        half = type(every)(local.topk_weights[: counts[0]], local.topk_ids[: counts[0]])
        out = experts(plan, rows, local, None).value.to(mine.dtype)
        calls: dict[str, Call] = {
            "gate of a rank's rows": lambda: binding._gating(mine, None, None, None)[0].topk_ids,
            "places": lambda: places.local(places.of(every.topk_ids), comm.rank, False),
            "experts of all rows": lambda: experts(plan, rows, local, None).value,
            "experts of one rank's rows": lambda: experts(plan, rows[: counts[0]], half, None).value,
            "all-gather of rows": lambda: comm.start_all_gather(mine).wait(),
            "all-to-all of sums": lambda: comm.start_all_to_all(out, counts, [counts[self.rank]] * self.world).wait(),
            "sum of two": lambda: out[: counts[0]] + out[-counts[0] :],
        }
        if binding._shared is not None:
            calls["shared experts of a rank's rows"] = lambda: binding._shared(binding._shared_plan, mine).result()
        exchange = runner.parallel.exchange
        if isinstance(exchange, Direct):
            arrived = Dispatched(rows, local, _Part(-1, counts, beside=True))
            calls["push of rows"] = lambda: self.pushed(exchange, mine, counts)
            calls["push of sums, added"] = lambda: exchange.combine(plan, ExpertsOut(out, True), arrived).value
            left = experts(binding._leaving_plan, rows, local, None)
            if binding._leaves_sum and not left.reduced:
                asked = Pass(counts, sum_rows=binding._sum_rows, in_pieces=True)
                calls["products of all rows"] = lambda: experts(binding._leaving_plan, rows, local, None).value
                calls["sums made, pushed, added"] = lambda: self.summed(exchange, asked, plan, left, arrived)
        for name, call in calls.items():
            try:
                found[name] = summary(together(call, 7))
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:200]
            if self.rank == 0:
                shown = found[name] if isinstance(found[name], str) else f"{found[name]['median'] * 1e6:.0f} us"
                print(f"  {name}: {shown}", flush=True)
        return found

    def summed(self, exchange: Direct, call: Pass, plan: Any, left: ExpertsOut, arrived: Dispatched) -> Tensor:
        """Of rows whose sum the experts left."""
        token = current.set(call)
        try:
            return exchange.combine(plan, left, arrived).value  # type: ignore[union-attr]
        finally:
            current.reset(token)

    def pushed(self, exchange: Direct, mine: Tensor, counts: list[int]) -> Tensor:
        """There and announced, both ways at once."""
        exchange.begin(Pass(counts), mine)
        for source in exchange.others:
            exchange.memory.wait(source, ROWS_THERE)
        return mine


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b-a3b", "deepseek-v3"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 4096, 16384])
    parser.add_argument("--ways", nargs="+", help="those whose names contain one of these")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no further way is begun")
    parser.add_argument("--parts", action="store_true", help="also what a call consists of")
    arguments = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    with torch.no_grad():
        session = Session(arguments)
        for name in arguments.shapes:
            session.shape(name)
        session.write()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
