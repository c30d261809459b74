"""The console script: what it prints for people and for programs, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

from moe_core import BackendInfo, ExpertsOut, Verdict, backends, hookimpl, plugins, reference
from moe_core.cli import app


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def wrong():
    """A backend whose experts are half of what they should be, and with the highest priority."""

    @hookimpl
    def moe_backend_info():
        return BackendInfo(name="wrong", priority=99)

    @hookimpl
    def moe_probe(platform):
        return Verdict.yes()

    @hookimpl
    def moe_experts(plan, hidden_states, routing):
        return ExpertsOut(reference.moe_experts(plan, hidden_states, routing).value / 2, False)

    plugin = ModuleType("wrong")
    vars(plugin).update(moe_backend_info=moe_backend_info, moe_probe=moe_probe, moe_experts=moe_experts)
    plugins.register(plugin, "wrong")
    yield
    plugins.unregister("wrong")


def test_list_names_every_backend_with_its_state() -> None:
    out = run("list")
    for status in backends():
        row = next(line for line in out.splitlines() if line.split()[:1] == [status.name])
        assert status.status in row
    assert [entry["name"] for entry in json.loads(run("list", "--json"))] == [status.name for status in backends()]


def test_explain_prints_the_report() -> None:
    out = run("explain", "--dtype", "float32", "--device", "cpu", "--shared-intermediate-size", "64")
    assert out.startswith("backend: ") and "stages: gate=" in out and "shared_experts=" in out
    report = json.loads(run("explain", "--dtype", "float32", "--device", "cpu", "--json"))
    assert out.startswith(f"backend: {report['backend']} ")
    assert {candidate["name"] for candidate in report["candidates"]} >= {"reference"}


def test_explain_fails_with_the_reasons_when_the_one_asked_for_cannot_run() -> None:
    missing = next(status for status in backends() if status.status == "unavailable")
    result = CliRunner().invoke(app, ["explain", "--device", "cpu", "--backend", missing.name])
    assert result.exit_code == 1
    assert missing.reason in result.output and missing.remedy in result.output
    failed = json.loads(run("explain", "--device", "cpu", "--backend", missing.name, "--json", code=1))
    assert "never substituted" in failed["error"] and failed["report"]["backend"] == ""


def test_explain_refuses_an_impossible_config() -> None:
    result = CliRunner().invoke(app, ["explain", "--num-experts", "4", "--top-k", "5"])
    assert result.exit_code == 1 and "top_k=5" in result.output


def test_doctor_passes_here_and_expects() -> None:
    report = json.loads(run("doctor", "--json"))
    assert report["ok"] and report["automatic"]
    assert all(check["status"] != "FAIL" for check in report["backends"])
    assert "automatic choice" in run("doctor", "--expect", report["automatic"])
    assert "expected no_such" in run("doctor", "--expect", "no_such", code=1)


@pytest.mark.usefixtures("wrong")
def test_doctor_exits_1_on_a_wrong_backend() -> None:
    out = run("doctor", code=1)
    row = next(line for line in out.splitlines() if "wrong" in line)
    assert "FAIL" in row and "relative error" in row and "MOE_CORE_DISABLE=wrong" in row
    checks = {check["backend"]: check for check in json.loads(run("doctor", "--json", code=1))["backends"]}
    assert checks["wrong"]["status"] == "FAIL" and checks["reference"]["status"] == "pass"


def test_the_module_is_the_console_script() -> None:
    command = [sys.executable, "-m", "moe_core", "list", "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert {entry["name"] for entry in json.loads(out)} >= {"reference"}


def test_tune_hands_the_command_line_to_the_backend() -> None:
    """And its exit code back; a backend without the hook, or an unknown one, is a message with the able ones."""
    seen: list[list[str]] = []

    @hookimpl
    def moe_backend_info():
        return BackendInfo(name="tunable", priority=1)

    @hookimpl
    def moe_tune(arguments):
        seen.append(arguments)
        return 3

    plugin = ModuleType("tunable")
    vars(plugin).update(moe_backend_info=moe_backend_info, moe_tune=moe_tune)
    plugins.register(plugin, "tunable")
    try:
        run("tune", "tunable", "--shape", "1,2", "--help", code=3)
        assert seen == [["--shape", "1,2", "--help"]]
        for name, why in (("reference", "has nothing to tune"), ("nobody", "is unknown")):
            result = CliRunner().invoke(app, ["tune", name])
            assert result.exit_code == 2 and why in result.output and "tunable" in result.output
    finally:
        plugins.unregister("tunable")
