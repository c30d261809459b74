"""What a bound runner costs on top of its stages: MoERunner against four bare stage functions, called by hand.

Both are measured in turns within one process, so that drift of the machine hits both alike; what the runner adds is the
median of the differences of neighbours.

- reference: the plain-torch stages, whose own time varies by more than the runner takes.
- empty: stages that return what was made before, which leaves the runner alone.
- overlap (CUDA): empty stages with the shared experts on a second stream: fork, join and lifetimes come on top.
- op, compiled: the same through the custom op, and as the only node of a compiled graph, against an op that calls the
  bare stages. Half of what is added to the only node is the compiled frame's doing, which leaves the caches cold.
- compiled model: a compiled graph of 16 runners, one of them, against 16 times the four bare stage functions. A graph
  holds a function that it cannot look into as an op, so each of these is one.
- compiled layers: the same with MoELayer, which looks at each call whether its parameters are still those of the bind.
- compiled, graphs (CUDA): the same compiled with mode="reduce-overhead", which replays a CUDA graph.
- captured (CUDA): replays of a graph of the runner and of one of the bare stages, and the kernels in each.

    python benchmarks/runner_overhead.py [--device cuda] [--json benchmarks/runner_overhead.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_core import (
    BackendInfo,
    ExpertsOut,
    MoEConfig,
    MoELayer,
    MoERunner,
    Pending,
    Routing,
    Verdict,
    hookimpl,
    ops,
    plugins,
    reference,
)
from moe_core.types import STAGES, Plan

ROUNDS = 60
LAYERS = 16
Call = Callable[[], Tensor]


class Empty:
    """A backend whose stages hand out one tensor."""

    def __init__(self, out: Tensor, routing: Any) -> None:
        self.out, self.routing = out, routing

    @hookimpl
    def moe_backend_info(self) -> BackendInfo:
        """Every stage."""
        return BackendInfo(name="empty", device_types=("cpu", "cuda"), priority=1, stages=STAGES)

    @hookimpl
    def moe_probe(self, platform: Any) -> Verdict:
        """Always."""
        return Verdict.yes()

    @hookimpl
    def moe_gate(self, plan: Plan, hidden_states: Tensor, router_logits: Any, input_ids: Any) -> Any:
        """Made before."""
        return self.routing

    @hookimpl
    def moe_shared_experts(self, plan: Plan, hidden_states: Tensor) -> Pending:
        """Made before."""
        return Pending(self.out)

    @hookimpl
    def moe_experts(self, plan: Plan, hidden_states: Tensor, routing: Any, router_logits: Any) -> ExpertsOut:
        """Made before."""
        return ExpertsOut(self.out, True)

    @hookimpl
    def moe_reduce(self, plan: Plan, routing: Any, experts_out: ExpertsOut, shared: Pending) -> Tensor:
        """Made before."""
        shared.result()
        return self.out


def by_hand(stages: Any, plan: Plan, x: Tensor) -> Tensor:
    """The four stage functions of a backend, one after the other."""
    shared = stages.moe_shared_experts(plan, x)
    routing = stages.moe_gate(plan, x, None, None)
    if stages is reference:
        return reference.moe_reduce(plan, routing, reference.moe_experts(plan, x, routing), shared)  # type: ignore[no-any-return]
    return stages.moe_reduce(plan, routing, stages.moe_experts(plan, x, routing, None), shared)  # type: ignore[no-any-return]


def compare(bare: Call, runner: Call, batch: int, layers: int = 1) -> dict[str, Any]:
    """Medians and quartiles in microseconds a call of one of ``layers``, and what the runner adds."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def microseconds(call: Call) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(batch):
            call()
        wait()
        return (time.perf_counter() - start) / (batch * layers) * 1e6

    for call in (bare, runner):
        microseconds(call)
    times: dict[str, list[float]] = {"bare": [], "runner": []}
    for _ in range(ROUNDS):
        times["bare"].append(microseconds(bare))
        times["runner"].append(microseconds(runner))
    added = statistics.median(r - b for r, b in zip(times["runner"], times["bare"], strict=True))
    return {
        **{name: _summary(values) for name, values in times.items()},
        "runner_adds_us": round(added, 2),
        "rounds": ROUNDS,
        "calls_per_round": batch,
    }


def _summary(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": round(statistics.median(values), 2), "p25": round(low, 2), "p75": round(high, 2)}


def define_op(name: str, signature: str, call: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A function that a compiled graph cannot look into."""
    library = torch.library.Library("moe_overhead", "FRAGMENT")
    library.define(name + signature)
    library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_overhead::{name}", fake, lib=library)
    _libraries.append(library)  # it unregisters when it goes
    return getattr(torch.ops.moe_overhead, name).default


def bare_op(call: Callable[[Tensor], Tensor], name: str) -> Any:
    """The bare stages behind an op with the arguments of moe_core's own."""
    signature = (
        "(Tensor hidden_states, Tensor? router_logits, Tensor? topk_weights, Tensor? topk_ids, Tensor? input_ids, "
        "Tensor handle) -> Tensor"
    )
    return define_op(name, signature, lambda x, *others: call(x), lambda x, *others: torch.empty_like(x))


def bare_ops(stages: Any, plan: Plan, name: str) -> tuple[Any, Any, Any, Any]:
    """shared experts, gate, experts and reduce of a backend, each an op."""
    top_k = plan.config.top_k

    def gate(x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(stages.moe_gate(plan, x, None, None))  # type: ignore[return-value]

    def experts(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        more = () if stages is reference else (None,)
        return stages.moe_experts(plan, x, Routing(weights, ids), *more).value  # type: ignore[no-any-return]

    reduced = stages is not reference

    def reduce(value: Tensor, shared: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        experts_out = ExpertsOut(value, reduced)
        return stages.moe_reduce(plan, Routing(weights, ids), experts_out, Pending(shared))  # type: ignore[no-any-return]

    def fake_value(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return torch.empty_like(x) if reduced else x.new_empty(x.shape[0], top_k, x.shape[1])

    def fake_routing(x: Tensor) -> tuple[Tensor, Tensor]:
        size = (x.shape[0], top_k)
        return x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.int32)

    return (
        define_op(
            f"shared_{name}", "(Tensor x) -> Tensor", lambda x: stages.moe_shared_experts(plan, x).result(),
            torch.empty_like,
        ),
        define_op(f"gate_{name}", "(Tensor x) -> (Tensor, Tensor)", gate, fake_routing),
        define_op(f"experts_{name}", "(Tensor x, Tensor weights, Tensor ids) -> Tensor", experts, fake_value),
        define_op(
            f"reduce_{name}", "(Tensor value, Tensor shared, Tensor weights, Tensor ids) -> Tensor", reduce,
            lambda value, shared, weights, ids: torch.empty_like(shared),
        ),
    )  # fmt: skip


_libraries: list[Any] = []


class BareStages(torch.nn.Module):
    """Four ops, as a layer without a runner would call them."""

    def __init__(self, ops: tuple[Any, Any, Any, Any]) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        shared_experts, gate, experts, reduce = self.ops
        shared = shared_experts(x)
        weights, ids = gate(x)
        return reduce(experts(x, weights, ids), shared, weights, ids)  # type: ignore[no-any-return]


class WithRunner(torch.nn.Module):
    """A runner in a model."""

    def __init__(self, runner: MoERunner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        return self.runner(x)


def compiled_models(config: MoEConfig, stages: Any, name: str, x: Tensor) -> dict[str, dict[str, Any]]:
    """LAYERS runners and layers of a backend with weights of their own, compiled, against the same of bare stages."""
    layers = [MoELayer(config, backend=name, device=x.device) for _ in range(LAYERS)]
    runners = [WithRunner(MoERunner(config, layer.weights(), backend=name)) for layer in layers]
    plans = [Plan(config, layer.weights(), x.device, x.dtype) for layer in layers]
    bare = [BareStages(bare_ops(stages, plan, f"{name}_{x.device.type}_{n}")) for n, plan in enumerate(plans)]
    # The graph holds opaque ops alone, so any compiler gives the same code; "eager" needs no C++ compiler.
    models = [
        torch.compile(torch.nn.Sequential(*part), fullgraph=True, backend="eager") for part in (bare, runners, layers)
    ]
    assert all(torch.equal(models[0](x), model(x)) for model in models[1:])
    batch = 20 if stages is reference else 200
    return {
        f"compiled model, {name}": compare(lambda: models[0](x), lambda: models[1](x), batch, LAYERS),
        f"compiled layers, {name}": compare(lambda: models[0](x), lambda: models[2](x), batch, LAYERS),
    }


class BareLayer(torch.nn.Module):
    """A module with that op as its forward."""

    def __init__(self, op: Any, handle: Tensor) -> None:
        super().__init__()
        self.op, self.handle = op, handle

    def forward(self, x: Tensor) -> Tensor:
        """One op, as a compiled MoELayer is."""
        return self.op(x, None, None, None, None, self.handle)  # type: ignore[no-any-return]


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call."""
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def kernels_of(call: Call) -> int | None:
    """Kernels and copies on the device in one call; None where the profiler shows none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events()) or None


@torch.no_grad()
def measure(device: torch.device) -> dict[str, Any]:
    """All cases on one device."""
    layer = MoELayer(MoEConfig(64, 32, 8, 2, shared_intermediate_size=32), device=device)
    x = torch.randn(1, 64, device=device)
    plan = Plan(layer.config, layer.weights(), x.device, x.dtype)
    config = layer.config
    before = MoEConfig(64, 32, 8, 2, shared_intermediate_size=32, shared_experts_order="before")
    plain = MoERunner(before, layer.weights(), backend="reference")
    assert torch.equal(by_hand(reference, plan, x), plain(x))
    empty = Empty(by_hand(reference, plan, x), reference.moe_gate(plan, x, None, None))
    plugins.register(empty, "empty")
    runner = MoERunner(before, layer.weights(), backend="empty")

    def bare() -> Tensor:
        return by_hand(empty, plan, x)

    cases = {
        "reference": compare(lambda: by_hand(reference, plan, x), lambda: plain(x), 100),
        "empty": compare(bare, lambda: runner(x), 2000),
    }
    handle = torch.tensor(0)
    op = bare_op(lambda x: by_hand(empty, plan, x), f"stages_{device.type}")
    inputs = (runner, x, None, None, None, None)
    cases["op"] = compare(lambda: op(x, None, None, None, None, handle), lambda: ops.call(*inputs), 1000)
    layer.backend, layer.config = "empty", before
    # The graph holds one opaque op, so any compiler gives the same code; "eager" needs no C++ compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled_bare = torch.compile(BareLayer(op, handle), fullgraph=True, backend="eager")
    cases["compiled"] = compare(lambda: compiled_bare(x), lambda: compiled(x), 500)
    cases |= compiled_models(before, reference, "reference", x) | compiled_models(before, empty, "empty", x)
    if device.type == "cuda":
        overlap = MoERunner(config, layer.weights(), backend="empty")
        cases["overlap"] = compare(bare, lambda: overlap(x), 1000)
        graphs = [captured(lambda: by_hand(reference, plan, x)), captured(lambda: plain(x))]
        cases["captured"] = compare(graphs[0].replay, graphs[1].replay, 200)  # type: ignore[arg-type]
        cases["captured"]["kernels"] = {
            "bare": kernels_of(graphs[0].replay),  # type: ignore[arg-type]
            "runner": kernels_of(graphs[1].replay),  # type: ignore[arg-type]
        }
        # The compiler's own graphs: what a compiled model replays, where the host does nothing but start it.
        op = bare_op(lambda x: by_hand(reference, plan, x), "stages_graphed")
        graphed = MoELayer(before, backend="reference", device=device)
        replays = [
            torch.compile(module, fullgraph=True, mode="reduce-overhead")
            for module in (BareLayer(op, handle).eval(), graphed.eval())
        ]
        for replay in replays * 3:
            replay(x)
        cases["compiled, graphs"] = compare(lambda: replays[0](x), lambda: replays[1](x), 200)
        both = MoERunner(config, layer.weights(), backend="reference")
        cases["captured, overlap"] = compare(graphs[0].replay, captured(lambda: both(x)).replay, 200)  # type: ignore[arg-type]
    plugins.unregister("empty")
    return cases


def main() -> int:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record = {
        "what": "microseconds a call, T=1, H=64, I=32, E=8, K=2, shared 32, float32, 1 thread",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **measure(device),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
