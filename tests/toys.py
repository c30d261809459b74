"""Backends made up for tests: the reference's stages under another name, with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_core import BackendInfo, ExpertsOut, Pending, Verdict, hookimpl, reference
from moe_core.routing import route, router_logits_of
from moe_core.types import STAGES, Plan

MARK = 93.0
"""What a stage that writes into its input leaves there."""


class Toy:
    """Every stage of the reference; a subclass overrides what it is about.

    Args:
        traits: of the experts stage.
    """

    name = "toy"
    stages: tuple[str, ...] = STAGES

    def __init__(self, **traits: Any) -> None:
        self.traits = traits

    @hookimpl
    def moe_backend_info(self):
        return BackendInfo(name=self.name, device_types=("cpu", "cuda"), priority=1, stages=self.stages)

    @hookimpl
    def moe_probe(self, platform):
        return Verdict.yes()

    @hookimpl
    def moe_supports(self, config, stage, platform):
        return Verdict.yes(**(self.traits if stage == "experts" else {}))

    @hookimpl
    def moe_gate(self, plan, hidden_states, router_logits, input_ids):
        return reference.moe_gate(plan, hidden_states, router_logits, input_ids)

    @hookimpl
    def moe_shared_experts(self, plan, hidden_states):
        return reference.moe_shared_experts(plan, hidden_states)

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing, router_logits):
        return reference.moe_experts(plan, hidden_states, routing)

    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        return reference.moe_reduce(plan, routing, experts_out, shared)


class Mutating(Toy):
    """Its experts write into their input, and say so."""

    name = "mutating"

    def __init__(self, **traits: Any) -> None:
        super().__init__(**{"mutates_input": True, **traits})

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing, router_logits):
        out = reference.moe_experts(plan, hidden_states, routing)
        hidden_states.fill_(MARK)
        return out


class Owner(Toy):
    """Its experts route by themselves, by a config that a test may falsify; it has no gate stage.

    Args:
        read_as: from the config to what this kernel makes of it.
        weights_as: the same for the weights.
    """

    name = "owner"
    stages = ("shared_experts", "experts", "reduce")

    def __init__(
        self, read_as: Callable = lambda config: config, weights_as: Callable = lambda weights: weights
    ) -> None:
        super().__init__(owns_routing=True)
        self.read_as, self.weights_as = read_as, weights_as
        self.logits: list[Any] = []

    @hookimpl
    def moe_gate(self, plan, hidden_states, router_logits, input_ids):
        raise AssertionError("a gate was built for experts that own their routing")

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing, router_logits):
        assert routing is None
        self.logits.append(router_logits)
        config, weights = self.read_as(plan.config), self.weights_as(plan.weights)
        if router_logits is None:
            router_logits = router_logits_of(config, weights, hidden_states)
        routing = route(config, weights, router_logits, hidden_states=hidden_states)
        own = Plan(config, weights, plan.device, torch.float32)
        out = reference.moe_experts(own, hidden_states, routing)
        return ExpertsOut(reference.moe_reduce(own, routing, out, Pending(None)), True)
