"""What the trace observer saw: kept in the process, written when it ends, summed up as a table or a timeline.

``MOE_CORE_TRACE_FILE`` names the file; without it nothing is written. The format is JSON, one object with ``calls``.
"""

from __future__ import annotations

import atexit
import json
import os
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LIMIT: Final = 500_000
"""Calls that are kept; later ones are counted and named as left out."""


@dataclass(frozen=True)
class StageCall:
    """One call of one stage.

    Args:
        layer: ``Plan.layer``. stage, backend, function: who did what.
        tokens: rows of its input.
        start, seconds: on the host, by time.perf_counter.
        events: two events of the device around it, or None.
    """

    layer: int
    stage: str
    backend: str
    function: str
    tokens: int
    start: float
    seconds: float
    events: tuple[Any, Any] | None = None

    def microseconds(self) -> float:
        """The device's time where there is one, else the host's."""
        if self.events is None:
            return self.seconds * 1e6
        begin, end = self.events
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``at`` is the host's clock in microseconds."""
        return {
            "layer": self.layer,
            "stage": self.stage,
            "backend": self.backend,
            "function": self.function,
            "tokens": self.tokens,
            "at": self.start * 1e6,
            "us": self.microseconds(),
            "clock": "host" if self.events is None else "device",
        }


@dataclass(frozen=True)
class StageSummary:
    """All calls of one stage of one layer by one function."""

    layer: int
    stage: str
    backend: str
    function: str
    calls: int
    tokens: int
    median_us: float
    total_us: float
    clock: str


_calls: list[StageCall] = []
_left_out = 0
_lock = threading.Lock()
_registered = False


def add(call: StageCall) -> None:
    """Keep one call."""
    global _left_out, _registered
    with _lock:
        if not _registered:
            _registered = True
            atexit.register(_write_at_exit)
        if len(_calls) < LIMIT:
            _calls.append(call)
        else:
            _left_out += 1


def clear() -> None:
    """Forget what was kept."""
    global _left_out
    with _lock:
        _calls.clear()
        _left_out = 0


def recorded() -> dict[str, Any]:
    """What was kept so far, as :func:`summarise` and :func:`timeline` take it. Waits for the device."""
    with _lock:
        calls, left_out = list(_calls), _left_out
    return {"calls": [call.as_dict() for call in calls], "left_out": left_out, "process": os.getpid()}


def _write_at_exit() -> None:
    path = os.environ.get("MOE_CORE_TRACE_FILE")
    if path:
        Path(path).write_text(json.dumps(recorded()), encoding="utf-8")


def summarise(calls: Iterable[dict[str, Any]]) -> list[StageSummary]:
    """One row a layer, stage, backend and function, layers numbered in the order of their first call."""
    layers: dict[int, int] = {}
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for call in sorted(calls, key=lambda call: call["at"]):
        layer = layers.setdefault(call["layer"], len(layers))
        key = (layer, call["stage"], call["backend"], call["function"], call["clock"])
        grouped.setdefault(key, []).append(call)
    rows = []
    for (layer, stage, backend, function, clock), group in grouped.items():
        times = [call["us"] for call in group]
        tokens = sum(call["tokens"] for call in group)
        row = StageSummary(
            layer, stage, backend, function, len(group), tokens, statistics.median(times), sum(times), clock
        )
        rows.append(row)
    return sorted(rows, key=lambda row: row.layer)


def timeline(calls: Sequence[dict[str, Any]], process: int = 0) -> dict[str, Any]:
    """The calls as a Chrome trace, for Perfetto and chrome://tracing: a row a layer, shared experts on their own.

    Device times stand at the host's time of launch, with the device's length.
    """
    layers: dict[int, int] = {}
    events: list[dict[str, Any]] = []
    first = min((call["at"] for call in calls), default=time.perf_counter() * 1e6)
    for call in calls:
        row = 2 * layers.setdefault(call["layer"], len(layers)) + (call["stage"] == "shared_experts")
        events.append(
            {
                "name": f"{call['stage']} ({call['backend']})",
                "cat": "moe_core",
                "ph": "X",
                "ts": call["at"] - first,
                "dur": call["us"],
                "pid": process,
                "tid": row,
                "args": {key: call[key] for key in ("function", "tokens", "clock")},
            }
        )
    for layer in layers.values():
        for beside in (0, 1):
            name = f"layer {layer}" + (" shared experts" if beside else "")
            events.append(
                {"name": "thread_name", "ph": "M", "pid": process, "tid": 2 * layer + beside, "args": {"name": name}}
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
