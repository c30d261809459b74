"""examples/moe_toy as a stranger would use it: both wheels built, installed into a clean environment, found and tested.

torch and pytest are borrowed from the running interpreter, so that nothing large is installed; moe_core, the toy and
their metadata come from the two wheels alone.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tokenize
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "examples" / "moe_toy"
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
LAYER = """
import json, sys, torch
from moe_core import MoEConfig, MoELayer, MoERunner
layer = MoELayer(MoEConfig(32, 24, 8, 2), backend=sys.argv[1] or None)
x = torch.randn(5, 32)
with torch.no_grad():
    error = (layer(x) - MoERunner(layer.config, layer.weights(), backend="reference")(x)).abs().max()
print(json.dumps([layer.report.backend, layer.report.stages["experts"], layer.report.stages["gate"], float(error)]))
"""


def without_numbers(text: str) -> str:
    """New cases come, and with them other counts."""
    return re.sub(r"\s*\d+", " 0", text)


class Environment:
    """A virtual environment with the two wheels in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of the environment, from a folder without sources."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MOE_CORE"))}
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env={**ours, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    sources, wheels = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (sources / name).write_bytes((ROOT / name).read_bytes())
    for name in ("moe_core", "backends"):
        shutil.copytree(ROOT / name, sources / name, ignore=IGNORED)
    toy = shutil.copytree(TOY, tmp_path_factory.mktemp("toy") / "moe_toy", ignore=IGNORED)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(sources), str(toy)], check=True)
    clean = Environment(tmp_path_factory.mktemp("environment") / "clean")
    venv.create(clean.folder, with_pip=False)
    built = [str(wheel) for wheel in wheels.glob("*.whl")]
    python = str(clean.bin / "python")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", *built], check=True)
    site = next(clean.folder.glob("lib/python*/site-packages"))
    # Behind the environment's own packages: what is installed in both comes from the wheels.
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return clean


def test_the_toy_is_at_most_80_lines_of_code() -> None:
    text = (TOY / "moe_toy.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in kinds]
    assert len({t.start[0] for t in tokens}) <= 80
    imported = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {node.module for node in imported} == {"__future__", "typing", "moe_core"}, "nothing heavy at the top"


def test_everything_comes_from_the_wheels(environment: Environment) -> None:
    code = "import moe_core, moe_toy, moe_cpu; print(moe_core.__file__, moe_toy.__file__, moe_cpu.__file__, sep='\\n')"
    for path in environment.run("python", "-c", code).stdout.splitlines():
        assert Path(path).is_relative_to(environment.folder), path


def test_it_is_listed_with_its_distribution(environment: Environment) -> None:
    assert "toy" in environment.run("moe-core", "list").stdout
    listed = json.loads(environment.run("moe-core", "list", "--json").stdout)
    (toy,) = [status for status in listed if status["name"] == "toy"]
    assert toy["status"] == "ok"
    assert toy["origin"] == "moe-toy"
    assert toy["stages"] == ["experts"]


@pytest.mark.parametrize(
    ("argument", "variables", "expected"),
    [
        ("toy", {}, "toy"),
        ("", {"MOE_CORE_BACKEND": "toy"}, "toy"),
        ("", {"MOE_CORE_DISABLE": "cpu,cuda,tpu"}, "toy"),  # the highest priority that is left
        ("", {"MOE_CORE_DISABLE": "cpu,cuda,tpu,toy"}, "reference"),
    ],
    ids=["by name", "by variable", "by priority", "disabled"],
)
def test_it_is_chosen(environment: Environment, argument: str, variables: dict[str, str], expected: str) -> None:
    quiet = {"PYTHONWARNINGS": "ignore::UserWarning", **variables}
    backend, experts, gate, error = json.loads(environment.run("python", "-c", LAYER, argument, **quiet).stdout)
    assert (backend, experts, gate) == (expected, expected, "reference")
    assert error < 1e-5


def test_doctor_passes_it(environment: Environment) -> None:
    assert "toy" in environment.run("moe-core", "doctor").stdout


def test_its_authors_tests_pass(environment: Environment) -> None:
    shutil.copy(TOY / "test_moe_toy.py", environment.folder)
    few = ["-k", "test_usable or test_experts"]  # the next test runs them all
    done = environment.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *few, "test_moe_toy.py")
    assert " passed" in done.stdout and "failed" not in done.stdout
    assert "toy says no: experts: zero experts are not written (set config.zero_expert_num=0)" in done.stdout


def test_the_installed_kit_passes(environment: Environment) -> None:
    kit = ["-p", "moe_core.testing.pytest_plugin", "--pyargs", "moe_core.testing", "-p", "no:cacheprovider", "-q"]
    done = environment.run("python", "-m", "pytest", *kit, "--moe-backend=toy", "--require-backend")
    lines = done.stdout.splitlines()
    (start,) = [at for at, line in enumerate(lines) if line.startswith("moe_core conformance of toy")]
    assert lines[start].endswith(" 0 failed")
    readme = without_numbers((TOY / "README.md").read_text(encoding="utf-8"))
    for line in lines[start:-1]:
        assert without_numbers(line) in readme, "the README shows another green run"
