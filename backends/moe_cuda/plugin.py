"""The hooks of the CUDA backend. Heavy imports, triton among them, live inside the functions."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moe_core import BackendInfo, Verdict, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core import ExpertsOut, MoEConfig, MoEWeights, Pending, Routing
    from moe_core.platform import Platform
    from moe_core.types import Plan

    from .layout import CudaWeights


@functools.cache
def _stage(module: str, name: str) -> Callable[..., Any]:
    # An import statement inside a stage costs a microsecond at each call.
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)  # type: ignore[no-any-return]


@hookimpl
def moe_backend_info() -> BackendInfo:
    """All stages, CUDA tensors."""
    return BackendInfo(
        name="cuda",
        device_types=("cuda",),
        priority=30,
        stages=("gate", "shared_experts", "experts", "reduce"),
        extra="cuda",
    )


@hookimpl
def moe_probe(platform: Platform) -> Verdict:
    """triton, and a device (or Triton's interpreter)."""
    from . import layout

    return layout.probe(platform)


@hookimpl
def moe_supports(config: MoEConfig, stage: str, platform: Platform) -> Verdict:
    """bfloat16, float16 and float32, quantised or not; no backward."""
    from . import layout

    return layout.supports(config, stage, platform)


@hookimpl
def moe_prepare(config: MoEConfig, weights: MoEWeights, platform: Platform) -> CudaWeights:
    """Choose block sizes; the weights stay where and as they are."""
    from . import layout

    return layout.prepare(config, weights, platform)


@hookimpl
def moe_gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """The router in float32."""
    return _stage("gate", "gate")(plan, hidden_states, router_logits, input_ids)


@hookimpl
def moe_shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:
    """The shared experts on the stream that the core chose."""
    return _stage("shared", "shared_experts")(plan, hidden_states)


@hookimpl
def moe_experts(plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
    """The routed experts in the form that suits their number of tokens."""
    return _stage("experts", "experts")(plan, hidden_states, routing)


@hookimpl
def moe_reduce(plan: Plan, routing: Routing, experts_out: ExpertsOut, shared: Pending) -> Tensor:
    """Whatever is left to sum, in one kernel."""
    return _stage("reduce", "reduce")(plan, routing, experts_out, shared)


@hookimpl
def moe_tune(arguments: list[str]) -> int:
    """Search for block sizes on the GPU at hand."""
    from . import tune

    return tune.main(arguments)
