"""Search block sizes for given layers on the GPU at hand, and keep them where :mod:`moe_cuda.tuning` looks.

    moe-core tune cuda --shape 2048,768,128,8 --tokens 1,16,64,256,1024,4096 [--out FILE]

Every candidate is compiled first, in as many processes as there are cores; then each is checked against the others'
result and timed by replaying a CUDA graph, with the L2 cache flushed before each replay. What is written after each
cell is found again by the next run (``--again`` measures anew).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, Routing
from moe_core.bench.timing import Flusher, Mode, capture, graph_sampler
from moe_core.platform import Platform
from moe_core.types import Plan

from . import experts, layout, tuning
from .candidates import Axes, candidates, neighbours
from .kernels.align import Tiles, max_tiles
from .launch import Kernel
from .tuning import Choice, Few, Grouped, Pairs, Shape


def variants(start: Choice, axes: Axes) -> Iterator[Choice]:
    """All choices in which one part differs from the start: what has to be compiled."""
    for part, values in axes.items():
        for value in values:
            yield changed(start, part, value)


def changed(choice: Choice, part: str, value: Any) -> Choice:
    """``choice`` with another part."""
    return dataclasses.replace(choice, **(value if isinstance(choice, Few) else {part: value}))


def layer(shape: Shape, device: str) -> Plan:
    """A plan of one bfloat16 layer; on ``meta`` it can only be compiled for."""
    config = MoEConfig(shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
    where = torch.device(device)
    sizes = (shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size)
    w13 = torch.empty(sizes, dtype=torch.bfloat16, device=where)
    w2 = torch.empty(sizes[0], sizes[2], shape.intermediate_size, dtype=torch.bfloat16, device=where)
    if where.type != "meta":
        for expert in range(shape.num_experts):
            w13[expert].normal_(0, shape.hidden_size**-0.5)
            w2[expert].normal_(0, shape.intermediate_size**-0.5)
    weights = MoEWeights(w13_weight=w13, w2_weight=w2)
    platform = Platform.detect("cuda", torch.bfloat16)
    return Plan(config, layout.prepare(config, weights, platform), where, torch.bfloat16)


UNEVEN = 0.1
"""Standard deviation of the experts' mean logits in :func:`draw`. Were all alike, rows an expert would only differ by
chance, and tiles that hold the mean and little more would look better than they are behind a router."""


def draw(shape: Shape, tokens: int, device: torch.device) -> tuple[Tensor, Routing]:
    """Hidden states, and the softmax top-k of random logits, the same for everybody who draws."""
    if device.type == "meta":
        generator = None
    else:
        generator = torch.Generator(device).manual_seed(7919 + tokens)
    x = torch.randn(tokens, shape.hidden_size, device=device, generator=generator).to(torch.bfloat16)
    logits = torch.randn(tokens, shape.num_experts, device=device, generator=generator)
    logits += UNEVEN * torch.randn(shape.num_experts, device=device, generator=generator)
    weights, ids = logits.softmax(-1).topk(shape.top_k, -1)
    return x, Routing(weights / weights.sum(-1, keepdim=True), ids.to(torch.int32))


def compile_one(job: tuple[Shape, int, Choice]) -> str | None:
    """Compile one choice's kernels into Triton's cache, in a process that computes nothing; what went wrong, if so."""
    shape, tokens, choice = job
    plan = layer(shape, "meta")
    x, routing = draw(shape, tokens, plan.device)

    def warm(kernel: Kernel, grid: tuple[int, ...], *arguments: Any) -> None:
        kernel.compile(*arguments)

    try:
        if isinstance(choice, Few):
            experts.few_products(plan, choice, x, routing, torch.empty_like(x), warm)
        elif isinstance(choice, Pairs):
            experts.pairs_products(plan, choice, x, routing, warm)
        else:
            count = max_tiles(tokens * shape.top_k, shape.num_experts, choice.rows)
            sizes = (tokens * shape.top_k, count, count, count, 3)
            ints = (torch.empty(size, dtype=torch.int32, device=plan.device) for size in sizes)
            experts.grouped_products(plan, choice, x, routing, Tiles(*ints), warm)
    except Exception as error:
        return f"{choice}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


class Clock:
    """Times of CUDA graphs as ``moe-core bench`` takes them, the L2 cache flushed by zeroing before each replay."""

    def __init__(self) -> None:
        self._flusher = Flusher(torch.device("cuda"))

    def microseconds(self, call: Any, budget: float = 0.008) -> float:
        """The median of as many replays as fit a budget of seconds, three at least."""
        sample = self._sampler(call)
        first = [sample(0) for _ in range(2)][-1]
        return statistics.median(sample(0) for _ in range(max(3, min(60, int(budget / first))))) * 1e6

    def in_turn(self, calls: Sequence[Any], seconds: float) -> list[float]:
        """Each call's median, all calls in turn for so long, three replays of one after the other."""
        samplers = [self._sampler(call) for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        began = time.time()
        while time.time() - began < seconds or len(times[0]) < 9:
            for sample, of_call in zip(samplers, times, strict=True):
                of_call += [sample(0) for _ in range(3)]
        return [statistics.median(of_call) * 1e6 for of_call in times]

    def _sampler(self, call: Any) -> Any:
        graph, _ = capture(lambda _: call(), None)  # type: ignore[arg-type]
        return graph_sampler(graph, Mode("graph", "zero"), self._flusher)


FINALISTS = 6
"""How many choices of a cell are timed in turn."""
FINAL_SECONDS = 0.4
"""For how long."""


Starts = list[tuple[Choice, Axes]]


def search(plan: Plan, shape: Shape, tokens: int, clock: Clock, broken: set[str], starts: Starts) -> dict[str, Any]:
    """The fastest choice for so many tokens, with every form's time."""
    x, routing = draw(shape, tokens, plan.device)
    times: dict[Choice, float] = {}
    forms: dict[str, float] = {}
    expected: Tensor | None = None
    for start, axes in starts:
        choice, fastest = start, float("inf")
        for part, values in axes.items():
            for value in values:
                tried = changed(choice, part, value)
                if tried not in times:
                    out = torch.empty_like(x)
                    try:
                        experts.run(plan, tried, x, routing, out)
                        if expected is None:
                            expected = out.float()
                        if float((out.float() - expected).norm() / expected.norm()) > 1e-2:
                            raise ValueError("another result than the first candidate's")
                        call = functools.partial(experts.run, plan, tried, x, routing, out)
                        times[tried] = clock.microseconds(call)
                    except Exception as error:
                        broken.add(f"{tried}: {type(error).__name__}: {str(error).splitlines()[0]}")
                        continue
                if times[tried] < fastest:
                    fastest, choice = times[tried], tried
        if fastest < forms.get(_name(choice), float("inf")):
            forms[_name(choice)] = round(fastest, 1)
    last = sorted(times, key=times.__getitem__)[:FINALISTS]
    assert last, f"no choice runs: {sorted(broken)}"
    out = torch.empty_like(x)
    found = clock.in_turn([functools.partial(experts.run, plan, of, x, routing, out) for of in last], FINAL_SECONDS)
    took, best = min(zip(found, last, strict=True), key=lambda pair: pair[0])
    return {**tuning.to_json(best), "us": round(took, 1), "forms": forms}


def starts_near(device: str, capability: str, loader: bool) -> Callable[[Shape, int], Starts]:
    """What to search around the tables' choices for this device."""

    def starts(shape: Shape, tokens: int) -> Starts:
        choices = tuning.choices(shape, "bfloat16", device, False, capability)
        return neighbours((choices if loader else choices.without_tall_tiles())(tokens), loader)

    return starts


def _name(choice: Choice) -> str:
    if not isinstance(choice, Grouped):
        return type(choice).__name__.lower()
    if choice.turned:
        return f"grouped {choice.rows} turned"
    return f"grouped {choice.rows}" + (" loader" if choice.first.loader else "")


def main(arguments: list[str]) -> int:
    """Compile, time, write; the exit code."""
    if any(argument.startswith("--quant") for argument in arguments):
        from . import tune_quantised

        return tune_quantised.main(arguments)
    parser = argparse.ArgumentParser(prog="moe-core tune cuda", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", required=True, help="H,I,E,K; may be given several times")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,512,1024,2048,4096,16384")
    parser.add_argument("--out", type=Path, help="default: this machine's own table")
    parser.add_argument("--again", action="store_true", help="measure also what the file has already")
    parser.add_argument("--near", action="store_true", help="only around what the tables have")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further cell after so many")
    given = parser.parse_args(arguments)
    began, console = time.time(), Console()
    if not torch.cuda.is_available() or layout.interpreted():
        Console(stderr=True).print("tune needs a GPU, and no TRITON_INTERPRET")
        return 2
    name, loader = torch.cuda.get_device_name(), layout.has_loader(torch.cuda.get_device_capability())
    path = given.out or tuning.own_table(name)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    new = {"device": name, "capability": capability, "entries": []}
    record = json.loads(path.read_text()) if path.exists() else new
    shapes = [Shape(*map(int, text.split(","))) for text in given.shape]
    counts = [int(text) for text in given.tokens.split(",")]
    starts = starts_near(name, capability, loader) if given.near else lambda *cell: candidates(*cell, loader)
    # Once for all, because the tables change meanwhile.
    cells = {
        (shape, tokens): starts(shape, tokens)
        for shape in shapes
        for tokens in counts
        if given.again or str(tokens) not in _entry(record, shape)["tokens"]
    }
    jobs = [
        (shape, tokens, choice)
        for (shape, tokens), of_cell in cells.items()
        for start, axes in of_cell
        for choice in variants(start, axes)
    ]
    broken: set[str] = set()
    spawn = multiprocessing.get_context("spawn")
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        compiling = bar.add_task(f"compile {len(jobs)} choices", total=len(jobs))
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
            for fault in pool.map(compile_one, jobs, chunksize=4):
                bar.advance(compiling)
                broken.update([fault] if fault else [])
        clock = Clock()
        timing = bar.add_task(f"time {len(cells)} cells", total=len(cells))
        for shape in shapes:
            todo = [tokens for of, tokens in cells if of == shape]
            plan = layer(shape, "cuda") if todo and time.time() - began < given.seconds else None
            for tokens in todo:
                if plan is None or time.time() - began > given.seconds:
                    break
                found = search(plan, shape, tokens, clock, broken, cells[shape, tokens])
                _entry(record, shape)["tokens"][str(tokens)] = found
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n")
                console.print(f"{dataclasses.astuple(shape)} {tokens:6d} {found['us']:9.1f} us {found['forms']}")
                bar.advance(timing)
            del plan
            torch.cuda.empty_cache()
    for fault in sorted(broken):
        console.print("not usable:", fault)
    return 0


def _entry(record: dict[str, Any], shape: Shape) -> dict[str, Any]:
    wanted = list(dataclasses.astuple(shape))
    for entry in record["entries"]:
        if entry["shape"] == wanted and entry["dtype"] == "bfloat16":
            return entry  # type: ignore[no-any-return]
    entry = {"shape": wanted, "dtype": "bfloat16", "quant": None, "triton": triton.__version__, "tokens": {}}
    record["entries"].append(entry)
    return entry
