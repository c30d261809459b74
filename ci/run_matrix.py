"""One row of ci/matrix.toml, run by the Python of that row's environment, and the table of all rows.

    python ci/run_matrix.py row NAME     where moe_core comes from, doctor, the tests; writes build/ci/NAME.json
    python ci/run_matrix.py table        prints every row's last result; exit 1 when one is red
    python ci/run_matrix.py heavy        the names of the heavy rows that any machine can run, one a line

Standard library only: the environment under test holds what a user's would, and nothing for CI's sake.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

CI = Path(__file__).resolve().parent
TESTS = CI.parent / "tests"
RESULTS = CI.parent / "build" / "ci"
STEP_SECONDS = 1800  # for a step that hangs; each test has 300 s of its own
COLUMNS = ("row", "backend", "torch", "state", "passed", "skipped", "seconds", "MB", "ended", "detail")
# -P: a row tests the installed wheel, so the checkout must not get onto sys.path.
PYTHON = (sys.executable, "-P")
WHERE = """
import importlib, sys
for name in ("moe_core", "moe_cpu", "moe_cuda", "moe_tpu"):
    found = importlib.import_module(name).__file__
    assert found.startswith(sys.argv[1]), f"{name} comes from {found}, not from the installed wheel in {sys.argv[1]}"
"""
PYTEST = """
import pytest, sys
code = pytest.main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    print(*sys.modules, sep="\\n", file=file)
sys.exit(code)
"""
# The tests are many and small: a process a core, one thread in each. The kit's, afterwards, are not spread unless the
# row says so: what it imports shows what the row is there for, and it uses all threads.
CORES = f"-n{os.cpu_count() or 1}"
SPREAD = (CORES, "--dist=loadscope")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SEES_GPU = "import torch, sys; sys.exit(not torch.cuda.is_available())"
HAS_AVX512 = "import torch, sys; sys.exit('AVX512' not in torch.backends.cpu.get_cpu_capability())"


class Red(Exception):
    """A step failed; the text says which."""


def matrix() -> dict[str, Any]:
    """ci/matrix.toml with its defaults filled in; ``row`` becomes a mapping by name."""
    read = tomllib.loads((CI / "matrix.toml").read_text(encoding="utf-8"))
    defaults = {"heavy": False, "spread_kit": False, "env": {}, "without_gpu": {}, "doctor_env": {}, "core": True}
    defaults |= {"uses": "", "ignore": [], "runner": [], "avx512_kit_env": {}}
    read["row"] = {row["name"]: {**defaults, **row} for row in read["row"]}
    return read


def record(name: str, **fields: Any) -> None:
    """Keep a result for the table. A row is red until it has said otherwise, however it dies."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"row": name, "ended": time.strftime("%H:%M:%S"), **fields}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(step: str, command: list[str], env: dict[str, str], *, capture: bool = False) -> str:
    """Run one step from tests/, where no package of ours lies, not even for a child's `python -c`."""
    print(
        f"-- {step}"
        + (
            f": {' '.join(command[5:])}"
            if PYTEST in command
            else ""
            if "-c" in command
            else f": {' '.join(command[2:])}"
        ),
        flush=True,
    )
    try:
        done = subprocess.run(
            command,
            cwd=TESTS,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            timeout=STEP_SECONDS,
            check=False,
            stdout=subprocess.PIPE if capture else None,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise Red(f"{step}: more than {STEP_SECONDS} s") from None
    if done.returncode:
        raise Red(f"{step}: exit {done.returncode}")
    return done.stdout or ""


def stages_of(backend: str, env: dict[str, str]) -> list[str]:
    """What the backend offers, by its own account, usable here or not."""
    out = run("list", [*PYTHON, "-m", "moe_core", "list", "--json"], env, capture=True)
    for status in json.loads(out[out.index("[") :]):
        if status["name"] == backend:
            return list(status["stages"])
    raise Red(f"list: no backend {backend}")


def run_pytest(step: str, arguments: list[str], env: dict[str, str], counts: dict[str, int]) -> set[str]:
    """Run pytest and add what it did to ``counts``, also when it fails; the modules that it imported."""
    report, modules = RESULTS / f"{step}.xml", RESULTS / f"{step}.modules"
    RESULTS.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    modules.unlink(missing_ok=True)
    always = ["-q", "-p", "no:cacheprovider", "--timeout=300", f"--junitxml={report}"]
    try:
        run(step, [*PYTHON, "-c", PYTEST, str(modules), *always, *arguments], env)
    finally:
        if report.exists():
            for suite in ET.parse(report).iter("testsuite"):
                count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
                counts["skipped"] += count["skipped"]
                counts["passed"] += count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    return set(modules.read_text(encoding="utf-8").split()) if modules.exists() else set()


def run_steps(row: dict[str, Any], core: list[str], counts: dict[str, int]) -> str:
    """All steps of a row; why it is pending, or nothing where it is green."""
    env = dict(row["env"])
    site = str(Path(sysconfig.get_path("purelib")))
    run("wheel", [*PYTHON, "-c", WHERE, site], env)
    if row["without_gpu"] and subprocess.run([*PYTHON, "-c", SEES_GPU], cwd=TESTS, check=False).returncode:
        env.update(row["without_gpu"])
    doctor = [*PYTHON, "-m", "moe_core", "doctor"]
    paths = [path for path in core if (TESTS / path).exists()]
    if not stages_of(row["backend"], env):
        run("doctor", doctor, env)
        run_pytest(f"{row['name']}-tests", [*SPREAD, *paths], {**env, **ONE_THREAD}, counts)
        return "backend has no stages yet"
    run("doctor", [*doctor, "--expect", row["backend"]], {**env, **row["doctor_env"]})
    paths = (paths if row["core"] else []) + [path for path in row["tests"] if (TESTS / path).exists()]
    paths = [*SPREAD, *paths, *(f"--ignore={path}" for path in row["ignore"])]
    imported = run_pytest(f"{row['name']}-tests", paths, {**env, **ONE_THREAD}, counts)
    kit = ["-p", "moe_core.testing.pytest_plugin", "--pyargs", "moe_core.testing"]
    kit += [f"--moe-backend={row['backend']}", "--require-backend"]
    if row["avx512_kit_env"] and not subprocess.run([*PYTHON, "-c", HAS_AVX512], cwd=TESTS, check=False).returncode:
        env.update(row["avx512_kit_env"])
    if row["spread_kit"]:  # one class, so by test
        kit, env = [CORES, "--dist=load", *kit], {**env, **ONE_THREAD}
    imported |= run_pytest(f"{row['name']}-kit", kit, env, counts)
    return f"nothing uses {row['uses']} yet" if row["uses"] and row["uses"] not in imported else ""


def run_row(name: str, started: float) -> int:
    """Run a row and record its result; the exit code."""
    read = matrix()
    row, counts = read["row"][name], {"passed": 0, "skipped": 0}
    try:
        detail = run_steps(row, read["core"], counts)
        state = "pending" if detail else "green"
        if not counts["passed"]:
            state, detail = "red", "no test ran"
    except Red as failed:
        state, detail = "red", str(failed)
    except Exception as failed:  # the table must not lose a row to a bug of its runner
        state, detail = "red", f"{type(failed).__name__}: {failed}"
    megabytes = sum(path.lstat().st_size for path in Path(sys.prefix).rglob("*")) >> 20
    record(name, state=state, detail=detail, seconds=round(time.time() - started), MB=megabytes, **counts)
    print(f"-- {name}: {state} {detail}", flush=True)
    return int(state == "red")


def not_run(row: dict[str, Any]) -> dict[str, str]:
    """The result of a row without one, and why."""
    needs = row.get("runner")
    return {"state": "not run", "detail": f"needs a machine with the labels {', '.join(needs)}" if needs else ""}


def print_table() -> int:
    """Print what is known of every row; 1 when one is red. Nothing that has not run is called green."""
    rows, red = [COLUMNS], False
    lint = {"lint": {"backend": "-", "torch": "-"}}
    for name, row in (lint | matrix()["row"]).items():
        path = RESULTS / f"{name}.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else not_run(row)
        red |= result["state"] == "red"
        shown = {"row": name, "backend": row["backend"], "torch": row["torch"], **result}
        if shown["state"] == "pending":
            shown |= {"state": f"pending: {shown['detail']}", "detail": ""}
        rows.append(tuple(str(shown.get(column, "")) for column in COLUMNS))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return int(red)


def main() -> int:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    row = commands.add_parser("row")
    row.add_argument("name", choices=list(matrix()["row"]))
    row.add_argument("--started", type=float, default=time.time(), help="when its installation began")
    commands.add_parser("table")
    commands.add_parser("heavy")
    asked = parser.parse_args()
    if asked.command == "row":
        return run_row(asked.name, asked.started)
    if asked.command == "table":
        return print_table()
    print("\n".join(name for name, row in matrix()["row"].items() if row["heavy"] and not row["runner"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
