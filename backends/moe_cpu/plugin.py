"""The hooks of the CPU backend. Heavy imports live inside the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_core import BackendInfo, Verdict, hookimpl, reference

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core import ExpertsOut, MoEConfig, MoEWeights, Pending, Routing
    from moe_core.platform import Platform
    from moe_core.types import Plan

    from .layout import PackedWeights


@hookimpl
def moe_backend_info() -> BackendInfo:
    """All stages, CPU tensors."""
    return BackendInfo(
        name="cpu",
        device_types=("cpu",),
        priority=20,
        stages=("gate", "shared_experts", "experts", "reduce"),
        extra="cpu",
    )


@hookimpl
def moe_probe(platform: Platform) -> Verdict:
    """Usable where there is a C++ compiler or oneDNN."""
    from . import layout

    return layout.probe(platform)


@hookimpl
def moe_supports(config: MoEConfig, stage: str, platform: Platform) -> Verdict:
    """Unquantised float32 and bfloat16; no backward."""
    from . import layout

    return layout.supports(config, stage, platform)


@hookimpl
def moe_prepare(config: MoEConfig, weights: MoEWeights, platform: Platform) -> PackedWeights:
    """Repack expert weights; compiles the native kernel where that was not done yet on this machine."""
    from . import layout

    return layout.pack(config, weights, platform)


@hookimpl
def moe_advise(platform: Platform) -> list[str]:
    """The compiler, threads and huge pages, as measured on other machines."""
    from . import advice

    return advice.advice(platform)


@hookimpl
def moe_gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """The router in float32."""
    from . import gate

    return gate.gate(plan, hidden_states, router_logits, input_ids)


@hookimpl
def moe_shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:
    """The shared experts by the chosen strategy."""
    from . import shared

    return shared.shared_experts(plan, hidden_states)


@hookimpl
def moe_experts(plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
    """The routed experts by the chosen strategy: [T, H], or [T, K, H] where each expert has a norm of its own."""
    return plan.weights.experts.routed(plan, hidden_states, routing)  # type: ignore[no-any-return]


@hookimpl
def moe_reduce(plan: Plan, routing: Routing, experts_out: ExpertsOut, shared: Pending) -> Tensor:
    """The shared sum on top of reduced experts; those of another backend may come unreduced."""
    return reference.moe_reduce(plan, routing, experts_out, shared)
