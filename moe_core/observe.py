"""The built-in observer: a plugin that wraps every stage of every backend, times it, and changes nothing.

An observer costs a pluggy call a stage, so none is registered unless somebody asks: ``MOE_CORE_TRACE=1``, which
``moe-core trace`` sets for the command that it runs.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from . import trace
from .hookspecs import hookimpl
from .types import Plan

logger = logging.getLogger("moe_core.trace")


class Trace:
    """Times each stage, logs it at INFO to the logger ``moe_core.trace``, and marks it for torch's profiler.

    On an accelerator the time is that between two events on the stage's own stream, read when the process ends: waiting
    for the device would change what is measured. While a graph is captured, and on a CPU, it is the host's time.
    """

    @hookimpl(wrapper=True)
    def moe_gate(self, plan: Plan, hidden_states: Tensor) -> Any:
        """Time the gate."""
        return (yield from _timed("gate", plan, hidden_states.shape[0]))

    @hookimpl(wrapper=True)
    def moe_shared_experts(self, plan: Plan, hidden_states: Tensor) -> Any:
        """Time the shared experts, on the stream that they run on."""
        return (yield from _timed("shared_experts", plan, hidden_states.shape[0]))

    @hookimpl(wrapper=True)
    def moe_experts(self, plan: Plan, hidden_states: Tensor) -> Any:
        """Time the routed experts."""
        return (yield from _timed("experts", plan, hidden_states.shape[0]))

    @hookimpl(wrapper=True)
    def moe_reduce(self, plan: Plan, experts_out: Any) -> Any:
        """Time the reduction, the join included."""
        return (yield from _timed("reduce", plan, experts_out.value.shape[0]))


def _timed(stage: str, plan: Plan, tokens: int) -> Any:
    begun = _event(plan)
    start = time.perf_counter()
    with record_function(f"moe_core::{stage}"):
        result = yield
    seconds = time.perf_counter() - start
    events = None if begun is None else (begun, _event(plan))
    trace.add(trace.StageCall(plan.layer, stage, plan.backend, plan.function, tokens, start, seconds, events))
    logger.info("%-14s %9.1f us  %s  layer %d  %d tokens", stage, seconds * 1e6, plan.backend, plan.layer, tokens)
    return result


def _event(plan: Plan) -> torch.Event | None:
    """An event on the current stream of the plan's device; None where nothing runs beside the host, or in a capture."""
    if plan.device.type == "cpu" or not torch.accelerator.is_available():
        return None
    if plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    event = torch.Event(device=plan.device, enable_timing=True)
    event.record(torch.accelerator.current_stream(plan.device))
    return event
