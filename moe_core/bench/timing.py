"""One sample of one call: cold caches, a clock that the device's queue cannot fool, and the spread of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import describe
from .device import last_level_cache
from .draw import Draw
from .registry import Unavailable

Call = Callable[[Draw], Tensor]
Sample = Callable[[int], float]
_GPU_FLUSH_BYTES: Final = 256 * 2**20  # several times the second-level cache of today's GPUs
_CPU_FLUSH_LIMITS: Final = (64 * 2**20, 512 * 2**20)


@dataclass(frozen=True)
class Mode:
    """How a call is launched, and what flushes the caches before it.

    ``host``: as Python launches it. ``graph``: the replay of a captured graph. ``read``: a buffer several times the
    last cache is read; ``zero``: written, so that dirty lines are left whose write-back falls into the timed window.
    """

    launch: str
    flush: str

    @property
    def name(self) -> str:
        """``launch/flush``."""
        return f"{self.launch}/{self.flush}"


def modes(device: torch.device) -> tuple[Mode, ...]:
    """Those measured on a device, the one to compare by first."""
    if device.type == "cuda":
        return Mode("graph", "read"), Mode("graph", "zero"), Mode("host", "read")
    return (Mode("host", "read"),)


class Flusher:
    """Drives weights and inputs out of the caches."""

    def __init__(self, device: torch.device) -> None:
        low, high = _CPU_FLUSH_LIMITS
        size = min(max(4 * last_level_cache(), low), high) if device.type == "cpu" else _GPU_FLUSH_BYTES
        self.bytes = size
        self._buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)

    def __call__(self, flush: str) -> None:
        """``read`` or ``zero``."""
        if flush == "zero":
            self._buffer.zero_()
        else:
            torch.sum(self._buffer, dim=0, out=self._sum)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished everything."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def host_sampler(call: Call, mode: Mode, draws: Sequence[Draw], flusher: Flusher) -> Sample:
    """A function that times one call on draw ``index`` modulo their number, as Python launches it."""
    device = draws[0].hidden_states.device
    if device.type == "cuda":
        return _cuda_host_sampler(call, mode, draws, flusher)

    def sample(index: int) -> float:
        draw = draws[index % len(draws)]
        flusher(mode.flush)
        synchronize(device)
        start = time.perf_counter()
        call(draw)
        synchronize(device)
        return time.perf_counter() - start

    return sample


def _cuda_host_sampler(call: Call, mode: Mode, draws: Sequence[Draw], flusher: Flusher) -> Sample:
    """Events around the first draw's call on an idle stream, so that the launches are in the time."""
    draw = draws[0]  # the one whose graph is timed
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(_: int) -> float:
        flusher(mode.flush)
        torch.cuda.synchronize()
        begin.record()
        call(draw)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return sample


def capture(call: Call, draw: Draw) -> tuple[Any, Tensor]:
    """A CUDA graph of ``call(draw)`` and the tensor that its replay fills.

    Raises:
        Unavailable: it waits for the host, or does something else that a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(draw)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = call(draw)
    except Exception as error:  # torch, the driver and the peer each raise their own
        raise Unavailable("capture", describe(error)) from error
    graph.replay()
    torch.cuda.synchronize()
    return graph, out


def graph_sampler(graph: Any, mode: Mode, flusher: Flusher) -> Sample:
    """A function that times one replay, without its launch."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(_: int) -> float:
        # The flush keeps the device busy while the host launches the replay.
        flusher(mode.flush)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return sample


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median and spread: p10, p90, minimum and how many."""
    values = sorted(seconds)
    if len(values) == 1:
        return {"median": values[0], "p10": values[0], "p90": values[0], "min": values[0], "n": 1}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {
        "median": statistics.median(values),
        "p10": tenths[0],
        "p90": tenths[-1],
        "min": values[0],
        "n": len(values),
    }
