"""The hooks of the TPU backend. Heavy imports live inside the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_core import BackendInfo, Verdict, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core import ExpertsOut, MoEConfig, MoEWeights, Pending, Routing
    from moe_core.platform import Platform
    from moe_core.types import Plan

    from .layout import XlaWeights


@hookimpl
def moe_backend_info() -> BackendInfo:
    """All stages, XLA tensors; ``tpu`` is torch_tpu's device type, which the probe answers for."""
    return BackendInfo(
        name="tpu",
        device_types=("xla", "tpu"),
        priority=30,
        stages=("gate", "shared_experts", "experts", "reduce"),
        extra="tpu",
    )


@hookimpl
def moe_probe(platform: Platform) -> Verdict:
    """Usable where torch_xla is installed and has a device to compute on, be it XLA's own CPU device."""
    from . import layout

    return layout.probe(platform)


@hookimpl
def moe_supports(config: MoEConfig, stage: str, platform: Platform) -> Verdict:
    """Unquantised float32 and bfloat16 on XLA tensors; no backward."""
    from . import layout

    return layout.supports(config, stage, platform)


@hookimpl
def moe_prepare(config: MoEConfig, weights: MoEWeights, platform: Platform) -> XlaWeights:
    """The plain weights beside the operators and the form for this chip."""
    from . import layout

    return layout.prepare(config, weights, platform)


@hookimpl
def moe_gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """The router in float32."""
    from . import gate

    return gate.gate(plan, hidden_states, router_logits, input_ids)


@hookimpl
def moe_shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:
    """The shared experts, in the same graph."""
    from . import shared

    return shared.shared_experts(plan, hidden_states)


@hookimpl
def moe_experts(plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
    """The routed experts as one static graph."""
    from . import experts

    return experts.experts(plan, hidden_states, routing)


@hookimpl
def moe_reduce(plan: Plan, routing: Routing, experts_out: ExpertsOut, shared: Pending) -> Tensor:
    """The shared sum on top of reduced experts."""
    from . import reduce

    return reduce.reduce(plan, routing, experts_out, shared)
