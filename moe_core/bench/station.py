"""A worker and what it was told: it can be started anew where it left off, without the candidate that killed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .registry import Unavailable
from .worker import RequestFailed, Worker, WorkerDied


class Crash(Exception):
    """A worker died; whoever did it is marked, and what was being measured has to begin anew."""


class Station:
    """One worker.

    Args:
        name: of the worker.
        launch: starts its process.
    """

    def __init__(self, name: str, launch: Callable[[], Worker]) -> None:
        self.name = name
        self.digest = ""
        self._launch = launch
        self._worker: Worker | None = None
        self._broken: Unavailable | None = None
        self._loaded: dict[str, Any] = {}
        self._refused: Unavailable | None = None
        self._stage = ""
        self._built: dict[str, dict[str, Any]] = {}
        self._killers: dict[str, Unavailable] = {}
        self._singly = False

    def start(self) -> None:
        """Start the process now.

        Raises:
            WorkerDied, RequestFailed: it does not.
        """
        self._loaded, self._stage, self._built, self._refused = {}, "", {}, None
        self._worker = self._launch()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A request that must succeed."""
        if self._worker is None:
            self.start()
        assert self._worker is not None
        return self._worker.request(command, **arguments)

    def describe(self) -> dict[str, Any]:
        """Versions, or why it does not start."""
        try:
            return {"versions": self.ask("hello")["versions"]}
        except (WorkerDied, RequestFailed) as error:
            self._broken = Unavailable("broken", f"worker {self.name} does not start: {error}")
            return {"broken": str(error)}

    def load(self, load: dict[str, Any]) -> Unavailable | None:
        """Have the weights of ``load``; the reason if they cannot be had."""
        if self._broken is not None:
            return self._broken
        if self._loaded != load:
            self._stage, self._built, self._refused = "", {}, None
            answer = self.ask("load", **load)
            self._loaded = load
            if answer["status"] != "ok":
                self._refused = Unavailable(**answer["reason"])
        return self._refused

    def build(self, load: dict[str, Any], stage: str, candidate: str) -> dict[str, Any]:
        """Build a candidate for a stage; at once where it stands already."""
        refused = self._killers.get(candidate) or self.load(load)
        if refused is not None:
            return _unavailable(refused)
        if self._stage != stage:
            self._stage, self._built = stage, {}
        if candidate not in self._built:
            self._built[candidate] = self._risky(candidate, "building", "build", stage=stage, candidate=candidate)
        return self._built[candidate]

    def keep(self, candidates: set[str]) -> None:
        """Drop whatever was built here and is timed elsewhere."""
        for name in [name for name, found in self._built.items() if found["status"] == "ok" and name not in candidates]:
            self.ask("forget", candidate=name)
            del self._built[name]

    def cell(self, stage: str, tokens: int, seed: int) -> dict[str, Any]:
        """Draw the inputs of a cell."""
        found = self.ask("cell", stage=stage, tokens=tokens, seed=seed)
        self.digest = found["digest"]
        return found

    def check(self, candidate: str) -> dict[str, Any]:
        """Compare with float32 and estimate."""
        return self._risky(candidate, "its check", "check", candidate=candidate)

    def time(self, plan: dict[str, dict[str, int]], first: int) -> dict[str, dict[str, list[float]] | Unavailable]:
        """Times of every candidate of ``plan``, in turn; a candidate that raised has its reason instead."""
        found: dict[str, dict[str, list[float]] | Unavailable] = {}
        parts = [{name: calls} for name, calls in plan.items()] if self._singly else [plan]
        while parts:
            part = parts.pop(0)
            if not part:
                continue
            if len(part) == 1:
                answer = self._risky(next(iter(part)), "being timed", "time", plan=part, first=first)
            else:
                try:
                    answer = self.ask("time", plan=part, first=first)
                except WorkerDied as error:
                    self._singly = True  # next time we shall see who it was
                    self._again()
                    raise Crash(f"worker {self.name} died while timing {', '.join(part)}: {error}") from error
            if "failed" in answer:
                found[answer["failed"]] = Unavailable(**answer["reason"])
                parts.insert(0, {name: calls for name, calls in part.items() if name != answer["failed"]})
            else:
                found |= answer.get("times", {})
        return found

    def cpu_seconds(self) -> float:
        """Processor time of the process so far."""
        return float(self.ask("clock")["cpu_seconds"])

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _risky(self, who: str, doing: str, command: str, /, **arguments: Any) -> dict[str, Any]:
        try:
            return self.ask(command, **arguments)
        except WorkerDied as error:
            self._killers[who] = Unavailable("crash", f"the process ended during {doing}: {error}")
            self._again()
            raise Crash(f"{who} ended worker {self.name} during {doing}: {error}") from error
        except RequestFailed as error:
            return _unavailable(Unavailable("error", str(error)))

    def _again(self) -> None:
        self.close()
        self.start()


def _unavailable(reason: Unavailable) -> dict[str, Any]:
    return {"status": "unavailable", "reason": reason.as_dict()}
