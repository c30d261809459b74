"""Environments and what runs in them; the rows are data, ci/matrix.toml. CI calls nothing else.

nox                     lint and the rows that need only torch for the CPU
nox -s "row(tpu)"       one row
nox -R -s "row(cpu)"    again, in the environment that is there
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import time
from pathlib import Path
from types import ModuleType

import nox

ROOT = Path(__file__).resolve().parent
LINT_CONSTRAINTS = "ci/constraints-torch213.txt"


def _load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_matrix", ROOT / "ci" / "run_matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNNER = _load_runner()
ROWS = RUNNER.matrix()["row"]

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", *(f"row({name})" for name, row in ROWS.items() if not row["heavy"]), "table"]


def _wheel(session: nox.Session) -> str:
    """The wheel of this tree, built once for all rows: its folder is named by what is in it."""
    sources = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for folder in ("moe_core", "backends"):
        sources += sorted(path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    digest = hashlib.sha256()
    for path in sources:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    folder = ROOT / "build" / "ci" / f"wheel-{digest.hexdigest()[:12]}"
    if not list(folder.glob("*.whl")):
        # setuptools leaves modules that are long gone in build/lib, and would pack them again.
        shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
        session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), ".")
    return str(next(folder.glob("*.whl")))


@nox.session
def lint(session: nox.Session) -> None:
    """ruff's rules, ruff's format, mypy on moe_core."""
    started = time.time()
    RUNNER.record("lint", state="red", detail="did not finish")
    session.install("-c", LINT_CONSTRAINTS, f"{_wheel(session)}[test,transformers]", "ruff", "mypy")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    RUNNER.record("lint", state="green", seconds=round(time.time() - started))


@nox.session
@nox.parametrize("name", [nox.param(name, id=name) for name in ROWS])
def row(session: nox.Session, name: str) -> None:
    """Install the wheel and a row's packages, then ci/run_matrix.py."""
    started = time.time()
    RUNNER.record(name, state="red", detail="did not install")
    chosen = ROWS[name]
    session.install("-c", chosen["constraints"], f"{_wheel(session)}[{','.join(chosen['extras'])}]")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-P", "ci/run_matrix.py", "row", name, f"--started={started}")


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """What is known of every row: green, red, pending or not run."""
    if RUNNER.print_table():
        session.error("a row is red")
