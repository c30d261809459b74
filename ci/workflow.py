"""The GitHub Actions workflow, written from ci/matrix.toml so that the two cannot disagree.

    python ci/workflow.py > .github/workflows/ci.yml

A job a row: those without labels on a hosted machine, the others on the self-hosted machines that carry their labels,
and only where the repository says that it has such machines (its variable MOE_CORE_RUNNERS names their labels).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from run_matrix import matrix

HEAD = """\
# Written by ci/workflow.py from ci/matrix.toml: change those, then run python ci/workflow.py > .github/workflows/ci.yml
name: ci
on:
  push:
    branches: [main]
  pull_request:
permissions:
  contents: read
jobs:
"""
JOB = """\
  {name}:
{condition}    runs-on: {runner}
    timeout-minutes: {minutes}
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
      - run: python -m pip install -c {constraints} nox
      - run: nox -s "{session}"
"""


def job(name: str, session: str, row: dict[str, Any]) -> str:
    """One job; a row with labels is skipped where the repository has no such machine, and shown as skipped."""
    labels = row["runner"]
    condition = f"    if: contains(vars.MOE_CORE_RUNNERS, '{labels[-1]}')\n" if labels else ""
    return JOB.format(
        name=name,
        session=session,
        condition=condition,
        runner=f"[{', '.join(labels)}]" if labels else "ubuntu-latest",
        minutes=45 if row["heavy"] else 20,
        constraints="ci/constraints-tools.txt",
    )


def workflow() -> str:
    """The whole file."""
    jobs = [job("lint", "lint", {"runner": [], "heavy": False})]
    jobs += [job(name, f"row({name})", row) for name, row in matrix()["row"].items()]
    return HEAD + "\n".join(jobs)


if __name__ == "__main__":
    sys.stdout.write(workflow())
