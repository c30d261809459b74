"""What a benchmark is asked to measure, and how long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import BenchError
from .shapes import STAGES, Shape

DTYPES = ("float32", "bfloat16", "float16")
MAIN = "main"


@dataclass(frozen=True)
class Candidate:
    """One implementation: ``moe_core``, ``moe_core/BACKEND`` or a peer; ``worker`` is empty where any may run it."""

    name: str
    worker: str = ""

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """``NAME`` or ``WORKER:NAME``."""
        worker, _, name = text.rpartition(":")
        return cls(name, worker)

    @property
    def label(self) -> str:
        """As in records."""
        return f"{self.worker}:{self.name}" if self.worker else self.name

    @property
    def is_ours(self) -> bool:
        """moe_core, not a peer."""
        return self.name.partition("/")[0] == "moe_core"


@dataclass(frozen=True)
class CellKey:
    """What tells one cell of a grid from the others."""

    threads: int
    dtype: str
    shape: str
    stage: str
    tokens: int

    @classmethod
    def of(cls, cell: dict[str, Any]) -> CellKey:
        """Of a cell in a record."""
        return cls(cell["threads"], cell["dtype"], cell["shape"]["name"], cell["stage"], cell["tokens"])

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads > 1 else ", 1 thread" if self.threads else ""
        return f"{self.shape} {self.stage} T={self.tokens} {self.dtype}{threads}"


@dataclass(frozen=True)
class Settings:
    """All of it.

    Args:
        shapes, tokens, dtypes, stages, threads: the grid; threads (0,) on an accelerator.
        device: None is the accelerator, or the CPU where there is none.
        candidates: in the order of the tables; None is moe_core and every peer of the device.
        workers: name -> Python of another environment.
        paths: folders with libraries of peers. adapters: files that register further peers.
        plugins: backend -> module, for backends that are not installed.
        budget: seconds of calls for each candidate, cell and mode. rounds: turns in which they are taken.
        settle: seconds between the turns of two processes, in which the first one's threads go to sleep.
        seed: of weights and inputs.
        quick: small ceilings; for a look or a test.
        patience: a candidate whose call takes longer than so many seconds is not timed.
        quiet: seconds, in all, to wait while something else keeps the cores busy, and to measure cells again in which
            it did or whose times scatter; of several measurements the calmest is kept, whatever it says.
        max_seconds: begin no cell after that; None has no bound.
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32",)
    stages: tuple[str, ...] = STAGES
    threads: tuple[int, ...] = (1,)
    device: str | None = None
    candidates: tuple[Candidate, ...] | None = None
    workers: dict[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    plugins: dict[str, str] = field(default_factory=dict)
    budget: float = 0.5
    rounds: int = 5
    settle: float = 0.25
    seed: int = 0
    quick: bool = False
    patience: float = 2.0
    quiet: float = 0.0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("shapes", "tokens", "dtypes", "stages", "threads"):
            if not getattr(self, name):
                raise BenchError(f"{name} is empty; a grid needs at least one of each")
        for name, known in (("dtypes", DTYPES), ("stages", STAGES)):
            for value in getattr(self, name):
                if value not in known:
                    raise BenchError(f"{name}: {value!r}: expected one of {', '.join(known)}")
        for name, least in (("tokens", 1), ("threads", 0)):
            for value in getattr(self, name):
                if value < least:
                    raise BenchError(f"{name}: {value}: expected at least {least}")
        if self.budget <= 0 or self.rounds < 1:
            raise BenchError(f"budget={self.budget}, rounds={self.rounds}: expected more than 0 and at least 1")
        if MAIN in self.workers:
            raise BenchError(f"--worker {MAIN}: that is the name of this interpreter; choose another")
        for candidate in self.candidates or ():
            if candidate.worker and candidate.worker not in (MAIN, *self.workers):
                raise BenchError(
                    f"{candidate.label}: no worker {candidate.worker!r}; add --worker {candidate.worker}=PYTHON"
                )

    def cells(self) -> Iterator[CellKey]:
        """The grid, in the order in which least has to be rebuilt."""
        for threads in self.threads:
            for dtype in self.dtypes:
                for shape in self.shapes:
                    for stage in self.stages:
                        for tokens in self.tokens:
                            yield CellKey(threads, dtype, shape.name, stage, tokens)

    def measure(self) -> dict[str, Any]:
        """What has to be equal for two runs to share a file; the grid may grow."""
        labels = None if self.candidates is None else [candidate.label for candidate in self.candidates]
        return {
            "device": self.device,
            "candidates": labels,
            "workers": sorted(self.workers),
            "budget": self.budget,
            "rounds": self.rounds,
            "seed": self.seed,
            "quick": self.quick,
            "patience": self.patience,
        }
