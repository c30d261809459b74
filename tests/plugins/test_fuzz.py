"""200 plugins with random faults: none crashes a bind or a call, none is chosen wrongly, each fault is named.

A fault that selection can see leaves a line in the report and the plugin out; one that only a call can see is an error
of moe_core that names the stage; one that no check of shapes can see (a wrong value) is what ``doctor`` is for.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from moe_core import BackendInfo, ExpertsOut, MoELayer, Pending, Routing, Verdict, backends, explain, hookimpl, plugins
from moe_core import reference as r
from moe_core.doctor import examine
from moe_core.errors import BindError, MoECoreError, PluginError, StageError
from moe_core.types import STAGES

SEEDS = range(200)
STATUSES = {"ok", "unavailable", "unsupported", "broken", "incompatible"}


class Odd(BaseException):
    """Not even an Exception."""


class Mute(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ValueError


class Shy:
    """Its repr cannot be had."""

    def __repr__(self) -> str:
        raise ValueError


ERRORS: tuple[Callable[[], BaseException], ...] = (
    lambda: ValueError("two\nlines"),
    lambda: SystemExit(3),
    lambda: GeneratorExit(),
    lambda: StopIteration(),
    lambda: RecursionError("deep"),
    lambda: Odd("odd"),
    lambda: Mute(),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
)
JUNK: tuple[Any, ...] = (None, True, 0, "yes", (), {}, object(), Shy(), float("nan"), Verdict, torch.zeros(2))


@dataclass
class Fuzzed:
    """A plugin that is right but for what was drawn; ``faults`` says in which hooks."""

    draw: random.Random
    hang: threading.Event
    faults: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hooks = ["info", "probe", "supports", "prepare", *STAGES]
        for hook in self.draw.sample(hooks, k=self.draw.choice((1, 1, 1, 2))):
            kinds = ["raises", "junk"]
            if hook in STAGES:
                kinds += ["shape", "shape", "dtype", "nan"]
            elif hook == "probe":
                kinds += ["hangs", "bad verdict"]
            elif hook in ("info", "supports"):
                kinds += [f"bad {'info' if hook == 'info' else 'verdict'}"] * 2
            self.faults[hook] = self.draw.choice(kinds)

    def result(self, hook: str, right: Callable[[], Any]) -> Any:
        fault = self.faults.get(hook)
        if fault is None:
            return right()
        if fault == "raises":
            raise self.draw.choice(ERRORS)()
        if fault == "junk":
            return self.draw.choice(JUNK)
        if fault == "hangs":
            self.hang.wait()
        if fault == "bad info":
            return self.draw.choice(BAD_INFOS)()
        if fault == "bad verdict":
            return self.draw.choice(BAD_VERDICTS)()
        return spoil(right(), fault, self.draw)

    @hookimpl
    def moe_backend_info(self) -> Any:
        return self.result("info", lambda: BackendInfo(name="fuzz", priority=90, stages=STAGES))

    @hookimpl
    def moe_probe(self) -> Any:
        return self.result("probe", Verdict.yes)

    @hookimpl
    def moe_supports(self) -> Any:
        return self.result("supports", Verdict.yes)

    @hookimpl
    def moe_prepare(self, weights) -> Any:
        return self.result("prepare", lambda: weights)

    @hookimpl
    def moe_gate(self, plan, hidden_states, router_logits, input_ids) -> Any:
        return self.result("gate", lambda: r.moe_gate(plan, hidden_states, router_logits, input_ids))

    @hookimpl
    def moe_shared_experts(self, plan, hidden_states) -> Any:
        return self.result("shared_experts", lambda: r.moe_shared_experts(plan, hidden_states))

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing) -> Any:
        return self.result("experts", lambda: r.moe_experts(plan, hidden_states, routing))

    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared) -> Any:
        return self.result("reduce", lambda: r.moe_reduce(plan, routing, experts_out, shared))


BAD_INFOS: tuple[Callable[[], Any], ...] = (
    lambda: BackendInfo(name="another", stages=STAGES),
    lambda: BackendInfo(name="fuzz", hook_api=2),
    lambda: BackendInfo(name="fuzz", hook_api="1"),
    lambda: BackendInfo(name="fuzz", priority=None),
    lambda: BackendInfo(name="fuzz", stages=("experts", "magic")),
    lambda: BackendInfo(name="fuzz", stages="experts"),
    lambda: BackendInfo(name="fuzz", device_types=None),
    lambda: BackendInfo(name="not a name"),
)
BAD_VERDICTS: tuple[Callable[[], Any], ...] = (
    lambda: Verdict.no("", "remedy"),
    lambda: Verdict.no("reason", ""),
    lambda: Verdict.no("no luck", "try another day"),
    lambda: Verdict(1),
    lambda: Verdict(True, traits=None),
    lambda: Verdict(True, traits={"workspace_bytes": "much"}),
    lambda: Verdict.yes(entry="magic"),
    lambda: Verdict.yes(deterministic="mostly"),
    lambda: Verdict.yes(unheard_of=True),
)


def spoil(right: Any, fault: str, draw: random.Random) -> Any:
    """The right result with a wrong shape, a wrong dtype or NaN in it."""
    if isinstance(right, Routing):
        weights, ids = right
        if fault == "dtype":
            return draw.choice((Routing(weights.double(), ids), Routing(weights, ids.long())))
        return Routing(weights * float("nan") if fault == "nan" else reshape(weights, draw), ids)
    if isinstance(right, ExpertsOut):
        if fault == "dtype":
            return ExpertsOut(right.value, draw.choice((0, None, "no")))
        return ExpertsOut(right.value * float("nan") if fault == "nan" else reshape(right.value, draw), right.reduced)
    if isinstance(right, Pending):
        value = right.result()
        if fault == "dtype":
            return Pending(draw.choice((None, 5, "text", lambda: None)))
        value = value * float("nan") if fault == "nan" else reshape(value, draw)
        return draw.choice((Pending(value), Pending(lambda: value)))
    if fault == "dtype":
        return right.to(draw.choice((torch.float64, torch.int64, torch.bfloat16)))
    return right * float("nan") if fault == "nan" else reshape(right, draw)


def reshape(x: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return draw.choice(
        (x[:1], x[..., :1], x[1:], x[None], x.flatten(), torch.cat([x, x]), x.transpose(0, 1), x[:0], x.sum())
    )


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    monkeypatch.setenv("MOE_CORE_PROBE_TIMEOUT", "0.2")
    event = threading.Event()
    yield event
    event.set()


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_a_faulty_plugin_is_named_or_left_out(seed: int, hang: threading.Event, layer: MoELayer) -> None:
    plugin = Fuzzed(random.Random(seed), hang)
    x = torch.randn(5, 32)
    expected = layer(x)
    chosen_without = layer.report.backend
    refused = outcome(lambda: plugins.register(plugin, "fuzz"))
    if refused is not None:
        assert isinstance(refused, PluginError)
        assert "info" in plugin.faults
        assert "fuzz" in str(refused)
        return
    try:
        judge(plugin, MoELayer(layer.config), layer, x, expected)
    finally:
        plugins.unregister("fuzz")
    assert explain(layer.config, "cpu", dtype=torch.float32).backend == chosen_without
    assert torch.equal(layer(x), expected)


def outcome(call: Callable[[], Any]) -> Any:
    """What it returned, or the error of moe_core that it raised; another error fails the test."""
    try:
        return call()
    except MoECoreError as error:
        return error


def judge(plugin: Fuzzed, fuzzed: MoELayer, layer: MoELayer, x: torch.Tensor, expected: torch.Tensor) -> None:
    assert "info" not in plugin.faults, "a wrong info was let in"
    (status,) = [status for status in backends() if status.name == "fuzz"]
    report = explain(layer.config, "cpu", dtype=torch.float32)
    candidate = report.candidate("fuzz")
    assert {status.status, candidate.status} <= STATUSES
    assert len(str(report).splitlines()) < 12, "a reason is one line"
    if {"probe", "supports"} & set(plugin.faults):
        assert report.backend != "fuzz", "chosen in spite of its own answer"
        assert candidate.status != "ok"
        assert candidate.reason and candidate.remedy
        return
    assert report.backend == "fuzz", "its faults show in a call only"
    fuzzed.load_state_dict(layer.state_dict())
    out = outcome(lambda: fuzzed(x))
    if isinstance(out, MoECoreError):
        assert isinstance(out, StageError | BindError)
        assert "fuzz" in str(out)
        return
    assert out.shape == x.shape and out.dtype == x.dtype
    assert set(plugin.faults.values()) <= {"nan"} or torch.equal(out, expected), "garbage without an error"
    if "nan" in plugin.faults.values():
        (check,) = [check for check in examine() if check.backend == "fuzz"]
        assert check.status == "FAIL"
        assert "nan" in check.detail


def test_the_seeds_cover_every_hook_and_kind() -> None:
    drawn = {fault for seed in SEEDS for fault in Fuzzed(random.Random(seed), threading.Event()).faults.items()}
    kinds: dict[str, set[str]] = {}
    for hook, kind in drawn:
        kinds.setdefault(hook, set()).add(kind)
    assert set(kinds) == {"info", "probe", "supports", "prepare", *STAGES}
    for stage in STAGES:
        assert kinds[stage] == {"raises", "junk", "shape", "dtype", "nan"}
    assert kinds["probe"] == {"raises", "junk", "hangs", "bad verdict"}


def test_a_fault_of_a_stage_is_a_stage_error(layer: MoELayer) -> None:
    class Bad(Fuzzed):
        def __post_init__(self) -> None:
            self.faults = {"gate": "raises"}

    plugins.register(Bad(random.Random(0), threading.Event()), "fuzz")
    try:
        with torch.no_grad(), pytest.raises(StageError, match="stage gate of backend fuzz"):
            layer(torch.randn(3, 32))
    finally:
        plugins.unregister("fuzz")
