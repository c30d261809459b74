"""A probe that hangs is a broken plugin after MOE_CORE_PROBE_TIMEOUT seconds, and costs that time once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from moe_core import BackendInfo, MoEConfig, Verdict, backends, explain, hookimpl, plugins
from moe_core.errors import BackendUnavailableError, SettingError

CONFIG = MoEConfig(32, 24, 8, 2)


class Slow:
    """Its probe waits until it is let go; it remembers who asked."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.asked_in: list[threading.Thread] = []

    @hookimpl
    def moe_backend_info(self) -> BackendInfo:
        return BackendInfo(name="slow", priority=90)

    @hookimpl
    def moe_probe(self) -> Verdict:
        self.asked_in.append(threading.current_thread())
        self.let_go.wait()
        return Verdict.yes()

    @hookimpl
    def moe_experts(self, plan):
        raise AssertionError("not called")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    monkeypatch.setenv("MOE_CORE_PROBE_TIMEOUT", "0.2")
    plugin = Slow()
    plugins.register(plugin, "slow")
    yield plugin
    plugin.let_go.set()
    plugins.unregister("slow")


def test_a_hanging_probe_is_broken_and_the_others_serve(slow: Slow) -> None:
    report = explain(CONFIG, "cpu")
    candidate = report.candidate("slow")
    assert candidate.status == "broken"
    assert report.backend not in ("", "slow")
    assert "moe_probe did not answer in 0.2 s" in candidate.reason
    assert "MOE_CORE_PROBE_TIMEOUT" in candidate.reason
    assert "MOE_CORE_DISABLE=slow" in candidate.remedy
    with pytest.raises(BackendUnavailableError, match="has not answered yet"):
        explain(CONFIG, "cpu", backend="slow")


def test_a_hanging_probe_is_waited_for_once(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    backends()
    monkeypatch.setenv("MOE_CORE_PROBE_TIMEOUT", "60")
    start = time.monotonic()
    backends()
    assert time.monotonic() - start < 30
    assert len(slow.asked_in) == 1


def test_a_late_answer_counts_from_the_next_selection_on(slow: Slow) -> None:
    backends()
    slow.let_go.set()
    slow.asked_in[0].join()
    assert explain(CONFIG, "cpu").backend == "slow"


def test_only_the_first_answer_costs_a_thread(slow: Slow) -> None:
    slow.let_go.set()
    backends()
    assert explain(CONFIG, "cpu").backend == "slow"
    first, second = slow.asked_in
    assert first is not threading.current_thread()
    assert second is threading.current_thread()


def test_zero_asks_in_the_calling_thread(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    slow.let_go.set()
    monkeypatch.setenv("MOE_CORE_PROBE_TIMEOUT", "0")
    assert explain(CONFIG, "cpu").backend == "slow"
    assert slow.asked_in == [threading.current_thread()]


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_what_is_no_time_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_PROBE_TIMEOUT", value)
    with pytest.raises(SettingError, match=f"MOE_CORE_PROBE_TIMEOUT='{value}'"):
        backends()
