"""moe-core bench: a whole run on a tiny layer, with peers that are right, wrong, absent, or kill their process."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core import plugins
from moe_core.bench import ceilings, disturbance, registry, runner, timing
from moe_core.bench import record as records
from moe_core.bench.draw import Draw
from moe_core.bench.registry import Adapter, Built, Problem, Unavailable
from moe_core.bench.runner import Bench
from moe_core.bench.settings import Candidate, Settings
from moe_core.bench.shapes import parse_shape
from moe_core.bench.worker import LocalWorker, Worker, WorkerDied
from moe_core.errors import BenchError

SHAPE = parse_shape("32x16x8x2+16")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers that cost no time: here nobody looks at how fast anything is."""
    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": ((2**16, 32), (2**16, 32))})
    monkeypatch.setattr(ceilings, "_PAUSE", 0.0)
    monkeypatch.setattr(timing, "_CPU_FLUSH_LIMITS", (2**16, 2**16))
    gc.freeze()  # as a worker does; full collections over everything that pytest imported take seconds
    yield
    gc.unfreeze()


class Calls(dict):
    """How often each peer of the test was called."""


@pytest.fixture
def peers() -> Iterator[Calls]:
    """Peers built on ``loop``: each spoils its result, its input or its process in its own way."""
    calls = Calls()

    def add(name: str, spoil: Callable[[Draw, Built], Any], **options: Any) -> None:
        def build(problem: Problem) -> Built:
            inner = registry.build("loop", problem)

            def call(draw: Draw) -> Any:
                calls[name] = calls.get(name, 0) + 1
                return spoil(draw, inner)

            return Built(call, name)

        registry.register(Adapter(name, options.pop("build", build), stages=("experts",)))

    def absent(problem: Problem) -> Built:
        raise Unavailable("not_installed", "no such library", "pip install it")

    def tramples(draw: Draw, inner: Built) -> Any:
        out = inner.call(draw)
        draw.hidden_states.mul_(1)  # harmless, and not seen
        draw.hidden_states.zero_()
        return out

    def late(draw: Draw, inner: Built) -> Any:
        if calls["late"] > 4:
            raise RuntimeError("late trouble\nmore of it")
        return inner.call(draw)

    add("right", lambda draw, inner: inner.call(draw))
    add("half", lambda draw, inner: inner.call(draw) / 2)
    add("unwritten", lambda draw, inner: torch.empty_like(draw.hidden_states))
    add("flat", lambda draw, inner: inner.call(draw).flatten())
    add("tramples", tramples)
    add("late", late)
    add("absent", lambda draw, inner: None, build=absent)
    added = ["right", "half", "unwritten", "flat", "tramples", "late", "absent"]
    yield calls
    for name in added:
        registry.unregister(name)


def settings(*names: str, **changes: Any) -> Settings:
    given: dict[str, Any] = {
        "shapes": (SHAPE,),
        "tokens": (3,),
        "stages": ("experts",),
        "candidates": tuple(map(Candidate.parse, names)),
        "device": "cpu",
        "budget": 0.001,
        "rounds": 2,
        "quick": True,
    }
    return Settings(**{**given, **changes})


def local(name: str, session: dict[str, Any]) -> Worker:
    return LocalWorker(name, session)


def run(wanted: Settings, before: Any = None, make: Callable[..., Worker] = local) -> tuple[dict[str, Any], int]:
    saved = []
    record = Bench(wanted, make, "test").run(before, lambda found: saved.append(len(found["cells"])))
    records.validate(record)
    return record, len(saved)


def results(record: dict[str, Any], cell: int = 0) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in record["cells"][cell]["results"]}


def test_a_peer_that_fails_its_check_is_shown_and_never_timed(peers: Calls) -> None:
    found = results(run(settings("moe_core", "right", "half", "unwritten", "flat", "tramples"))[0])
    assert found["moe_core"]["status"] == found["right"]["status"] == "ok"
    assert found["right"]["times"]["host/read"]["n"] >= 3
    for name in ("half", "unwritten", "flat", "tramples"):
        assert found[name]["status"] == "wrong" and "times" not in found[name]
        assert peers[name] <= 2, "called for its check alone"
    assert found["half"]["error"] == pytest.approx(0.5) and found["half"]["allowed"] == 1e-5
    assert found["flat"]["error"] is None, "a wrong shape has no error to measure"
    # What fresh memory holds is anybody's guess: numbers far off, or NaN, which has no error either.
    assert found["unwritten"]["error"] is None or found["unwritten"]["error"] > found["unwritten"]["allowed"]


@pytest.mark.parametrize("scheme", ["fp8_block", "int4_weight_only:32"])
def test_quantised_experts_beside_the_dequantised_layer(peers: Calls, scheme: str) -> None:
    """Who reads the scheme gets what is stored, everybody else the layer of the same values; both are checked."""
    name, _, _ = scheme.partition(":")
    seen: dict[str, torch.dtype] = {}

    def build(problem: Problem, label: str) -> Built:
        seen[label] = problem.experts[0].dtype
        return registry.moe_core_runner(problem, None)

    for label, schemes in (("reads", (name,)), ("plain", ())):
        registry.register(Adapter(label, build, option=label, schemes=schemes))
    try:
        shape = dataclasses.replace(SHAPE, hidden_size=256, intermediate_size=128).quantised(scheme)
        wanted = settings("moe_core/reference", "moe_core/reference@dequantised", "reads", "plain", shapes=(shape,))
        cell = run(dataclasses.replace(wanted, stages=("experts", "layer")))[0]["cells"][0]
        assert "reads" in registry.names("cpu", quantised=True) and "reads" not in registry.names("cpu")
    finally:
        registry.unregister("reads")
        registry.unregister("plain")
    assert {result["name"]: result["status"] for result in cell["results"]} == {
        "moe_core/reference": "ok",
        "moe_core/reference@dequantised": "ok",
        "reads": "ok",
        "plain": "ok",
    }
    assert seen == {"reads": torch.float8_e4m3fn if name == "fp8_block" else torch.uint8, "plain": torch.float32}
    assert cell["shape"]["quant"] == scheme and cell["shape"]["name"].endswith("/" + scheme)
    # 3 * 256 * 128 weights: bytes each with a scale (float32) for 128 x 128, or half bytes with one for 32; x and out.
    stored = 98304 + 6 * 4 if name == "fp8_block" else 98304 // 2 + 98304 // 32 * 4
    assert cell["bytes"] == pytest.approx(cell["experts_hit"] * stored + 2 * 3 * 256 * 4)


def test_a_scheme_that_there_is_not_is_refused() -> None:
    for text in ("fp3", "int4_weight_only:many"):
        with pytest.raises(BenchError, match="SCHEME"):
            SHAPE.quantised(text)


def test_every_reason_has_a_kind(peers: Calls) -> None:
    found = results(run(settings("right", "absent", "late", "moe_core/no_such", "vllm"))[0])
    assert found["absent"]["reason"] == {
        "kind": "not_installed",
        "reason": "no such library",
        "remedy": "pip install it",
    }
    assert found["late"]["reason"]["reason"] == "RuntimeError: late trouble" and "times" not in found["late"]
    assert "no_such" in found["moe_core/no_such"]["reason"]["reason"]
    assert found["vllm"]["reason"]["kind"] == "device"
    assert all(result["reason"]["kind"] in registry.REASONS for result in found.values() if "reason" in result)
    assert found["right"]["times"]


def test_the_cell_says_what_it_rests_on(peers: Calls) -> None:
    record, _ = run(settings("moe_core", "right"))
    (cell,) = record["cells"]
    assert record["complete"] and len(cell["load_average"]) == 2 and 0 < cell["experts_hit"] <= 6
    # On a CPU the read was measured in the turns of the cell, since others may share its memory.
    matmul = record["ceilings"][cell["ceilings"]]["matmul"]
    memory, compute = cell["bytes"] / cell["read"]["best"], cell["flops"] / matmul["best"]
    # The mean of the draws' floors, of which some may be bound by the one and some by the other.
    assert max(memory, compute) <= cell["floor"]["seconds"] * (1 + 1e-9) < memory + compute
    ours = results(record)["moe_core"]["times"]["host/read"]
    best = cell["best_peer"]["host/read"]
    assert best["name"] == "right" and ours["over_best_peer"] == pytest.approx(best["median"] / ours["median"])
    assert record["notes"][results(record)["moe_core"]["note"]].startswith("backend ")


def test_a_whole_layer_has_a_router_and_shared_experts_around_a_peer(peers: Calls) -> None:
    found = results(run(settings("moe_core", "right", "half", stages=("layer",)))[0])
    assert found["moe_core"]["status"] == found["right"]["status"] == "ok"
    assert found["half"]["status"] == "wrong"


@pytest.mark.parametrize("shape", ["32x16x8x2", "deepseek-v3", "deepseek-v2-lite", "qwen2-moe-57b"])
def test_transformers_blocks_and_the_plain_layer_compute_the_layer(shape: str) -> None:
    pytest.importorskip("transformers")
    import dataclasses

    base = parse_shape(shape)
    sizes = {"hidden_size": 64, "intermediate_size": 16, "num_experts": 32, "top_k": 4}
    shared = 32 if base.shared_intermediate_size else 0
    small = dataclasses.replace(base, **sizes, shared_intermediate_size=shared)
    names = ["loop", *(name for name in registry.names("cpu") if name.startswith("transformers/"))]
    found = results(run(settings(*names, shapes=(small,), stages=("layer",)))[0])
    assert {name: result["status"] for name, result in found.items()} == dict.fromkeys(names, "ok")


@pytest.mark.parametrize("stage", ["experts", "layer"])
def test_plain_peers_are_right(stage: str) -> None:
    found = results(run(settings("loop", "torch/grouped_mm", stages=(stage,), dtypes=("float32",)))[0])
    assert found["loop"]["status"] == "ok"
    assert found["torch/grouped_mm"]["status"] == "ok" or not hasattr(torch.nn.functional, "grouped_mm")


def test_a_run_goes_on_where_it_stopped(peers: Calls) -> None:
    whole = settings("right", tokens=(1, 2, 3))
    stopped, saves = run(settings("right", tokens=(1, 2, 3), max_seconds=-1.0))
    assert not stopped["complete"] and not stopped["cells"] and saves == 1
    first, _ = run(settings("right", tokens=(1, 2)))
    before = [dict(cell) for cell in first["cells"]]
    rest, saves = run(whole, first)
    assert [cell["tokens"] for cell in rest["cells"]] == [1, 2, 3] and rest["cells"][:2] == before
    assert rest["complete"] and saves == 2, "one new cell and the end"
    again, saves = run(whole, rest)
    assert saves == 1 and len(again["cells"]) == 3
    with pytest.raises(BenchError, match="another settings: budget was 0.001 and is 0.002"):
        run(settings("right", budget=0.002), first)


class Fragile(LocalWorker):
    """Dies whenever it is asked something about the peer ``killer``."""

    started = 0

    def __init__(self, name: str, session: dict[str, Any]) -> None:
        super().__init__(name, session)
        type(self).started += 1

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command == self.deadly and "right" in (*arguments.get("plan", ()), arguments.get("candidate")):
            raise WorkerDied("signal 11 (SIGSEGV): it was me")
        return super().request(command, **arguments)


@pytest.mark.parametrize("deadly", ["build", "check", "time"])
def test_a_peer_that_kills_its_process_costs_only_itself(peers: Calls, deadly: str) -> None:
    fragile = type("FragileHere", (Fragile,), {"deadly": deadly, "started": 0})
    record, _ = run(settings("loop", "right", tokens=(2, 3)), make=fragile)
    for cell in range(2):
        found = results(record, cell)
        assert found["right"]["status"] == "unavailable" and found["right"]["reason"]["kind"] == "crash"
        assert "SIGSEGV" in found["right"]["reason"]["reason"]
        assert found["loop"]["times"]
    assert fragile.started <= 3, "the culprit is not tried again"


def test_a_peer_that_only_another_environment_has_runs_there(peers: Calls) -> None:
    def make(name: str, session: dict[str, Any]) -> Worker:
        worker = LocalWorker(name, session)
        if name == "other":
            return worker
        real = worker.request

        def request(command: str, **arguments: Any) -> dict[str, Any]:
            if command == "build" and arguments["candidate"] == "right":
                reason = Unavailable("not_installed", "not here")
                return {"status": "unavailable", "reason": reason.as_dict()}
            return real(command, **arguments)

        worker.request = request  # type: ignore[method-assign]
        return worker

    wanted = settings("loop", "right", "other:loop", workers={"other": "python"}, settle=0.0)
    record, _ = run(wanted, make=make)
    found = results(record)
    assert found["loop"]["worker"] == "main" and found["right"]["worker"] == found["other:loop"]["worker"] == "other"
    assert all(result["times"] for result in found.values()) and record["workers"]["other"]["versions"]["torch"]


def test_a_worker_that_does_not_start_is_a_reason(peers: Calls) -> None:
    def make(name: str, session: dict[str, Any]) -> Worker:
        if name == "other":
            raise WorkerDied("python: No such file or directory")
        return LocalWorker(name, session)

    record, _ = run(settings("right", "other:right", workers={"other": "python"}), make=make)
    found = results(record)
    assert found["right"]["times"] and found["other:right"]["reason"]["kind"] == "broken"
    assert "No such file" in record["workers"]["other"]["broken"]


def test_weights_that_do_not_fit_are_skipped_with_the_reason(peers: Calls) -> None:
    huge = parse_shape("65536x65536x4096x2")
    record, _ = run(settings("right", shapes=(huge, SHAPE)))
    assert [cell["shape"]["name"] for cell in record["cells"]] == [SHAPE.name]
    (skipped,) = record["skipped"].values()
    assert skipped["kind"] == "memory" and "GB are free" in skipped["reason"]


def test_a_call_beyond_patience_is_not_timed(peers: Calls) -> None:
    found = results(run(settings("right", patience=0.0))[0])
    assert found["right"]["reason"]["kind"] == "slow" and peers["right"] == 2, "those of the check"


def test_a_disturbed_cell_is_measured_again(peers: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([1.5, 0.0])
    monkeypatch.setattr(disturbance.OtherWork, "cores", lambda self: next(busy))
    monkeypatch.setattr(runner, "wait_for_quiet", lambda at_most, tell: 0.0)
    monkeypatch.setattr(runner, "scatter", lambda cell: 0.0)
    record, _ = run(settings("right", quiet=60.0))
    assert [cell["other_busy_cores"] for cell in record["cells"]] == [0.0] and next(busy, None) is None


@pytest.mark.parametrize("quiet", [0.0, 60.0])
def test_of_cells_whose_times_scatter_the_calmest_is_kept(
    peers: Calls, monkeypatch: pytest.MonkeyPatch, quiet: float
) -> None:
    """Not the fastest, and after a few attempts the best there was; without patience the first."""
    seen: dict[str, float] = {}

    def apart(cell: dict[str, Any]) -> float:
        return seen.setdefault(cell["date"], [0.5, 0.3, 0.4, 0.0][len(seen)])

    monkeypatch.setattr(disturbance.OtherWork, "cores", lambda self: 0.0)
    monkeypatch.setattr(runner, "wait_for_quiet", lambda at_most, tell: 0.0)
    monkeypatch.setattr(runner, "scatter", apart)
    clock = (f"2026-01-01T00:00:{second:02d}+00:00" for second in range(60))
    monkeypatch.setattr(runner.records, "now", lambda: next(clock))
    record, _ = run(settings("right", quiet=quiet))
    (cell,) = record["cells"]
    if quiet:
        assert seen[cell["date"]] == 0.3 and len(seen) == 3
    else:
        assert not seen, "nobody asked"


def test_scatter_is_of_what_decides_the_ratios() -> None:
    def result(kind: str, name: str, low: float, high: float) -> dict[str, Any]:
        return {"kind": kind, "name": name, "times": {"host/read": {"p10": low, "p90": high, "median": 1.0}}}

    ours, best = result("moe_core", "moe_core", 0.9, 1.1), result("peer", "best", 0.8, 1.4)
    other = result("peer", "other", 0.1, 9.0)
    failed = {"kind": "peer", "name": "gone", "status": "unavailable"}
    cell = {"best_peer": {"host/read": {"name": "best"}}, "results": [ours, best, other, failed]}
    assert disturbance.scatter(cell) == pytest.approx(0.3)
    assert disturbance.scatter({"best_peer": {}, "results": [ours]}) == 0.0
    read = {"read": {"rounds": [30e9, 40e9, 32e9]}}
    assert disturbance.scatter({**cell, **read}) == pytest.approx(0.3), "the larger of both"
    assert disturbance.scatter({"best_peer": {}, "results": [ours], **read}) == pytest.approx(0.25)


def test_waiting_ends_with_the_quiet_or_with_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(disturbance, "_LOOK_SECONDS", 0.01)
    busy = iter([2.0, 1.0, 0.1])
    monkeypatch.setattr(disturbance.OtherWork, "cores", lambda self: next(busy))
    assert disturbance.wait_for_quiet(60.0, told.append) < 30 and len(told) == 2
    monkeypatch.setattr(disturbance.OtherWork, "cores", lambda self: 2.0)
    assert 0.05 <= disturbance.wait_for_quiet(0.05, told.append) < 30
    assert disturbance.wait_for_quiet(0.0, told.append) < 0.05


def test_a_backend_that_is_not_installed_comes_by_its_module(
    peers: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare_backend.py").write_text(
        "from moe_core import BackendInfo, Verdict, hookimpl, reference\n"
        "@hookimpl\ndef moe_backend_info():\n    return BackendInfo(name='bare')\n"
        "@hookimpl\ndef moe_probe(platform):\n    return Verdict.yes()\n"
        "@hookimpl\ndef moe_experts(plan, hidden_states, routing):\n"
        "    return reference.moe_experts(plan, hidden_states, routing)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        named = {"bare": "bare_backend", "reference": "not_looked_at"}
        found = results(run(settings("moe_core/bare", plugins=named))[0])
        assert found["moe_core/bare"]["times"]
    finally:
        plugins.unregister("bare")
    told = {}

    def make(name: str, session: dict[str, Any]) -> Worker:
        told[name] = session["plugins"]
        return LocalWorker(name, {**session, "plugins": {}})

    run(
        settings(
            "loop", "ours:moe_core/reference", "loop", workers=dict.fromkeys(("peers", "ours"), ""), plugins=named
        ),
        make=make,
    )
    assert told == {"main": named, "ours": named, "peers": {}}, "an environment of peers need not have our backends"
    with pytest.raises(BenchError, match="--plugin bare=no_such_module: ModuleNotFoundError"):
        registry.register_plugin("bare", "no_such_module")


def test_names(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="'nobody': expected one of loop"):
        registry.adapter("nobody")
    file = tmp_path / "mine.py"
    file.write_text(
        "from moe_core.bench.registry import Adapter, register\nregister(Adapter('mine', lambda problem: None))\n"
    )
    registry.load_adapters([file])
    registry.load_adapters([file])  # a second look is no second registration
    assert "mine" in registry.names("cpu")
    registry.unregister("mine")
    with pytest.raises(BenchError, match="expected a Python file"):
        registry.load_adapters([tmp_path / "none.py"])
    bad = tmp_path / "bad.py"
    bad.write_text("1 / 0\n")
    with pytest.raises(BenchError, match="ZeroDivisionError"):
        registry.load_adapters([bad])


def test_stage_experts_needs_nothing_of_the_router(peers: Calls) -> None:
    """A shape whose router has a selection bias: the ids are given, so its experts alone have none."""
    small = dataclasses.replace(SHAPE, routing={"scoring_func": "sigmoid", "e_score_correction_bias": True})
    found = results(run(settings("moe_core", "right", shapes=(small,)))[0])
    assert found["moe_core"]["status"] == "ok"
