"""Two plugins that claim one name: nobody is chosen by install order, and a built-in name stays with its owner."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from moe_core import MoEConfig, backends, explain
from moe_core.errors import BackendUnavailableError, UnknownBackendError

from .conftest import Distribute, healthy

CONFIG = MoEConfig(32, 24, 8, 2)


def test_two_distributions_with_one_name_are_both_refused(distribute: Distribute) -> None:
    distribute("twin", healthy("twin", priority=90), dist="first-dist")
    distribute("twin", healthy("twin", priority=91), dist="second-dist")
    distribute("good", healthy("good", priority=80))
    (twin,) = [status for status in backends() if status.name == "twin"]
    assert twin.status == "broken"
    assert "first-dist" in twin.reason
    assert "second-dist" in twin.reason
    assert "uninstall" in twin.remedy
    assert explain(CONFIG, "cpu").backend == "good"
    with pytest.raises(BackendUnavailableError, match="duplicate"):
        explain(CONFIG, "cpu", backend="twin")


@pytest.mark.parametrize("name", ["cpu", "cuda", "tpu"])
def test_a_built_in_name_stays_with_its_owner(
    name: str, distribute: Distribute, caplog: pytest.LogCaptureFixture
) -> None:
    before = {status.name: status for status in backends()}[name]
    module = distribute(name, "raise AssertionError('imported')", dist="thief-dist")
    with caplog.at_level(logging.WARNING, logger="moe_core"):
        (after,) = [status for status in backends() if status.name == name]
    assert after == before
    assert "thief-dist" in caplog.text
    assert_not_imported(module)


def test_the_reference_cannot_be_replaced(distribute: Distribute) -> None:
    module = distribute("reference", healthy("reference", priority=99), dist="thief-dist")
    statuses = {status.name: status for status in backends()}
    assert statuses["reference"].status == "ok"
    assert statuses["reference"].priority == 0
    (thief,) = [status for name, status in statuses.items() if "thief-dist" in name]
    assert thief.status == "broken"
    assert_not_imported(module)
    assert explain(CONFIG, "cpu", backend="reference").backend == "reference"


def test_the_same_distribution_found_twice_is_one(distribute: Distribute, monkeypatch: pytest.MonkeyPatch) -> None:
    distribute("toy", healthy("toy"))
    monkeypatch.setattr(sys, "path", [sys.path[0], *sys.path])
    assert [status.status for status in backends() if status.name == "toy"] == ["ok"]


OBSERVER = """
from moe_core import hookimpl


@hookimpl(wrapper=True)
def moe_experts(plan):
    return (yield)
"""


def test_an_observer_is_listed_and_never_a_candidate(distribute: Distribute) -> None:
    distribute("watcher", OBSERVER)
    status = {status.name: status for status in backends()}["watcher"]
    assert status.status == "observer"
    assert "moe_experts" in status.reason
    assert explain(CONFIG, "cpu", dtype=torch.float32).candidate("watcher") is None
    with pytest.raises(UnknownBackendError, match="watcher"):
        explain(CONFIG, "cpu", backend="watcher")


def test_a_new_distribution_is_found_without_a_restart(distribute: Distribute) -> None:
    assert "late" not in {status.name for status in backends()}
    distribute("late", healthy("late"))
    assert "late" in {status.name for status in backends()}


def assert_not_imported(module: str) -> None:
    assert module not in sys.modules
