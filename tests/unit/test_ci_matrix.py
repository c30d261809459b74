"""ci/matrix.toml names what exists: every backend has a row, every kernel test is run by one, pins lie in ranges."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
ROWS: list[dict[str, Any]] = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())["row"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IPEX = "intel_extension_for_pytorch"


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """ci/run_matrix.py with an empty folder of results."""
    spec = importlib.util.spec_from_file_location("run_matrix", ROOT / "ci" / "run_matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def pins(name: str) -> dict[str, str]:
    """Distribution -> exact version of a constraints file and of those that it includes."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-c "):
            found |= pins(str(Path(name).parent / line.removeprefix("-c ")))
        elif line and not line.startswith("#"):
            distribution, version = line.split("==")
            found[distribution] = version
    return found


def test_every_backend_has_a_row() -> None:
    entries = importlib.metadata.distribution("moe-core").entry_points
    built_in = {entry.name for entry in entries if entry.group == "moe_core.backends"}
    assert {row["backend"] for row in ROWS} == built_in | {"reference"}


def test_every_kernel_test_has_a_row() -> None:
    run = {path for row in ROWS for path in row["tests"]}
    assert {f"kernels/{path.name}" for path in (ROOT / "tests" / "kernels").glob("[!_]*") if path.is_dir()} <= run


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_pins_lie_in_the_ranges(row: dict[str, Any]) -> None:
    pinned = pins(row["constraints"])
    assert pinned["torch"].startswith(row["torch"] + ".")
    wanted = [*PROJECT["dependencies"]]
    for extra in row["extras"]:
        wanted += PROJECT["optional-dependencies"][extra]
    for text in wanted:
        requirement = Requirement(text)
        pin = pinned.get(requirement.name)
        assert pin is None or requirement.specifier.contains(pin), f"{text} excludes {pin}"


def test_the_workflow_is_written_from_the_matrix() -> None:
    """The committed workflow is what ci/workflow.py writes, with a job a row and labels where a row needs a device."""
    command = [sys.executable, "-P", str(ROOT / "ci" / "workflow.py")]
    written = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8") == written
    for row in ROWS:
        runner = f"[{', '.join(row['runner'])}]" if "runner" in row else "ubuntu-latest"
        job = written.split(f"\n  {row['name']}:\n")[1].split("\n\n")[0]
        assert f"runs-on: {runner}\n" in job and f'nox -s "row({row["name"]})"' in job


def test_a_row_without_its_machine_is_not_run_and_says_what_it_needs(
    runner: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = {row["name"]: row["runner"] for row in ROWS if "runner" in row}
    assert labelled
    runner.print_table()
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    monkeypatch.setattr(runner.sys, "argv", ["run_matrix.py", "heavy"])
    runner.main()
    ran_here = capsys.readouterr().out.split()
    for name, labels in labelled.items():
        assert "not run" in shown[name] and ", ".join(labels) in shown[name]
        assert name not in ran_here


def test_only_what_ran_is_green(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    runner.record("cpu", state="green", passed=3)
    runner.record("tpu", state="pending", passed=3, detail="backend has no stages yet")
    assert runner.print_table() == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "green" in shown["cpu"]
    assert "pending: backend has no stages yet" in shown["tpu"]
    assert "not run" in shown["cuda"]
    runner.record("cuda", state="red")
    assert runner.print_table() == 1


@pytest.mark.parametrize(
    ("name", "stages", "imported", "fails", "state"),
    [
        ("tpu", ["experts"], "", None, "green"),
        ("tpu", [], "", None, "pending"),
        ("tpu", [], "", "tests", "red"),
        ("tpu", [], "", "wheel", "red"),
        ("tpu", ["experts"], "", "doctor", "red"),
        ("cpu-ipex", ["experts"], "", None, "pending"),
        ("cpu-ipex", ["experts"], IPEX, None, "green"),
    ],
)
def test_the_state_of_a_row(
    runner: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    stages: list[str],
    imported: str,
    fails: str | None,
    state: str,
) -> None:
    """The steps are made up; what counts is how their outcomes add up."""
    ran: list[str] = []
    commands: list[list[str]] = []

    def run(step: str, command: list[str], env: dict[str, str], *, capture: bool = False) -> str:
        ran.append(step)
        commands.append(command)
        if runner.PYTEST in command:
            (tmp_path / f"{step}.xml").write_text('<testsuite tests="5" skipped="2" failures="0" errors="0"/>')
            (tmp_path / f"{step}.modules").write_text(imported)
        if fails and fails in step:
            raise runner.Red(f"{step}: exit 1")
        return json.dumps([{"name": "tpu", "stages": stages}, {"name": "cpu", "stages": stages}]) if capture else ""

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner.sys, "prefix", str(tmp_path))
    assert runner.run_row(name, 0.0) == (state == "red")
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["state"] == state
    if fails is None:
        assert result["passed"] >= 3
        assert ran[:4] == ["wheel", "list", "doctor", f"{name}-tests"]
        kit = [command for step, command in zip(ran, commands, strict=True) if step == f"{name}-kit"]
        assert len(kit) == bool(stages), "the kit runs as soon as there is a stage"
        for command in kit:
            backend = next(row["backend"] for row in ROWS if row["name"] == name)
            assert {f"--moe-backend={backend}", "--require-backend"} <= set(command)
