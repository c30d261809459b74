"""Options and a summary for the kit as an installed package.

    pytest -p moe_core.testing.pytest_plugin --pyargs moe_core.testing --moe-backend=toy --require-backend

It is not registered with pytest: other people's test runs must not import torch. A run ends with what it was worth, as
in the README of examples/moe_toy: how many passed, and the backend's own words for what was skipped.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--moe-backend, --moe-device and --require-backend."""
    group = parser.getgroup("moe_core", "conformance of a moe_core backend")
    group.addoption("--moe-backend", metavar="NAME", help="backend to test, by its registered name")
    group.addoption("--moe-device", metavar="DEVICE", help="where to test it, such as cuda:1; default: what it serves")
    group.addoption("--require-backend", action="store_true", help="fail where the backend cannot be used here")


def pytest_sessionstart(session: pytest.Session) -> None:
    """One error for a backend that nobody registered, or that was required and cannot be used; not one a test."""
    options = session.config.option
    if options.moe_backend:
        from moe_core import backends

        found = {status.name: status for status in backends()}
        status = found.get(options.moe_backend)
        if status is None:
            raise pytest.UsageError(f"--moe-backend={options.moe_backend}: known are {', '.join(sorted(found))}")
        if options.require_backend and status.status != "ok":
            raise pytest.UsageError(
                f"--require-backend: {status.name} is {status.status}: {status.reason}; {status.remedy}"
            )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many tests ran, and the backend's own words for each that did not."""
    name = config.option.moe_backend
    if not name:
        return
    counts = {outcome: terminalreporter.stats.get(outcome, []) for outcome in ("passed", "skipped", "failed", "error")}
    broken = len(counts["failed"]) + len(counts["error"])
    known = len(terminalreporter.stats.get("xfailed", []))
    terminalreporter.write_line(
        f"moe_core conformance of {name}: {len(counts['passed'])} passed, {len(counts['skipped'])} skipped, "
        f"{broken} failed" + (f", {known} expected to fail" if known else "")
    )
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in counts["skipped"])
    for reason, times in reasons.most_common():
        terminalreporter.write_line(f"  {times:3} x {reason}")
