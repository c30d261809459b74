"""Dispatch, observers and fallback, proven with a backend whose results are the reference's, bit for bit."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter

import pytest
import torch

from moe_core import MoELayer, MoERunner, explain, hookimpl, use_backend
from moe_core.errors import BackendUnavailableError
from moe_core.runner import FallbackWarning
from moe_core.testing import Loopback, registered
from moe_core.types import STAGES

ALL = dict.fromkeys(STAGES, 1)


def run(layer: MoELayer, **options: object) -> tuple[MoERunner, torch.Tensor]:
    config = dataclasses.replace(layer.config, check_layout=False)  # a call at bind that is not the user's
    with torch.no_grad():
        runner = MoERunner(config, layer.weights(), **options)
        return runner, runner(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def expected(layer: MoELayer) -> torch.Tensor:
    return run(layer, backend="reference")[1]


def test_by_name_every_stage_is_the_backends(layer: MoELayer, expected: torch.Tensor) -> None:
    with registered(Loopback()) as loopback:
        runner, out = run(layer, backend="loopback")
    assert loopback.calls == {"prepare": 1, **ALL}
    assert set(runner.report.stages.values()) == {"loopback"}
    assert torch.equal(out, expected)


def test_by_priority_without_being_asked(layer: MoELayer, expected: torch.Tensor) -> None:
    with registered(Loopback(priority=99)) as loopback:
        runner, out = run(layer)
    assert runner.report.backend == "loopback"
    assert runner.report.why.startswith("auto")
    assert loopback.calls == {"prepare": 1, **ALL}
    assert torch.equal(out, expected)


def test_nothing_is_called_that_was_not_chosen(layer: MoELayer) -> None:
    with registered(Loopback()) as loopback, use_backend("reference"):
        run(layer)
    assert not loopback.calls


@pytest.mark.parametrize("entry", ["python", "op"])
def test_both_entries(entry: str, layer: MoELayer, expected: torch.Tensor) -> None:
    with registered(Loopback(entry=entry)) as loopback:
        runner, out = run(layer, backend="loopback")
    assert runner.report.entry == entry
    assert loopback.calls == {"prepare": 1, **ALL}
    assert torch.equal(out, expected)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "experts"])
def test_a_stage_that_is_not_listed_comes_from_the_reference(
    stage: str, layer: MoELayer, expected: torch.Tensor
) -> None:
    rest = tuple(other for other in STAGES if other != stage)
    with (
        registered(Loopback(f"without_{stage}", stages=rest)) as loopback,
        pytest.warns(FallbackWarning, match=f"stage {stage} runs on the reference.*does not implement"),
    ):
        runner, out = run(layer, backend=f"without_{stage}")
    assert loopback.calls == {"prepare": 1, **dict.fromkeys(rest, 1)}
    assert runner.report.stages[stage] == "reference"
    assert torch.equal(out, expected)


def test_a_refused_stage_falls_back_in_automatic_choice_and_raises_by_name(
    layer: MoELayer, expected: torch.Tensor
) -> None:
    with registered(Loopback("picky", priority=99, refuse={"reduce": "not on Mondays"})) as loopback:
        with pytest.warns(FallbackWarning, match="stage reduce runs on the reference.*not on Mondays"):
            runner, out = run(layer)
        with pytest.raises(BackendUnavailableError, match="not on Mondays"):
            explain(layer.config, "cpu", backend="picky")
    assert loopback.calls == {"prepare": 1, "gate": 1, "shared_experts": 1, "experts": 1}
    assert runner.report.fallbacks["reduce"] == ("not on Mondays", "leave it to the reference")
    assert torch.equal(out, expected)


def test_without_experts_it_is_no_candidate(layer: MoELayer) -> None:
    with registered(Loopback(priority=99, refuse={"experts": "not on Mondays"})):
        report = explain(layer.config, "cpu")
    assert report.backend != "loopback"
    assert report.candidate("loopback").status == "unsupported"


class Watcher:
    """Counts stages, and what they returned."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.bound: list[str] = []

    @hookimpl(wrapper=True)
    def moe_gate(self, hidden_states):
        self.seen["gate"] += len(hidden_states)
        return (yield)

    @hookimpl(wrapper=True)
    def moe_shared_experts(self, hidden_states):
        self.seen["shared_experts"] += len(hidden_states)
        return (yield)

    @hookimpl(wrapper=True)
    def moe_experts(self, routing):
        self.seen["experts"] += len(routing.topk_ids)
        return (yield)

    @hookimpl(wrapper=True)
    def moe_reduce(self, plan):
        out = yield
        self.seen["reduce"] += len(out)
        return out

    @hookimpl
    def moe_bound(self, report):
        self.bound.append(report.backend)


@pytest.mark.parametrize("backend", ["loopback", "reference"])
def test_an_observer_sees_every_stage_and_changes_nothing(
    backend: str, layer: MoELayer, expected: torch.Tensor
) -> None:
    with registered(Loopback()) as loopback, registered(Watcher(), "watcher") as watcher:
        out = run(layer, backend=backend)[1]
    assert watcher.seen == dict.fromkeys(STAGES, 5)
    assert watcher.bound == [backend]
    assert bool(loopback.calls) == (backend == "loopback")
    assert torch.equal(out, expected)


def test_observers_see_stages_of_two_backends_in_one_layer(layer: MoELayer, expected: torch.Tensor) -> None:
    with (
        registered(Loopback("only_experts", stages=("experts",))),
        registered(Watcher(), "watcher") as watcher,
        pytest.warns(FallbackWarning),
    ):
        out = run(layer, backend="only_experts")[1]
    assert watcher.seen == dict.fromkeys(STAGES, 5)
    assert torch.equal(out, expected)


class BadObserver:
    @hookimpl
    def moe_bound(self):
        raise SystemExit(7)


def test_an_observer_that_exits_stops_nobody(
    layer: MoELayer, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with registered(BadObserver(), "bad_observer"), caplog.at_level(logging.ERROR, logger="moe_core"):
        assert torch.equal(run(layer, backend="reference")[1], expected)
    assert "moe_bound of plugin bad_observer failed" in caplog.text


def test_gradients_through_a_third_party_are_the_references(layer: MoELayer) -> None:
    gradients = []
    with registered(Loopback(priority=99)) as loopback:
        for backend in ("reference", None):
            x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
            other = MoELayer(dataclasses.replace(layer.config, check_layout=False), backend=backend)
            other.load_state_dict(layer.state_dict())
            other(x).square().sum().backward()
            gradients.append([x.grad, *(parameter.grad for parameter in other.parameters())])
    assert loopback.calls["experts"] == 1
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)
