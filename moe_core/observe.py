"""Built-in observers: plugins that wrap every stage of every backend and change nothing.

An observer costs a pluggy call a stage, so none is registered unless somebody asks.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from .hookspecs import hookimpl
from .types import Plan

logger = logging.getLogger("moe_core.trace")


class Trace:
    """Logs each stage's time on the host, at INFO, to the logger ``moe_core.trace``; ``MOE_CORE_TRACE=1`` adds it.

    On an accelerator this is the time to launch, not to run: waiting for the device would change what is measured.
    """

    @hookimpl(wrapper=True)
    def moe_gate(self, plan: Plan) -> Any:
        """Time the gate."""
        return (yield from _timed("gate", plan))

    @hookimpl(wrapper=True)
    def moe_shared_experts(self, plan: Plan) -> Any:
        """Time the launch of the shared experts."""
        return (yield from _timed("shared_experts", plan))

    @hookimpl(wrapper=True)
    def moe_experts(self, plan: Plan) -> Any:
        """Time the routed experts."""
        return (yield from _timed("experts", plan))

    @hookimpl(wrapper=True)
    def moe_reduce(self, plan: Plan) -> Any:
        """Time the reduction, the join included."""
        return (yield from _timed("reduce", plan))


def _timed(stage: str, plan: Plan) -> Any:
    start = time.perf_counter()
    result = yield
    microseconds = (time.perf_counter() - start) * 1e6
    logger.info("%-14s %9.1f us  %s %s", stage, microseconds, plan.device, plan.dtype)
    return result
