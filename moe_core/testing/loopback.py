"""A backend that does everything and computes nothing of its own: the reference behind the public hooks.

Whatever differs between it and the reference is the dispatcher's fault: it goes through registration, selection,
prepare and the four stages like any third party, and notes which of them were called.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import plugins, reference
from ..config import MoEConfig
from ..hookspecs import hookimpl
from ..types import STAGES, BackendInfo, ExpertsOut, Pending, Plan, Routing, Verdict
from ..weights import MoEWeights


@dataclass(frozen=True)
class Prepared:
    """A layout of the loopback's own: a stage that gets plain weights, or another backend's, fails."""

    weights: MoEWeights


class Loopback:
    """The reference as a third party.

    Args:
        name: what it is registered under.
        priority: as in BackendInfo.
        stages: those that it implements; the others fall back to the reference.
        refuse: stage -> reason, for stages that it lists and then refuses.
        traits: of every stage, besides ``supports_backward=True``.
    """

    def __init__(
        self,
        name: str = "loopback",
        *,
        priority: int = 1,
        stages: tuple[str, ...] = STAGES,
        refuse: Mapping[str, str] | None = None,
        **traits: Any,
    ) -> None:
        self.info = BackendInfo(
            name=name, device_types=plain_info().device_types, priority=priority, stages=stages, url=None
        )
        self.refuse = dict(refuse or {})
        self.traits = {"supports_backward": True, **traits}
        self.calls: Counter[str] = Counter()

    @hookimpl
    def moe_backend_info(self) -> BackendInfo:
        """As it was asked for."""
        return self.info

    @hookimpl
    def moe_probe(self) -> Verdict:
        """Always."""
        return Verdict.yes()

    @hookimpl
    def moe_supports(self, config: MoEConfig, stage: str) -> Verdict:
        """What the reference supports, but for ``refuse``."""
        if stage in self.refuse:
            return Verdict.no(self.refuse[stage], "leave it to the reference")
        verdict = reference.moe_supports(config, stage)
        return Verdict.yes(**self.traits) if verdict.ok else verdict

    @hookimpl
    def moe_prepare(self, weights: MoEWeights) -> Prepared:
        """Wrap."""
        self.calls["prepare"] += 1
        return Prepared(weights)

    @hookimpl
    def moe_gate(
        self, plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None
    ) -> Routing:
        """The reference's gate."""
        return reference.moe_gate(self.unwrap(plan, "gate"), hidden_states, router_logits, input_ids)

    @hookimpl
    def moe_shared_experts(self, plan: Plan, hidden_states: Tensor) -> Pending:
        """The reference's shared experts."""
        return reference.moe_shared_experts(self.unwrap(plan, "shared_experts"), hidden_states)

    @hookimpl
    def moe_experts(self, plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
        """The reference's experts."""
        return reference.moe_experts(self.unwrap(plan, "experts"), hidden_states, routing)

    @hookimpl
    def moe_reduce(self, plan: Plan, routing: Routing, experts_out: ExpertsOut, shared: Pending) -> Tensor:
        """The reference's sum."""
        return reference.moe_reduce(self.unwrap(plan, "reduce"), routing, experts_out, shared)

    def unwrap(self, plan: Plan, stage: str) -> Plan:
        """Note the call; the plan that the reference gets."""
        self.calls[stage] += 1
        return Plan(plan.config, plan.weights.weights, plan.device, plan.dtype)


def plain_info() -> BackendInfo:
    """What the reference says of itself."""
    return reference.moe_backend_info()


@contextlib.contextmanager
def registered(plugin: Any, name: str | None = None) -> Iterator[Any]:
    """Register a plugin by hand inside the ``with``; ``name`` is its own by default."""
    chosen = plugin.moe_backend_info().name if name is None else name
    plugins.register(plugin, chosen)
    try:
        yield plugin
    finally:
        plugins.unregister(chosen)
