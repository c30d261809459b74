"""The native kernel on huge and on small pages as peers, for what doctor says of them. From a checkout, on Linux:

PYTHONPATH=.:backends python -m moe_core.bench --adapter benchmarks/cpu_pages.py --plugin cpu=moe_cpu.plugin \
    --backends none --peers pages/huge,pages/small --stages experts --json out.json
"""

from __future__ import annotations

from unittest import mock

from moe_core.bench import registry
from moe_core.bench.registry import Adapter, Built, Problem


def build(problem: Problem, pages: str) -> Built:
    """moe_core, with the wish for huge pages or without."""
    if pages == "huge":
        return registry.moe_core_runner(problem, "cpu")
    with mock.patch("moe_cpu.native.kernel.ask_for_huge_pages"):
        return registry.moe_core_runner(problem, "cpu")


for name in ("huge", "small"):
    registry.register(Adapter(f"pages/{name}", build, ("cpu",), copies=1.0, option=name))
