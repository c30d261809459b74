"""Peers: other implementations that are timed beside moe_core, each behind a small adapter.

An adapter imports its library only when it is built, and says why it cannot run instead of vanishing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..config import MoEConfig
from ..errors import BenchError, describe
from ..weights import MoEWeights
from .draw import Draw, experts_only
from .shapes import STAGES, Shape

REASONS: Final = (
    "not_installed",  # a library is missing
    "broken",  # it is there and does not load
    "device",
    "dtype",
    "processor",  # it needs instructions that this processor has not
    "routing",  # it cannot route as this layer does
    "shape",
    "memory",
    "slow",  # one call takes longer than the user waits
    "capture",  # it cannot run inside a captured graph
    "draw",  # another process drew another routing
    "error",  # it raised
    "crash",  # it took its process down
)
"""Kinds of reasons why there is no time."""
DEQUANTISED: Final = "@dequantised"
"""Behind the name of a backend: with the unquantised layer of the same values."""


class Unavailable(Exception):
    """Why an implementation cannot be timed here: a kind of :data:`REASONS`, a sentence, a remedy if there is one."""

    def __init__(self, kind: str, reason: str, remedy: str = "") -> None:
        assert kind in REASONS, kind
        super().__init__(reason)
        self.kind, self.reason, self.remedy = kind, reason, remedy

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"kind": self.kind, "reason": self.reason, "remedy": self.remedy}


@dataclass(frozen=True)
class Problem:
    """What an adapter is to build for.

    Args:
        shape, stage: the layer, and ``experts`` or ``layer``.
        weights: the whole layer's tensors; an adapter must not change them.
        threads: of a CPU; 0 elsewhere.
        paths: folders that the user named, where libraries may lie.
    """

    shape: Shape
    stage: str
    weights: MoEWeights
    threads: int = 0
    paths: tuple[Path, ...] = ()

    @property
    def config(self) -> MoEConfig:
        """What is computed."""
        return self.shape.config(self.stage, str(self.dtype).removeprefix("torch."))

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, and of weights that are not quantised."""
        gate = self.weights.gate_weight
        return self.weights.dtype if not self.shape.quant or gate is None else gate.dtype

    @property
    def device(self) -> torch.device:
        """Of weights and inputs."""
        return self.weights.device

    @property
    def experts(self) -> tuple[Tensor, Tensor]:
        """w13 [E, 2I, H] with gate rows first, and w2 [E, H, I]."""
        assert self.weights.w13_weight is not None and self.weights.w2_weight is not None
        return self.weights.w13_weight, self.weights.w2_weight


@dataclass(frozen=True)
class Built:
    """An implementation ready to be called.

    Args:
        call: a Draw to [T, H]; must not change the draw.
        note: anything that a reader of its times should know.
        workspace: bytes that a call of so many tokens needs beside its input and output; None where that is little.
        waits_for_device: why no graph can hold a call; empty where one may be tried.
        close: frees what the garbage collector would not.
    """

    call: Callable[[Draw], Tensor]
    note: str = ""
    workspace: Callable[[int], int] | None = None
    waits_for_device: str = ""
    close: Callable[[], None] | None = None


@dataclass(frozen=True)
class Adapter:
    """One peer.

    Args:
        name: in tables and records.
        build: ``"module:function"`` or a callable, from a :class:`Problem` to :class:`Built`; raises Unavailable.
        device_types: where it can run at all.
        stages: ``experts``, ``layer`` or both. An ``experts`` adapter also serves ``layer``, behind a plain torch
            router and plain shared experts.
        copies: copies of the expert weights that building makes.
        option: passed to ``build`` as a second argument unless empty.
        schemes: of quantised experts that it reads as they are stored; in others it gets the dequantised layer.
    """

    name: str
    build: str | Callable[..., Built]
    device_types: tuple[str, ...] = ("cpu", "cuda", "xpu")
    stages: tuple[str, ...] = STAGES
    copies: float = 0.0
    option: str = ""
    schemes: tuple[str, ...] = ()


_PEERS: Final = "moe_core.bench.peers"
_adapters: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter("loop", f"{_PEERS}.plain:loop", stages=("experts",)),
        Adapter("torch/grouped_mm", f"{_PEERS}.plain:grouped_mm", stages=("experts",)),
        *(
            Adapter(f"transformers/{name}", f"{_PEERS}.hf:build", option=name)
            for name in ("eager", "grouped_mm", "batched_mm")
        ),
        Adapter("vllm-cpu", f"{_PEERS}.vllm_cpu:build", ("cpu",), ("experts",), copies=1.0),
        Adapter("sgl-cpu", f"{_PEERS}.sgl_cpu:build", ("cpu",), ("experts",), copies=1.0),
        Adapter("zentorch", f"{_PEERS}.zen:build", ("cpu",), ("experts",), copies=2.0),
        Adapter("ipex", f"{_PEERS}.ipex:build", ("cpu",), ("experts",), copies=1.0),
        Adapter("ggml", f"{_PEERS}.ggml:build", ("cpu",), ("experts",), copies=1.0),
        Adapter("vllm", f"{_PEERS}.vllm_gpu:build", ("cuda",), ("experts",)),
        Adapter("vllm/fp8", f"{_PEERS}.vllm_gpu:build_fp8", ("cuda",), ("experts",), schemes=("fp8_block",)),
        Adapter("sglang", f"{_PEERS}.sglang_gpu:build", ("cuda",), ("experts",)),
        Adapter("sonicmoe", f"{_PEERS}.sonic:build", ("cuda",), ("experts",), copies=1.0),
    )
}


def register(adapter: Adapter) -> None:
    """Add a peer.

    Raises:
        BenchError: the name is taken.
    """
    if adapter.name in _adapters:
        raise BenchError(f"peer {adapter.name!r} is registered already; give the adapter another name")
    _adapters[adapter.name] = adapter


def unregister(name: str) -> None:
    """Remove a peer that :func:`register` added."""
    del _adapters[name]


def adapter(name: str) -> Adapter:
    """The adapter of a peer.

    Raises:
        BenchError: lists the known names.
    """
    if name not in _adapters:
        raise BenchError(f"peer {name!r}: expected one of {', '.join(_adapters)}; others come with --adapter FILE.py")
    return _adapters[name]


def names(device_type: str, quantised: bool = False) -> list[str]:
    """Peers that may run on this kind of device; those of quantised experts alone only where there are such."""
    return [
        name
        for name, found in _adapters.items()
        if device_type in found.device_types and (quantised or not found.schemes)
    ]


def takes_plain(candidate: str, quant: str) -> bool:
    """Whether a candidate gets the dequantised layer in the place of one quantised as ``quant`` says."""
    if candidate.partition("/")[0] == "moe_core":
        return candidate.endswith(DEQUANTISED)
    return quant.partition(":")[0] not in adapter(candidate).schemes


def load_adapters(paths: Iterable[Path]) -> None:
    """Import files that call :func:`register`.

    Raises:
        BenchError: a file is missing or fails.
    """
    for path in paths:
        name = f"moe_core_bench_adapter_{path.stem}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise BenchError(f"--adapter {path}: expected a Python file that calls moe_core.bench.registry.register")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise BenchError(f"--adapter {path}: {type(error).__name__}: {error}") from error


def register_plugin(name: str, module: str) -> None:
    """Register a backend that is no installed distribution, such as one of a bare checkout.

    Raises:
        BenchError: its module does not import, or is no backend.
    """
    from .. import plugins
    from ..errors import PluginError

    if name in plugins.registry().plugins:
        return
    try:
        plugins.register(importlib.import_module(module), name)
    except (ImportError, PluginError) as error:
        raise BenchError(f"--plugin {name}={module}: {describe(error)}") from error


def build(name: str, problem: Problem) -> Built:
    """Build a peer.

    Raises:
        Unavailable: with the reason, whatever went wrong.
    """
    found = adapter(name)
    if problem.device.type not in found.device_types:
        raise Unavailable("device", f"runs on {', '.join(found.device_types)}, not on {problem.device.type}")
    arguments = (found.option,) if found.option else ()
    try:
        if problem.stage in found.stages:
            return _resolve(found.build)(problem, *arguments)
        if problem.stage == "layer" and "experts" in found.stages:
            from .peers.around import with_plain_layer

            inner = _resolve(found.build)(replace(problem, stage="experts"), *arguments)
            return with_plain_layer(problem, inner)
        raise Unavailable("shape", f"has no stage {problem.stage}")
    except Unavailable:
        raise
    except Exception as error:  # whatever a third party's library raises is a reason, not our end
        raise Unavailable("error", describe(error)) from error


def _resolve(target: str | Callable[..., Built]) -> Callable[..., Built]:
    if callable(target):
        return target
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def require(module: str, distribution: str = "", paths: Iterable[Path] = ()) -> Any:
    """Import a peer's module, also from the user's folders.

    Raises:
        Unavailable: it is missing or does not load.
    """
    for path in paths:
        if str(path) not in sys.path:
            sys.path.append(str(path))
    top = module.split(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise Unavailable(
            "not_installed", f"{top} is not installed", f"pip install {distribution or top}, or --peer-path FOLDER"
        )
    try:
        return importlib.import_module(module)
    except Exception as error:  # an extension that does not fit raises anything
        raise Unavailable("broken", f"{module} does not load: {describe(error)}") from error


def moe_core_runner(problem: Problem, backend: str | None) -> Built:
    """moe_core itself: through the public runner, with the checks that every caller pays for.

    Args:
        backend: a name, with ``@ORDER`` behind it for another ``shared_experts_order`` than the config's, or
            ``@dequantised``, which the caller has seen to.
    Raises:
        Unavailable: no backend, or not this one, serves the layer.
    """
    import warnings

    from ..errors import MoECoreError
    from ..runner import FallbackWarning, MoERunner

    weights, config = problem.weights, problem.config
    backend, _, order = (backend or "").removesuffix(DEQUANTISED).partition("@")
    if order:
        if not config.has_shared_experts:
            raise Unavailable("shape", "no shared experts, whose order could matter")
        config = replace(config, shared_experts_order=order)
    if problem.stage != "layer":
        # What the router has, its bias among it, is left out: the ids are given.
        weights, config = experts_only(weights), replace(config, e_score_correction_bias=None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)  # the note says who serves which stage
            runner = MoERunner(config, weights, backend=backend or None)
    except MoECoreError as error:
        raise Unavailable("error", describe(error)) from error
    note = runner.report.summary()
    waits = "the reference reads tokens per expert" if runner.report.stages["experts"] == "reference" else ""
    if problem.stage == "layer":
        return Built(lambda draw: runner(draw.hidden_states), note, waits_for_device=waits)

    def call(draw: Draw) -> Tensor:
        return runner(draw.hidden_states, topk_weights=draw.topk_weights, topk_ids=draw.topk_ids_int32)

    return Built(call, note, waits_for_device=waits)
