"""Where the routing of a call comes from: the caller, a replay, experts that route by themselves, or the gate stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import MoEConfig
from .contract import GradientsNeeded, check_stage, routing_fault, stage_failed
from .errors import InputError
from .inputs import as_routing
from .routing import limit_capacity, route, router_logits_of
from .statistics import Replay, Taps
from .types import Plan, Routing
from .weights import MoEWeights


def keep_gradients(found: Any, purpose: str) -> Any:
    """``found``, unless a binding for inference would lose its gradients."""
    if purpose == "inference" and torch.is_grad_enabled():
        tensors = found if isinstance(found, tuple) else (found,)
        if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
            raise GradientsNeeded
    return found


@dataclass(frozen=True)
class Gating:
    """The routing part of one binding.

    Args:
        weights: the plain ones; replays and records are computed from them.
        served_by: stage -> backend, as in the report.
        purpose: the binding's, ``inference`` or ``training``.
        taps: of the runner: what is recorded and replayed now.
        gate: what the caller passed in place of the gate's product.
        stage, plan: the gate stage; None where the experts route by themselves.
        transformed: the experts see transformed rows, from which logits cannot be computed.
    """

    config: MoEConfig
    weights: MoEWeights
    served_by: Mapping[str, str]
    purpose: str
    taps: Taps
    gate: Callable[..., Any] | None
    stage: Callable[..., Any] | None
    plan: Plan
    transformed: bool

    @property
    def owned_by_experts(self) -> bool:
        """Whether the experts route by themselves."""
        return self.stage is None

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None,
        given: Routing | None,
        input_ids: Tensor | None,
        first: bool = False,
    ) -> tuple[Routing | None, Tensor | None]:
        """The routing (None where the experts own it) and the logits, as the experts stage gets them.

        Args:
            first: look at the gate stage's result.
        """
        replay, record = self.taps.replay, self.taps.record
        routing: Routing | None = given
        if given is not None:
            if replay is not None:
                raise InputError("topk_ids is given while recorded ids are replayed; leave it out, or stop replaying")
        elif self.stage is None:
            if replay is not None:
                raise cannot_replay(f"the experts of backend {self.served_by['experts']} route by themselves")
            router_logits = self._logits_for_experts(hidden_states, router_logits)
        else:
            if self.gate is not None or replay is not None:
                routing, router_logits = self._without_stage(hidden_states, router_logits, replay)
            if routing is None:
                try:
                    routing = self.stage(self.plan, hidden_states, router_logits, input_ids)
                except BaseException as error:
                    stage_failed("gate", self.served_by, error)
                if first or type(routing) is not Routing:
                    fault = routing_fault(routing, hidden_states.shape[0], self.config.top_k)
                    check_stage("gate", self.served_by, fault)
                if self.config.expert_capacity is not None:
                    routing = limit_capacity(routing, self.config.num_experts, self.config.expert_capacity)
        if record is not None:
            record.add(self._seen(routing, hidden_states, router_logits, input_ids).topk_ids)
        return routing, router_logits

    def _without_stage(
        self, hidden_states: Tensor, router_logits: Tensor | None, replay: Replay | None
    ) -> tuple[Routing | None, Tensor | None]:
        """What the caller's gate and a replay give: a routing, or logits for the gate stage to route by."""
        if self.gate is not None and router_logits is None:
            found = keep_gradients(self.gate(hidden_states), self.purpose)
            if not isinstance(found, Tensor):
                if replay is not None:
                    raise cannot_replay("gate= chooses experts by itself")
                return self._own_routing(found, hidden_states.shape[0]), None
            router_logits = self._checked_logits(found, hidden_states.shape[0])
        if replay is None:
            return None, router_logits
        if router_logits is None:
            router_logits = router_logits_of(self.config, self.weights, hidden_states)
        topk_ids = replay.take(hidden_states.shape[0])
        routing = route(self.config, self.weights, router_logits, topk_ids=topk_ids)
        if self.config.expert_capacity is not None:
            routing = limit_capacity(routing, self.config.num_experts, self.config.expert_capacity)
        return routing, router_logits

    def _logits_for_experts(self, hidden_states: Tensor, router_logits: Tensor | None) -> Tensor | None:
        """Logits for experts that route; None where they can compute them from what they see."""
        if router_logits is not None:
            return router_logits
        if self.gate is not None:
            found = keep_gradients(self.gate(hidden_states), self.purpose)
            if not isinstance(found, Tensor):
                raise InputError(
                    f"gate= returned {type(found).__name__}, but the experts of backend {self.served_by['experts']} "
                    f"route by themselves: expected router_logits [T, E]; return them, or choose another backend"
                )
            return self._checked_logits(found, hidden_states.shape[0])
        return router_logits_of(self.config, self.weights, hidden_states) if self.transformed else None

    def _seen(
        self, routing: Routing | None, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None
    ) -> Routing:
        """The routing to record; experts that own theirs were checked to follow the config, so that gives it."""
        if routing is not None:
            return routing
        if router_logits is None:
            router_logits = router_logits_of(self.config, self.weights, hidden_states)
        return route(self.config, self.weights, router_logits, hidden_states=hidden_states, input_ids=input_ids)

    def _checked_logits(self, found: Tensor, tokens: int) -> Tensor:
        expected = (tokens, self.config.num_router_outputs)
        if tuple(found.shape) != expected or not found.dtype.is_floating_point:
            raise InputError(
                f"gate= returned {tuple(found.shape)} of {found.dtype}, expected float router_logits {expected}, or "
                f"(topk_weights, topk_ids)"
            )
        return found

    def _own_routing(self, found: Any, tokens: int) -> Routing:
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(t, Tensor) for t in found)):
            raise InputError(
                f"gate= returned {type(found).__name__}, expected router_logits [T, E] or (topk_weights, topk_ids)"
            )
        routing = as_routing(self.config, *found)
        if routing.topk_ids.shape[0] != tokens:
            raise InputError(
                f"gate= returned {routing.topk_ids.shape[0]} rows, expected {tokens}, one a token of hidden_states"
            )
        return routing


def cannot_replay(why: str) -> InputError:
    """The error of a replay that nobody would follow."""
    return InputError(f"replaying: {why}, so recorded ids cannot be forced; choose another backend or gate")
