"""Runs a grid: workers, cells, and the record that grows with each cell."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from . import record as records
from . import registry
from .device import commit, load_average
from .disturbance import ATTEMPTS, CALM, QUIET_CORES, OtherWork, scatter, wait_for_quiet
from .floor import Work, mean_floor
from .registry import Unavailable
from .settings import MAIN, Candidate, CellKey, Settings
from .shapes import Shape
from .station import Crash, Station
from .timing import summary
from .worker import Worker

MakeWorker = Callable[[str, dict[str, Any]], Worker]
_FEWEST, _MOST = 3, 200
_FLUSH_SECONDS = {"cpu": 0.01}  # roughly; what a call costs beside itself
_TRY_ELSEWHERE = ("not_installed", "broken")


class Reporter(Protocol):
    """Who is told how far it is."""

    def begin(self, total: float, text: str) -> None:
        """So much work in all."""

    def step(self, amount: float) -> None:
        """So much of it is done."""

    def doing(self, text: str) -> None:
        """What happens now."""

    def finished(self, cell: dict[str, Any]) -> None:
        """A cell is complete."""


class Silent:
    """Tells nobody."""

    def begin(self, total: float, text: str) -> None:
        """Nothing."""

    def step(self, amount: float) -> None:
        """Nothing."""

    def doing(self, text: str) -> None:
        """Nothing."""

    def finished(self, cell: dict[str, Any]) -> None:
        """Nothing."""


class Bench:
    """One run.

    Args:
        settings: what to measure.
        make_worker: ``(name, session settings) -> Worker``.
        command: the command line, for the record.
        reporter: is told how far it is.
    """

    def __init__(
        self, settings: Settings, make_worker: MakeWorker, command: str = "", reporter: Reporter | None = None
    ) -> None:
        self.settings = settings
        self._make_worker = make_worker
        self._reporter = reporter or Silent()
        self._command = command
        self._stations: dict[str, Station] = {}
        self._threads = -1
        self._patience = settings.quiet
        self._modes: list[str] = []
        self._device_type = ""
        self._placed: dict[Candidate, tuple[Station | None, dict[str, Any]]] = {}
        self._candidates: tuple[Candidate, ...] = ()
        self._shapes = {shape.name: shape for shape in settings.shapes}

    def run(
        self, before: dict[str, Any] | None, save: Callable[[dict[str, Any]], None], where: Any = "record"
    ) -> dict[str, Any]:
        """Measure what ``before`` has not; ``save`` gets the record after every cell.

        Raises:
            BenchError: ``before`` cannot be continued.
            WorkerDied, RequestFailed: the main worker does not start.
        """
        started = time.monotonic()
        try:
            record = self._open(before, where)
            done = records.done(record)
            missing = [key for key in self.settings.cells() if key not in done]
            self._reporter.begin(sum(map(self._weight, missing)), f"{len(missing)} cells")
            for threads, in_threads in itertools.groupby(missing, key=lambda key: key.threads):
                self._use(threads, record)
                ceilings: dict[str, int] = {}
                for key in in_threads:
                    limit = self.settings.max_seconds
                    if limit is not None and time.monotonic() - started > limit:
                        save(record)
                        return record
                    if key.dtype not in ceilings:
                        ceilings[key.dtype] = self._ceilings(record, key)
                    load = self._load(key)
                    refused = self._stations[MAIN].load(load)
                    if refused is not None:
                        record["skipped"][str(key)] = refused.as_dict()
                        self._reporter.step(self._weight(key))
                        continue
                    cell = self._quiet_cell(key, load, record["ceilings"], ceilings[key.dtype])
                    _share_notes(cell, record["notes"])
                    record["cells"].append(cell)
                    save(record)
                    self._reporter.finished(cell)
            record["complete"] = True
            save(record)
            return record
        finally:
            self._close()

    def _open(self, before: dict[str, Any] | None, where: Any) -> dict[str, Any]:
        """Start the first workers and learn what the machine is."""
        self._use(self.settings.threads[0], None)
        hello = self._stations[MAIN].ask("hello")
        settings = self.settings.measure()
        fresh = records.new(self._command, hello["device"], hello["versions"], settings, commit())
        self._modes = hello["modes"]
        self._device_type = hello["device"]["type"]
        chosen = self.settings.candidates
        if chosen is None:
            quantised = any(shape.quant for shape in self.settings.shapes)
            chosen = (Candidate("moe_core"), *map(Candidate, registry.names(self._device_type, quantised)))
        self._candidates = chosen
        if before is None:
            return fresh
        records.check_continues(before, fresh, where)
        return {**before, "skipped": {}, "complete": False}

    def _use(self, threads: int, record: dict[str, Any] | None) -> None:
        """Workers born with so many threads."""
        if self._stations and self._threads == threads:
            stations = self._stations
        else:
            self._close()
            self._threads = threads
            self._stations = stations = {}
            # Another environment that runs peers alone need not have our backends.
            ours = {MAIN, *(candidate.worker for candidate in self.settings.candidates or () if candidate.is_ours)}
            for name in (MAIN, *self.settings.workers):
                settings = {
                    "device": self.settings.device,
                    "threads": threads,
                    "paths": list(self.settings.paths),
                    "adapters": list(self.settings.adapters),
                    "plugins": self.settings.plugins if name in ours else {},
                    "quick": self.settings.quick,
                    "patience": self.settings.patience,
                }
                self._reporter.doing(f"starting worker {name}")
                stations[name] = Station(name, functools.partial(self._make_worker, name, settings))
                if name == MAIN:
                    stations[name].start()
        if record is not None:
            for name, station in stations.items():
                if name != MAIN and name not in record["workers"]:
                    record["workers"][name] = station.describe()

    def _ceilings(self, record: dict[str, Any], key: CellKey) -> int:
        self._patience -= wait_for_quiet(self._patience, self._reporter.doing)
        self._reporter.doing(f"ceilings {key.dtype}")
        load = load_average()
        codes = any(shape.rounds_activations for shape in self.settings.shapes)
        measured = self._stations[MAIN].ask("ceilings", dtype=key.dtype, codes=codes)
        facts = {"date": records.now(), "dtype": key.dtype, "threads": key.threads, "load_average": load}
        record["ceilings"].append({**facts, **measured})
        return len(record["ceilings"]) - 1

    def _load(self, key: CellKey) -> dict[str, Any]:
        shape = self._shapes[key.shape].as_dict()
        return {"shape": shape, "dtype": key.dtype, "seed": self.settings.seed}

    def _quiet_cell(
        self, key: CellKey, load: dict[str, Any], all_ceilings: list[dict[str, Any]], index: int
    ) -> dict[str, Any]:
        """The cell, measured again while something disturbs it and the patience for that lasts; the calmest is kept."""
        calmest: dict[str, Any] | None = None
        for _ in range(ATTEMPTS):
            self._patience -= wait_for_quiet(self._patience, self._reporter.doing)
            started = time.monotonic()
            cell = self._cell(key, load, all_ceilings, index)
            if calmest is None or _disturbed(cell) < _disturbed(calmest):
                calmest = cell
            if self._patience <= 0 or _disturbed(calmest) == (False, 0.0):
                break
            self._patience -= time.monotonic() - started
        assert calmest is not None
        return calmest

    def _cell(
        self, key: CellKey, load: dict[str, Any], all_ceilings: list[dict[str, Any]], index: int
    ) -> dict[str, Any]:
        shape, before = self._shapes[key.shape], load_average()
        while True:  # a candidate that takes its process down is marked, and the cell begins anew without it
            try:
                self._build(key, load)
                drawn, results, other, read = self._measure(key)
                break
            except Crash as crash:
                self._reporter.doing(str(crash))
        tasks = [Work(*pair) for pair in zip(drawn["bytes"], drawn["flops"], strict=True)]
        ceilings = all_ceilings[index]
        peak = ceilings["matmul"]
        if shape.rounds_activations:
            peak = ceilings.get("matmul_codes", peak)
        floor = mean_floor(tasks, (read or ceilings["read"])["best"], peak["best"])
        cell = {
            "shape": shape.as_dict(),
            "stage": key.stage,
            "tokens": key.tokens,
            "dtype": key.dtype,
            "threads": key.threads,
            "date": records.now(),
            "load_average": [before, load_average()],
            "other_busy_cores": other,
            "experts_hit": sum(drawn["experts_hit"]) / len(drawn["experts_hit"]),
            "bytes": sum(drawn["bytes"]) / len(tasks),
            "flops": sum(drawn["flops"]) / len(tasks),
            "floor": {"seconds": floor.seconds, "bound": floor.bound},
            "ceilings": index,
            **({"read": read} if read else {}),
            "results": results,
        }
        add_ratios(cell)
        return cell

    def _build(self, key: CellKey, load: dict[str, Any]) -> None:
        """Every candidate on the worker that can, unless they stand already."""
        self._stations[MAIN].load(load)
        self._placed = {}
        for candidate in self._candidates:
            self._reporter.doing(f"{key.shape} {key.stage}: building {candidate.label}")
            self._placed[candidate] = self._place(candidate, load, key.stage)
        for station in self._stations.values():
            station.keep({candidate.name for candidate, (at, _) in self._placed.items() if at is station})

    def _place(self, candidate: Candidate, load: dict[str, Any], stage: str) -> tuple[Station | None, dict[str, Any]]:
        names = [candidate.worker] if candidate.worker else [MAIN]
        if not candidate.worker and not candidate.is_ours:
            names += list(self.settings.workers)
        answer: dict[str, Any] = {}
        for name in names:
            found = self._stations[name].build(load, stage, candidate.name)
            if found["status"] == "ok":
                return self._stations[name], found
            # Of several refusals the most telling one stays: a library that is there and cannot beats a missing one.
            if not answer or answer["reason"]["kind"] in _TRY_ELSEWHERE:
                answer = found
            if answer["reason"]["kind"] not in _TRY_ELSEWHERE:
                break
        return None, answer

    def _measure(
        self, key: CellKey
    ) -> tuple[dict[str, Any], list[dict[str, Any]], float | None, dict[str, Any] | None]:
        """Draw, check and time one cell: the draw, the results, cores of other work, and the read beside them."""
        self._reporter.doing(str(key))
        share = self._weight(key) / (2 * max(len(self._candidates), 1))
        drawn = self._draw(key)
        results: dict[Candidate, dict[str, Any]] = {}
        plans: dict[Station, dict[str, dict[str, int]]] = {}
        for candidate, (station, built) in self._placed.items():
            result: dict[str, Any] = {"name": candidate.label, "kind": "moe_core" if candidate.is_ours else "peer"}
            if station is None:
                result |= built
            elif station.digest != drawn["digest"]:
                reason = Unavailable("draw", f"worker {station.name} draws another routing from the same seed")
                result |= {"status": "unavailable", "reason": reason.as_dict()}
            else:
                result |= {"worker": station.name, "note": built["note"], **station.check(candidate.name)}
                estimates = result.pop("estimates", {})
                if result["status"] == "ok":
                    plans.setdefault(station, {})[candidate.name] = self._calls(estimates)
            results[candidate] = result
            self._reporter.step(share)
        other = OtherWork(station.cpu_seconds for station in {self._stations[MAIN], *plans})
        times, reads = self._time(plans, share)
        busy = other.cores()
        for candidate, result in results.items():
            found = times.get((result.get("worker", ""), candidate.name))
            if isinstance(found, Unavailable):
                for name in ("error", "failed"):
                    result.pop(name, None)
                result |= {"status": "unavailable", "reason": found.as_dict()}
            elif found is not None:
                result["times"] = {mode: summary(values) for mode, values in found.items() if values}
        read = max(reads, key=lambda read: read["best"], default=None)
        if read is not None:
            read = {**read, "rounds": [read["best"] for read in reads]}
        return drawn, list(results.values()), busy, read

    def _draw(self, key: CellKey) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        in_use = {station for station, _ in self._placed.values() if station is not None}
        for station in self._stations.values():
            if station in in_use or station.name == MAIN:
                found = station.cell(key.stage, key.tokens, self.settings.seed)
                drawn = drawn or found
        return drawn

    def _calls(self, estimates: Mapping[str, float]) -> dict[str, int]:
        beside = _FLUSH_SECONDS.get(self._device_type, 0.0005)
        return {
            mode: min(max(math.ceil(self.settings.budget / (seconds + beside)), _FEWEST), _MOST)
            for mode, seconds in estimates.items()
        }

    def _time(
        self, plans: dict[Station, dict[str, dict[str, int]]], share: float
    ) -> tuple[dict[tuple[str, str], Any], list[dict[str, Any]]]:
        """Rounds, in each of which every process has its turn and in it every candidate; on a CPU a read too, since
        others may share its memory."""
        times: dict[tuple[str, str], Any] = {}
        reads: list[dict[str, Any]] = []
        rounds = self.settings.rounds
        for turn in range(rounds):
            if plans and self._device_type == "cpu":
                reads.append(self._stations[MAIN].ask("read"))
            for station, plan in plans.items():
                if len(plans) > 1:
                    time.sleep(self.settings.settle)
                part = {
                    name: {mode: total * (turn + 1) // rounds - total * turn // rounds for mode, total in calls.items()}
                    for name, calls in plan.items()
                    if not isinstance(times.get((station.name, name)), Unavailable)
                }
                for name, found in station.time(part, first=turn * 7).items():
                    known = times.setdefault((station.name, name), {})
                    if isinstance(found, Unavailable):
                        times[station.name, name] = found
                    elif not isinstance(known, Unavailable):
                        for mode, values in found.items():
                            known.setdefault(mode, []).extend(values)
            self._reporter.step(share * sum(map(len, plans.values())) / rounds)
        return times, reads

    def _weight(self, key: CellKey) -> float:
        """Roughly the seconds of a cell, for the estimate of the time left."""
        shape: Shape = self._shapes[key.shape]
        rate = 5e10 * max(key.threads, 1) if self._device_type == "cpu" else 1e14
        one = 6 * key.tokens * shape.top_k * shape.hidden_size * shape.intermediate_size / rate
        return 1 + len(self._candidates) * (self.settings.budget * len(self._modes) + 5 * one)

    def _close(self) -> None:
        for station in self._stations.values():
            station.close()
        self._stations = {}


def _share_notes(cell: dict[str, Any], notes: list[str]) -> None:
    """The same note stands in many results: once in the record, and its index there."""
    for result in cell["results"]:
        note = result.pop("note", "")
        if note:
            if note not in notes:
                notes.append(note)
            result["note"] = notes.index(note)


def _disturbed(cell: dict[str, Any]) -> tuple[bool, float]:
    # Whether other work was busy, and how far times lie apart where that is too far.
    apart = scatter(cell)
    return (cell["other_busy_cores"] or 0) > QUIET_CORES, apart if apart > CALM else 0.0


def add_ratios(cell: dict[str, Any]) -> None:
    """floor / time of every time, the best peer of every mode, and how moe_core stands to it (above 1: faster)."""
    best: dict[str, dict[str, Any]] = {}
    for result in cell["results"]:
        for mode, times in result.get("times", {}).items():
            times["floor_fraction"] = cell["floor"]["seconds"] / times["median"]
            if result["kind"] == "peer" and times["median"] < best.get(mode, {"median": math.inf})["median"]:
                best[mode] = {"name": result["name"], "median": times["median"]}
    for result in cell["results"]:
        if result["kind"] == "moe_core":
            for mode, times in result.get("times", {}).items():
                if mode in best:
                    times["over_best_peer"] = best[mode]["median"] / times["median"]
    cell["best_peer"] = best
