"""Shows that tests/gpu/test_streams.py would notice: without fork, join, keep_alive or hold, its tests fail.

Each is taken away in a process of its own, by replacing the one-line function of moe_core.streams with nothing.

    PYTHONPATH=.:backends python tests/gpu/prove_streams.py [--log FILE]

Exits 0 if all tests pass as the code is, and each mutation fails the tests that are named after it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).with_name("test_streams.py")
MUTATIONS = {
    "fork": lambda main, side: None,
    "join": lambda current, done: None,
    "keep_alive": lambda tensor, stream: None,
    "hold": lambda tensor: None,
}
MARK = "outcomes: "


class Outcomes:
    """Collects what became of each test."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The call, or a set-up that did not get so far."""
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid.split("::")[-1]] = report.outcome


def run_tests(without: str) -> int:
    """The child: take one function away, run the tests, print their outcomes."""
    import pytest

    from moe_core import streams

    if without != "nothing":
        assert hasattr(streams, without)
        setattr(streams, without, MUTATIONS[without])
    found = Outcomes()
    code = pytest.main([str(TESTS), "-q", "-p", "no:cacheprovider", "-W", "default", "--tb=line"], plugins=[found])
    print(MARK + json.dumps(found.of))
    return int(code)


def outcomes_of(without: str) -> tuple[dict[str, str], str]:
    """The outcomes in a fresh process, and all that it printed."""
    command = [sys.executable, __file__, "--without", without]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        return {}, f"did not finish: {error}"
    text = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return (json.loads(lines[-1].removeprefix(MARK)) if lines else {}), text


def judge(without: str, outcomes: dict[str, str]) -> tuple[bool, str]:
    """Whether this run shows what it should, and in one line what it shows."""
    failed = sorted(name for name, outcome in outcomes.items() if outcome == "failed")
    passed = [name for name, outcome in outcomes.items() if outcome == "passed"]
    if without == "nothing":
        ok = bool(passed) and len(passed) == len(outcomes)
        return ok, f"as it is: {len(passed)} of {len(outcomes)} tests pass"
    named = sorted(name for name in outcomes if name.startswith(f"test_{without}_"))
    missed = [name for name in named if name not in failed]
    ok = bool(named) and not missed
    return ok, f"without {without}: failed {', '.join(failed) or 'nothing'}" + (
        f"; NOT NOTICED by {', '.join(missed)}" if missed else ""
    )


def main() -> int:
    """The parent: one child for the code as it is, one for each mutation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without", choices=["nothing", *MUTATIONS], help="run the tests with this taken away")
    parser.add_argument("--log", type=Path, help="write what every run printed here")
    arguments = parser.parse_args()
    if arguments.without:
        return run_tests(arguments.without)
    all_ok, log = True, []
    for without in ("nothing", *MUTATIONS):
        outcomes, text = outcomes_of(without)
        ok, line = judge(without, outcomes)
        all_ok &= ok
        verdict = f"{'ok  ' if ok else 'BAD '} {line}"
        print(verdict, flush=True)
        log.append(f"=== {verdict}\n{text}")
    if arguments.log:
        arguments.log.write_text("\n".join(log))
    print("each of the four is needed, and noticed when it is gone" if all_ok else "not proved")
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
