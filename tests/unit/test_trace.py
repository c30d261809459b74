"""trace: what each stage of each layer cost and who served it; nothing of it where nobody asked."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from typer.testing import CliRunner

from moe_core import MoEConfig, MoELayer, MoERunner
from moe_core import trace as trace_
from moe_core.cli import app
from moe_core.plugins import registry
from moe_core.types import STAGES

SCRIPT = """
import torch
from moe_core import MoEConfig, MoELayer
layers = [MoELayer(MoEConfig(16, 8, 4, 2, shared_intermediate_size=8), backend="reference") for _ in range(2)]
with torch.no_grad():
    for tokens in (3, 5):
        x = torch.randn(tokens, 16)
        for layer in layers:
            x = layer(x)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["trace", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_every_layer_and_stage_with_backend_function_time_and_tokens(script, tmp_path) -> None:
    chrome = tmp_path / "timeline.json"
    out = run("--json", "--chrome", str(chrome), "--", sys.executable, str(script))
    rows = json.loads(out)["stages"]
    assert {(row["layer"], row["stage"]) for row in rows} == {(layer, stage) for layer in (0, 1) for stage in STAGES}
    for row in rows:
        assert row["backend"] == "reference" and row["function"] == f"moe_core.reference.moe_{row['stage']}"
        assert row["calls"] == 2 and row["tokens"] == 8 and 0 < row["median_us"] <= row["total_us"]
    events = [event for event in json.loads(chrome.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * 2 * len(STAGES) and all(event["ts"] >= 0 and event["dur"] > 0 for event in events)


def test_a_table_for_people(script) -> None:
    lines = run("--", sys.executable, str(script)).splitlines()
    assert lines[0].split()[:3] == ["layer", "stage", "backend"]
    assert any(line.split()[:5] == ["1", "experts", "reference", "2", "8"] for line in lines)


def test_the_exit_code_of_the_command_is_passed_on(tmp_path) -> None:
    assert "no stage ran" in run("--", sys.executable, "-c", "import sys; sys.exit(3)", code=3)
    result = CliRunner().invoke(app, ["trace", "--", str(tmp_path / "missing")])
    assert result.exit_code == 127 and "missing" in result.output


def test_off_it_is_not_there(config: MoEConfig, layer: MoELayer) -> None:
    """Without MOE_CORE_TRACE no stage is wrapped: the bound functions are the backend's own."""
    assert not any(registry().wrappers_of(f"moe_{stage}") for stage in STAGES)
    before = len(trace_.recorded()["calls"])
    with torch.no_grad():
        MoERunner(config, layer.weights())(torch.randn(3, config.hidden_size))
    assert len(trace_.recorded()["calls"]) == before


def test_in_process_and_in_torch_profiler(monkeypatch, config: MoEConfig, layer: MoELayer) -> None:
    monkeypatch.setenv("MOE_CORE_TRACE", "1")
    trace_.clear()
    runner = MoERunner(config, layer.weights(), backend="reference")
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        runner(torch.randn(3, config.hidden_size))
    assert [call["stage"] for call in trace_.recorded()["calls"]] == ["shared_experts", "gate", "experts", "reduce"]
    names = {event.key for event in profile.key_averages()}
    assert {f"moe_core::{stage}" for stage in STAGES} <= names
    trace_.clear()


def test_what_does_not_fit_is_counted(monkeypatch) -> None:
    monkeypatch.setattr(trace_, "LIMIT", 2)
    trace_.clear()
    for _ in range(5):
        trace_.add(trace_.StageCall(0, "gate", "b", "f", 1, 0.0, 1e-6))
    assert len(trace_.recorded()["calls"]) == 2 and trace_.recorded()["left_out"] == 3
    trace_.clear()


def test_importing_it_costs_no_profiler() -> None:
    """torch imports its profiler itself; the observer must not add an import to those who never trace."""
    code = "import sys, moe_core; sys.exit('moe_core.observe' in sys.modules)"
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
