"""What one process of a benchmark holds and does: weights of one shape, the implementations built on them, a cell."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import describe
from ..platform import default_device
from ..quant import dequantise, quantise
from ..quant.error import flip_allowance
from ..testing.tolerances import tolerance
from ..weights import MoEWeights
from . import ceilings, registry
from .device import available_bytes, device_facts, versions
from .draw import Draw, digest, expected_output, experts_only, make_draws, make_weights
from .floor import work
from .registry import Built, Problem, Unavailable
from .shapes import Shape
from .timing import Flusher, Sample, capture, graph_sampler, host_sampler, modes, synchronize

OURS = "moe_core"
_CPU_DRAWS = ((64, 8), (256, 4))  # up to so many tokens, so many draws to rotate; 2 beyond
_SLOW_CALL = 0.5  # seconds; longer ones are not repeated for anything but their time


class Session:
    """Answers requests: ``handle({"command": name, ...}) -> dict``; every value is JSON.

    Args:
        device: where to measure; None is the accelerator, or the CPU where there is none.
        threads: of a CPU; 0 leaves torch as it is.
        paths: folders with libraries of peers. adapters: files that register further peers.
        plugins: name of a backend -> its module, registered where no installed backend has that name.
        quick: small ceilings, for a look or a test.
        patience: a candidate whose call takes longer than so many seconds is not timed.
    """

    def __init__(
        self,
        device: str | None = None,
        threads: int = 0,
        paths: tuple[str, ...] = (),
        adapters: tuple[str, ...] = (),
        plugins: Mapping[str, str] | None = None,
        quick: bool = False,
        patience: float = 2.0,
    ) -> None:
        self.device = default_device() if device is None else torch.device(device)
        self.threads = threads if self.device.type == "cpu" else 0
        if self.threads:
            torch.set_num_threads(self.threads)
        self.paths = tuple(Path(path).resolve() for path in paths)
        registry.load_adapters(Path(path) for path in adapters)
        for name, module in (plugins or {}).items():
            registry.register_plugin(name, module)
        self.quick, self.patience = quick, patience
        self.flusher: Flusher | None = None
        self.shape: Shape | None = None
        self.weights: MoEWeights | None = None
        self.plain: MoEWeights | None = None  # the same where nothing is quantised
        self.stage = ""
        self.built: dict[str, Built] = {}
        self.draws: list[Draw] = []
        self.expected: list[Tensor] = []
        self.plain_expected: list[Tensor] = []
        self.samples: dict[str, dict[str, Sample]] = {}

    def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what ``request["command"]`` says; its other items are the arguments of that method."""
        arguments = dict(request)
        method = getattr(self, "do_" + str(arguments.pop("command")))
        with torch.no_grad():
            return method(**arguments)  # type: ignore[no-any-return]

    def do_hello(self) -> dict[str, Any]:
        """Who this is and where it runs."""
        return {
            "device": device_facts(self.device),
            "versions": versions(),
            "modes": [mode.name for mode in modes(self.device)],
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
        }

    def do_ceilings(self, dtype: str, codes: bool = False) -> dict[str, Any]:
        """Copy, read, matmul."""
        return ceilings.measure(self.device, _dtype(dtype), self.quick, codes)

    def do_read(self) -> dict[str, Any]:
        """Read alone, as calls are timed."""
        self.flusher = flusher = self.flusher or Flusher(self.device)
        return ceilings.read(self.device, lambda: flusher("read"), self.quick)

    def do_load(self, shape: dict[str, Any], dtype: str, seed: int) -> dict[str, Any]:
        """Weights of a shape; those of the last one are freed first."""
        self.do_free()
        self.shape = Shape.from_dict(shape)
        try:
            copies = 2 if self.shape.quant else 1
            self._check_memory(copies * self.shape.expert_weight_bytes(_dtype(dtype).itemsize), "the weights")
            self.plain = make_weights(self.shape, _dtype(dtype), self.device, seed)
            self.weights = self.plain
            quant = self.shape.quant_config(dtype)
            if quant is not None:
                config, self.weights = quantise(self.shape.plain.config("layer"), self.plain, quant)
                self.plain = dequantise(config, self.weights)[1]
                self._collect()
        except Unavailable as reason:
            return {"status": "unavailable", "reason": reason.as_dict()}
        return {"status": "ok"}

    def do_free(self) -> dict[str, Any]:
        """Drop everything that is large."""
        if self.weights is not None:
            self.shape, self.weights, self.plain = None, None, None
            self._drop_built()
        return {}

    def do_build(self, stage: str, candidate: str) -> dict[str, Any]:
        """Build ``moe_core``, ``moe_core/BACKEND`` or a peer for a stage; another stage's are dropped first."""
        self._enter(stage)
        assert self.shape is not None and self.weights is not None and self.plain is not None
        all_experts = self.shape.expert_weight_bytes(self.plain.dtype.itemsize)
        try:
            shape, weights = (
                (self.shape.plain, self.plain) if self._takes_plain(candidate) else (self.shape, self.weights)
            )
            problem = Problem(shape, stage, weights, self.threads, self.paths)
            if candidate == OURS or candidate.startswith(OURS + "/"):
                # How much a backend packs is its own affair; one copy is what packing takes.
                self._check_memory(all_experts, "repacked weights")
                built = registry.moe_core_runner(problem, candidate.partition("/")[2] or None)
            else:
                copies = registry.adapter(candidate).copies
                self._check_memory(int(copies * all_experts), "repacked weights")
                built = registry.build(candidate, problem)
        except Unavailable as reason:
            self._end_if_device_failed()
            return {"status": "unavailable", "reason": reason.as_dict()}
        self.built[candidate] = built
        return {"status": "ok", "note": built.note}

    def do_cell(self, stage: str, tokens: int, seed: int) -> dict[str, Any]:
        """Draw inputs of ``tokens`` rows; what was drawn, and the work of each draw."""
        assert self.shape is not None and self.weights is not None and self.plain is not None
        self._enter(stage)
        self.samples, self.draws, self.expected, self.plain_expected = {}, [], [], []
        count = 2
        if self.device.type == "cpu":
            count = next((draws for limit, draws in _CPU_DRAWS if tokens <= limit), 2)
        self.draws = make_draws(self.shape, self.plain, tokens, count, seed)
        self.expected = [expected_output(self.shape, self.stage, self.weights, draw) for draw in self.draws[:2]]
        self.plain_expected = self.expected
        expert_bytes = None
        if self.shape.quant:
            plain = self.shape.plain
            self.plain_expected = [expected_output(plain, self.stage, self.plain, draw) for draw in self.draws[:2]]
            stored = vars(experts_only(self.weights)).values()
            expert_bytes = sum(each.nbytes for each in stored if each is not None) / self.shape.num_experts
        timed = self.draws[:1] if self.device.type == "cuda" else self.draws  # a graph knows one input
        itemsize = self.plain.dtype.itemsize
        tasks = [work(self.shape, self.stage, tokens, draw.experts_hit, itemsize, expert_bytes) for draw in timed]
        return {
            "experts_hit": [draw.experts_hit for draw in timed],
            "bytes": [task.bytes for task in tasks],
            "flops": [task.flops for task in tasks],
            "digest": digest(self.draws),
        }

    def do_check(self, candidate: str) -> dict[str, Any]:
        """Compare with float32, warm up, and estimate. Nothing that fails here is ever timed."""
        assert self.shape is not None and self.plain is not None
        built, tokens = self.built[candidate], len(self.draws[0].hidden_states)
        dtype = self.plain.dtype
        allowed, expected = tolerance(dtype, self.stage), self.plain_expected
        if not self._takes_plain(candidate):
            expected = self.expected
            config = self.shape.config(self.stage, str(dtype).removeprefix("torch."))
            allowed += flip_allowance(config, dtype, tokens * config.top_k * config.intermediate_size)
        try:
            if built.workspace is not None:
                self._check_memory(built.workspace(tokens), "its workspace")
            error, seconds = self._checked(built, expected)
            if not error <= allowed:
                return {"status": "wrong", "error": error if math.isfinite(error) else None, "allowed": allowed}
            if seconds > self.patience:
                raise Unavailable("slow", f"one call takes {seconds:.1f} s, more than --patience {self.patience:g}")
            # Libraries compile and cache by the rows of each expert, which differ with the draw.
            for draw in self.draws[len(self.expected) :]:
                built.call(draw)
            estimates, failed = self._make_samples(candidate, built, allowed, expected, seconds)
        except Unavailable as reason:
            return {"status": "unavailable", "reason": reason.as_dict()}
        except Exception as problem:  # a peer may raise anything
            self._end_if_device_failed()
            return {"status": "unavailable", "reason": Unavailable("error", describe(problem)).as_dict()}
        if not estimates:
            return {"status": "unavailable", "reason": next(iter(failed.values()))}
        return {"status": "ok", "error": error, "estimates": estimates, "failed": failed}

    def _checked(self, built: Built, all_expected: list[Tensor]) -> tuple[float, float]:
        """The largest error of the checked draws, infinite if one is changed; and seconds of the quickest call.

        What a peer leaves unwritten must not be the right answer that another one left behind: memory holds NaN before.
        """
        errors, seconds = [], []
        for draw, expected in zip(self.draws, all_expected, strict=False):
            before = draw.hidden_states.clone()
            poison = [torch.full_like(draw.hidden_states, math.nan) for _ in range(4)]
            del poison
            synchronize(self.device)
            started = time.perf_counter()
            out = built.call(draw)
            synchronize(self.device)
            seconds.append(time.perf_counter() - started)
            errors.append(_relative_error(out, expected) if torch.equal(draw.hidden_states, before) else math.inf)
        return max(errors), min(seconds)

    def _make_samples(
        self, candidate: str, built: Built, allowed: float, expected: list[Tensor], seconds: float
    ) -> tuple[dict[str, float], dict[str, dict[str, str]]]:
        """For each mode a sample function and its first times, or the reason why there is none."""
        self.flusher = self.flusher or Flusher(self.device)
        samples: dict[str, Sample] = {}
        failed: dict[str, dict[str, str]] = {}
        graph: Any = None
        for mode in modes(self.device):
            if mode.launch == "host":
                samples[mode.name] = host_sampler(built.call, mode, self.draws, self.flusher)
                continue
            try:
                graph = graph or self._capture(built, allowed, expected[0])
            except Unavailable as reason:
                failed[mode.name] = reason.as_dict()
                continue
            samples[mode.name] = graph_sampler(graph, mode, self.flusher)
        self.samples[candidate] = samples
        return {mode: _estimate(sample, seconds) for mode, sample in samples.items()}, failed

    def _capture(self, built: Built, allowed: float, expected: Tensor) -> Any:
        if built.waits_for_device:
            raise Unavailable("capture", f"waits for the device: {built.waits_for_device}")
        graph, out = capture(built.call, self.draws[0])
        error = _relative_error(out, expected)
        if not error <= allowed:
            raise Unavailable("capture", f"the graph's result is wrong: relative error {error:.1e}")
        return graph

    def do_time(self, plan: dict[str, dict[str, int]], first: int) -> dict[str, Any]:
        """Samples of several candidates in turn.

        Args:
            plan: candidate -> mode -> number of calls. first: index of the first draw.
        """
        times: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in calls} for name, calls in plan.items()}
        gc.disable()  # a collection inside one call would be its outlier
        longest = max((count for calls in plan.values() for count in calls.values()), default=0)
        try:
            for turn in range(longest):
                # There and back, so that nobody always follows the same one.
                for name in list(plan)[:: -1 if turn % 2 else 1]:
                    for mode, count in plan[name].items():
                        if turn < count:
                            times[name][mode].append(self.samples[name][mode](first + turn))
        except Exception as problem:
            self._end_if_device_failed()
            return {"failed": name, "reason": Unavailable("error", describe(problem)).as_dict()}
        finally:
            gc.enable()
        return {"times": times}

    def do_clock(self) -> dict[str, Any]:
        """Processor time of this process so far."""
        return {"cpu_seconds": time.process_time()}

    def do_forget(self, candidate: str) -> dict[str, Any]:
        """Drop one candidate."""
        self.samples.pop(candidate, None)
        built = self.built.pop(candidate, None)
        if built is not None and built.close is not None:
            built.close()
        return {}

    def _end_if_device_failed(self) -> None:
        """An error of the device stays for the life of a process; another process goes on without the culprit."""
        if self.device.type == "cpu":
            return
        try:
            synchronize(self.device)
        except RuntimeError as error:
            sys.stderr.write(f"the device failed: {describe(error)}\n")
            sys.stderr.flush()
            os._exit(70)

    def _check_memory(self, needed: int, what: str) -> None:
        free = available_bytes(self.device)
        if free and needed > 0.9 * free:
            raise Unavailable(
                "memory", f"{what} need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {self.device}"
            )

    def _takes_plain(self, candidate: str) -> bool:
        assert self.shape is not None
        return bool(self.shape.quant) and registry.takes_plain(candidate, self.shape.quant)

    def _enter(self, stage: str) -> None:
        """What was built for another stage is dropped."""
        if stage != self.stage:
            if self.built:
                self._drop_built()
            self.stage = stage

    def _drop_built(self) -> None:
        for candidate in list(self.built):
            self.do_forget(candidate)
        self.built, self.samples, self.draws, self.expected, self.stage = {}, {}, [], [], ""
        self.plain_expected = []
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]


def _estimate(sample: Sample, seconds: float) -> float:
    """The first times, to plan how many calls fit the budget; ``seconds`` where a call is slow."""
    return seconds if seconds > _SLOW_CALL else min(sample(0), sample(1))


def _relative_error(out: object, expected: Tensor) -> float:
    """Relative L2 error; infinite for what is no finite [T, H] tensor."""
    if not isinstance(out, Tensor) or out.shape != expected.shape:
        return math.inf
    error = float((out.float() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


__all__ = ["OURS", "Session"]
