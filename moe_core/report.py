"""The one object that errors, logs, ``explain`` and ``doctor`` print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BackendStatus:
    """One plugin on this host.

    ``status``: ok, unavailable, broken, incompatible, disabled, or observer for a plugin that is no backend.
    """

    name: str
    status: str
    reason: str = ""
    remedy: str = ""
    priority: int = 0
    device_types: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    origin: str = ""
    url: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "remedy": self.remedy,
            "priority": self.priority,
            "device_types": list(self.device_types),
            "stages": list(self.stages),
            "origin": self.origin,
            "url": self.url,
        }


@dataclass(frozen=True)
class Candidate:
    """One backend as a candidate for one config.

    ``status``: ok, unavailable, unsupported, other-device, broken, incompatible or disabled. ``stages`` are those it
    would serve, ``refused`` maps a refused stage to (reason, remedy), ``traits`` a served stage to its declared traits.
    """

    name: str
    status: str
    reason: str = ""
    remedy: str = ""
    priority: int = 0
    stages: tuple[str, ...] = ()
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    traits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "remedy": self.remedy,
            "priority": self.priority,
            "stages": list(self.stages),
            "refused": {stage: list(why) for stage, why in self.refused.items()},
            "traits": {stage: dict(traits) for stage, traits in self.traits.items()},
        }


@dataclass(frozen=True)
class SelectionReport:
    """What was chosen and why; ``str()`` is the table.

    Args:
        backend: the chosen backend's name; empty when nothing could be chosen.
        stages: stage -> name of the backend that serves it (``caller`` for a module that the user passed).
        candidates: every backend, chosen or not.
        why: what decided, in a few words.
        purpose: ``inference`` or ``training``.
        entry: ``python`` or ``op``.
        device, dtype: of the weights.
        fallbacks: stage -> (reason, remedy) for stages that the reference serves instead of the chosen backend.
        strategies: stage -> which of its ways the serving backend goes, and why; stages with one way have none.
        workspace_bytes: ``staging`` (allocated at bind, for chunking) and what each stage declared.
        counters: backend -> what it counts for this layer of its own accord (compilations, for example), as of now.
        training: the report of the binding that gives gradients, where there is one beside this.
    """

    backend: str
    stages: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    why: str = ""
    purpose: str = "inference"
    entry: str = "python"
    device: str = ""
    dtype: str = ""
    fallbacks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    strategies: Mapping[str, str] = field(default_factory=dict)
    workspace_bytes: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    training: SelectionReport | None = None

    def candidate(self, name: str) -> Candidate | None:
        """The candidate of that name."""
        return next((c for c in self.candidates if c.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "backend": self.backend,
            "why": self.why,
            "purpose": self.purpose,
            "entry": self.entry,
            "device": self.device,
            "dtype": self.dtype,
            "stages": dict(self.stages),
            "fallbacks": {stage: list(why) for stage, why in self.fallbacks.items()},
            "strategies": dict(self.strategies),
            "workspace_bytes": dict(self.workspace_bytes),
            "counters": {name: dict(counts) for name, counts in self.counters.items()},
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "training": self.training.as_dict() if self.training else None,
        }

    def summary(self) -> str:
        """One line: the choice, where, why, and who serves which stage."""
        served: dict[str, list[str]] = {}
        for stage, name in self.stages.items():
            served.setdefault(name, []).append(stage)
        stages = "; ".join(f"{name}: {' '.join(stages)}" for name, stages in served.items())
        return f"backend {self.backend or 'none'} ({self.why}) · {stages} · entry {self.entry}"

    def __str__(self) -> str:
        lines = [f"backend: {self.backend or 'none'} ({self.why})"]
        rows = [
            (
                "*" if c.name == self.backend else " ",
                c.name,
                c.status,
                c.reason or f"priority {c.priority} · {' '.join(c.stages)}",
                c.remedy,
            )
            for c in self.candidates
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        if self.stages:
            lines.append("stages: " + ", ".join(f"{stage}={name}" for stage, name in self.stages.items()))
        lines += [f"  {stage}: {strategy}" for stage, strategy in self.strategies.items()]
        for stage, (reason, remedy) in self.fallbacks.items():
            lines.append(f"  {stage} comes from the reference: {reason}; {remedy}")
        for name, counts in self.counters.items():
            lines.append(f"{name} counts: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
        if self.training is not None:
            lines.append(f"with gradients: {self.training.summary()}")
        return "\n".join(lines)
