"""MOE_CORE_DISABLE and MOE_CORE_BACKENDS_ONLY act before import: what they block never runs a line."""

from __future__ import annotations

import logging
import sys

import pytest

from moe_core import MoEConfig, backends, explain
from moe_core.errors import BackendUnavailableError

from .conftest import Distribute, healthy

CONFIG = MoEConfig(32, 24, 8, 2)
DEADLY = "import os\nos._exit(42)\n"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MOE_CORE_DISABLE", "deadly"), ("MOE_CORE_DISABLE", " cuda , deadly "), ("MOE_CORE_BACKENDS_ONLY", "good,cpu")],
)
def test_a_blocked_plugin_is_never_imported(
    variable: str, value: str, distribute: Distribute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    module = distribute("deadly", DEADLY)
    distribute("good", healthy("good", priority=80))
    status = {status.name: status for status in backends()}["deadly"]
    assert status.status == "disabled"
    assert variable in status.reason
    assert variable in status.remedy
    assert module not in sys.modules
    assert explain(CONFIG, "cpu").backend == "good"
    with pytest.raises(BackendUnavailableError, match=variable):
        explain(CONFIG, "cpu", backend="deadly")
    assert module not in sys.modules


def test_only_leaves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_BACKENDS_ONLY", "cuda")
    assert explain(CONFIG, "cpu").backend == "reference"
    assert {status.name: status.status for status in backends()}["cpu"] == "disabled"


def test_a_built_in_backend_can_be_disabled_and_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_DISABLE", "cpu")
    assert explain(CONFIG, "cpu").candidate("cpu").status == "disabled"
    monkeypatch.delenv("MOE_CORE_DISABLE")
    assert explain(CONFIG, "cpu").candidate("cpu").status != "disabled"


@pytest.mark.parametrize("variable", ["MOE_CORE_DISABLE", "MOE_CORE_BACKENDS_ONLY"])
def test_a_name_that_nobody_registered_is_not_passed_over(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "cpuu,cpu")
    with caplog.at_level(logging.WARNING, logger="moe_core"):
        backends()
    assert f"{variable} names 'cpuu'" in caplog.text
    assert "known: cpu, cuda" in caplog.text
