"""Every strategy of the CPU backend as a peer, so that one run compares them. From a checkout, with IPEX 2.8:

PYTHONPATH=.:backends python -m moe_core.bench --adapter benchmarks/cpu_strategies.py --plugin cpu=moe_cpu.plugin \
    --backends none --peers strategy/native,strategy/ipex,strategy/onednn,ipex --stages experts --json out.json
"""

from __future__ import annotations

import os

from moe_core.bench import registry
from moe_core.bench.registry import Adapter, Built, Problem
from moe_cpu import strategies


def build(problem: Problem, name: str) -> Built:
    """moe_core with the strategy that the variable asks for; it is read at bind."""
    before = os.environ.get(strategies.VARIABLE)
    os.environ[strategies.VARIABLE] = name
    try:
        return registry.moe_core_runner(problem, "cpu")
    finally:
        del os.environ[strategies.VARIABLE]
        if before is not None:
            os.environ[strategies.VARIABLE] = before


for name in strategies.STRATEGIES:
    registry.register(Adapter(f"strategy/{name}", build, ("cpu",), copies=1.0, option=name))
