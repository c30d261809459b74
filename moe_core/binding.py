"""Binding: from a selection to four plain functions and the plans that they get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import hookspecs, selfcheck, streams
from .config import MoEConfig
from .contract import CALLERS_OWN, experts_fault, output_fault, pending_fault, routing_fault, shared_fault
from .errors import BindError, InputError, MoECoreError, StageError, describe
from .platform import Platform
from .plugins import Registry, adapt, new_manager, spec_arguments
from .reference import combine_shared
from .report import SelectionReport
from .routing import check_ids, checks_ids, limit_capacity, route, router_logits_of
from .statistics import Replay, RoutingRecord
from .types import ExpertsOut, Pending, Plan, Routing
from .weights import MoEWeights

StageFunction = Callable[..., Any]


class GradientsNeeded(Exception):
    """A function that the caller passed returned a tensor that requires gradients, in a binding without a backward."""


UNCHANGED = (MoECoreError, GradientsNeeded, *CALLERS_OWN)


@dataclass(frozen=True)
class Modules:
    """What the user passed in place of a stage, or around the routed experts."""

    gate: Callable[..., Any] | None = None
    shared_experts: Callable[..., Any] | None = None
    routed_input_transform: Callable[[Tensor], Tensor] | None = None
    routed_output_transform: Callable[[Tensor], Tensor] | None = None

    def require_grad(self) -> bool:
        """Whether a parameter of a module requires gradients; of a plain function only its results tell."""
        return any(parameter.requires_grad for module in self._modules() for parameter in module.parameters())

    @property
    def opaque(self) -> bool:
        """Whether one of them is a plain function, whose parameters cannot be seen."""
        functions = (self.gate, self.shared_experts, self.routed_input_transform)
        return any(function is not None and not isinstance(function, torch.nn.Module) for function in functions)

    def _modules(self) -> list[torch.nn.Module]:
        every = (self.gate, self.shared_experts, self.routed_input_transform, self.routed_output_transform)
        return [module for module in every if isinstance(module, torch.nn.Module)]


# pluggy reads argument names off a function's code, and marking a backend's own function would change the plugin: so an
# observed stage is registered as a new function with the names of its specification.
NAMED: Mapping[str, Callable[[StageFunction], StageFunction]] = {
    "moe_gate": lambda call: (
        lambda plan, hidden_states, router_logits, input_ids: call(plan, hidden_states, router_logits, input_ids)
    ),
    "moe_shared_experts": lambda call: lambda plan, hidden_states: call(plan, hidden_states),
    "moe_experts": lambda call: (
        lambda plan, hidden_states, routing, router_logits: call(plan, hidden_states, routing, router_logits)
    ),
    "moe_reduce": lambda call: lambda plan, routing, experts_out, shared: call(plan, routing, experts_out, shared),
    "moe_dispatch": lambda call: lambda plan, hidden_states, routing: call(plan, hidden_states, routing),
    "moe_combine": lambda call: lambda plan, experts_out, dispatched: call(plan, experts_out, dispatched),
}


def stage_function(registry: Registry, backend: str, hook: str) -> StageFunction:
    """The plain function of a backend's hook; through pluggy only where an observer wraps it."""
    names = spec_arguments(hook)
    impl = registry.plugins[backend].impls[hook]
    observers = registry.wrappers_of(hook)
    if not observers:
        return adapt(impl, names)
    manager = new_manager()
    manager.register(SimpleNamespace(**{hook: hookspecs.hookimpl(NAMED[hook](adapt(impl, names)))}), backend)
    for observer in observers:
        manager.register(SimpleNamespace(**{hook: getattr(observer.plugin, hook)}), observer.name)
    caller = getattr(manager.hook, hook)

    def observed(*arguments: Any) -> Any:
        return caller(**dict(zip(names, arguments, strict=True)))

    return observed


def shared_order(config: MoEConfig, device: torch.device) -> str:
    """The order in which the core runs the shared experts: ``overlap`` needs a device with streams, and without one
    they simply run first. ``internal`` leaves scheduling to the backend, which is launched first and joined last."""
    order = config.shared_experts_order
    return "before" if order == "overlap" and not streams.has_streams(device) else order


@dataclass
class Taps:
    """What a runner wants to see, or to force, of the routing; both None almost always."""

    record: RoutingRecord | None = None
    replay: Replay | None = None


class Binding:
    """One selection, bound to weights: immutable, so any number of threads may call it."""

    def __init__(
        self,
        registry: Registry,
        report: SelectionReport,
        config: MoEConfig,
        weights: MoEWeights,
        platform: Platform,
        modules: Modules,
        *,
        inplace: bool = False,
        taps: Taps | None = None,
    ) -> None:
        self.report = report
        self.config = config
        self.modules = modules
        self.inplace = inplace
        self.taps = taps or Taps()
        self.plain_weights = weights
        self.order = shared_order(config, platform.device)
        candidate = report.candidate(report.backend)
        traits = candidate.traits if candidate else {}
        experts = traits.get("experts", {})
        self.owns_routing = bool(experts.get("owns_routing")) and report.stages["experts"] == report.backend
        self.mutates_input = bool(experts.get("mutates_input")) and report.stages["experts"] == report.backend
        prepared: dict[str, Any] = {}
        functions: dict[str, StageFunction] = {}
        plans: dict[str, Plan] = {}
        dtype = weights.dtype if config.quant is None else (platform.dtype or torch.bfloat16)
        for stage, name in report.stages.items():
            if name not in prepared:
                prepared[name] = _prepare(registry, name, config, weights, platform)
            plans[stage] = Plan(config, prepared[name], platform.device, dtype)
            functions[stage] = stage_function(registry, name, f"moe_{stage}")
        if not self.owns_routing and prepared[report.stages["experts"]] is not weights:
            _check_prepared(registry, report.stages["experts"], plans["experts"], weights)
        # Plain weights are read at each call; only repacked ones can become stale.
        self.repacked = any(value is not weights for value in prepared.values())
        self.watched = tuple(t for _, t in weights.named_tensors() if not t.is_inference()) if self.repacked else ()
        self.versions = self._versions()
        # Token counts for which every stage's result was looked at once; shapes follow from the count and the config.
        self._checked: set[int] = set()
        self.stages = {stage: (functions[stage], plans[stage]) for stage in functions}
        self._gate, self._gate_plan = self.stages["gate"]
        self._experts, self._experts_plan = self.stages["experts"]
        self._reduce, self._reduce_plan = self.stages["reduce"]
        self._shared = functions.get("shared_experts")
        self._shared_plan = plans.get("shared_experts")

    def _versions(self) -> list[int]:
        return [number for t in self.watched for number in (t.data_ptr(), t._version)]

    def is_stale(self) -> bool:
        """Whether a weight was written to or moved since the bind, as far as torch can tell."""
        return self.repacked and self._versions() != self.versions

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None,
        routing: Routing | None,
        input_ids: Tensor | None,
    ) -> Tensor:
        """One pass over [T, H], T > 0. Inputs were checked; ``routing`` is what the caller brought, or None."""
        tokens = hidden_states.shape[0]
        first = tokens not in self._checked
        shared = self._launch_shared(hidden_states, first)
        try:
            out = self._rest(hidden_states, router_logits, routing, input_ids, shared, first)
        except BaseException:
            # The side stream may still read the input: join before the caller's memory can be reused.
            if not shared.consumed and self.order == "overlap":
                shared.result()
            raise
        if first:
            self._checked.add(tokens)
        return out

    def _rest(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None,
        routing: Routing | None,
        input_ids: Tensor | None,
        shared: Pending,
        first: bool,
    ) -> Tensor:
        if routing is None and not self.owns_routing:
            routing, router_logits = self._route(hidden_states, router_logits, input_ids, first)
        routed_input = hidden_states
        if self.modules.routed_input_transform is not None:
            routed_input = self._keep_gradients(self.modules.routed_input_transform(hidden_states))
        elif self.mutates_input and not self.inplace:
            routed_input = hidden_states.clone()
        if self.taps.record is not None:
            self.taps.record.add(self._seen(routing, hidden_states, router_logits, input_ids).topk_ids)
        try:
            experts_out = self._experts(self._experts_plan, routed_input, routing, router_logits)
        except BaseException as error:
            self._failed("experts", error)
        if first or type(experts_out) is not ExpertsOut:
            self._check("experts", experts_fault(experts_out, routed_input, self.config.top_k))
        if self.modules.routed_output_transform is None:
            return self._reduced(routing, experts_out, shared, routed_input)
        # The shared experts live outside the latent space, so they are added behind the transform.
        out = self._reduced(routing, experts_out, Pending(None), routed_input)
        transformed = self.modules.routed_output_transform(out)
        return combine_shared(self.config, transformed.float(), shared.result()).to(hidden_states.dtype)

    def _reduced(
        self, routing: Routing | None, experts_out: ExpertsOut, shared: Pending, hidden_states: Tensor
    ) -> Tensor:
        try:
            out = self._reduce(self._reduce_plan, routing, experts_out, shared)
        except BaseException as error:
            self._failed("reduce", error)
        self._check("reduce", output_fault(out, hidden_states, self._reduce_plan.dtype))
        if not shared.consumed:
            raise StageError(
                f"stage reduce of backend {self.report.stages['reduce']} returned without calling shared.result(): "
                f"the shared experts would be lost; call it exactly once"
            )
        return out  # type: ignore[no-any-return]

    def _launch_shared(self, hidden_states: Tensor, first: bool) -> Pending:
        if self._shared is None and self.modules.shared_experts is None:
            return Pending(None)
        # The routed experts may write into the caller's tensor only when asked to; then the shared ones get a copy.
        x = hidden_states.clone() if self.mutates_input and self.inplace else hidden_states
        if self.order == "after":
            return Pending(lambda: self._compute_shared(x, first).result())
        if self.order == "overlap" and x.shape[0] <= self.config.shared_experts_stream_token_threshold:
            return streams.run_aside(lambda x: self._compute_shared(x, first), x)
        return self._compute_shared(x, first)

    def _compute_shared(self, x: Tensor, first: bool) -> Pending:
        if self.modules.shared_experts is not None:
            return Pending(self._keep_gradients(self.modules.shared_experts(x)))
        assert self._shared is not None
        try:
            pending = self._shared(self._shared_plan, x)
        except BaseException as error:
            self._failed("shared_experts", error)
        if first or type(pending) is not Pending:
            self._check("shared_experts", pending_fault(pending))
            return Pending(self._checked_shared(pending, x))
        return pending

    def _checked_shared(self, pending: Pending, x: Tensor) -> Tensor | Callable[[], Tensor]:
        def take() -> Tensor:
            found = pending.result()
            self._check("shared_experts", shared_fault(found, x))
            return found  # type: ignore[return-value]

        # What is still being computed is not waited for.
        return take if pending.ready is None else take()

    def _route(
        self, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None, first: bool
    ) -> tuple[Routing, Tensor | None]:
        if self.modules.gate is not None and router_logits is None:
            found = self._keep_gradients(self.modules.gate(hidden_states))
            if not isinstance(found, Tensor):
                return self._own_routing(found, hidden_states.shape[0]), None
            router_logits = self._checked_logits(found, hidden_states.shape[0])
        routing, router_logits = self._gate_or_replay(hidden_states, router_logits, input_ids, first)
        if self.config.expert_capacity is not None:
            routing = limit_capacity(routing, self.config.num_experts, self.config.expert_capacity)
        return routing, router_logits

    def _gate_or_replay(
        self, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None, first: bool
    ) -> tuple[Routing, Tensor | None]:
        if self.taps.replay is not None:
            if router_logits is None:
                router_logits = router_logits_of(self.config, self.plain_weights, hidden_states)
            topk_ids = self.taps.replay.take(hidden_states.shape[0])
            return route(self.config, self.plain_weights, router_logits, topk_ids=topk_ids), router_logits
        try:
            routing = self._gate(self._gate_plan, hidden_states, router_logits, input_ids)
        except BaseException as error:
            self._failed("gate", error)
        if first or type(routing) is not Routing:
            self._check("gate", routing_fault(routing, hidden_states.shape[0], self.config.top_k))
        return routing, router_logits

    def _seen(
        self, routing: Routing | None, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None
    ) -> Routing:
        """The routing to record; experts that own theirs must follow the config, so it is computed from that."""
        if routing is not None:
            return routing
        if router_logits is None:
            router_logits = router_logits_of(self.config, self.plain_weights, hidden_states)
        return route(self.config, self.plain_weights, router_logits, hidden_states=hidden_states, input_ids=input_ids)

    def _keep_gradients(self, found: Any) -> Any:
        """``found``, unless the backend of this binding would lose its gradients."""
        if self.report.purpose == "inference" and torch.is_grad_enabled():
            tensors = found if isinstance(found, tuple) else (found,)
            if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
                raise GradientsNeeded
        return found

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
        routing = self.as_routing(*found)
        if routing.topk_ids.shape[0] != tokens:
            raise InputError(
                f"gate= returned {routing.topk_ids.shape[0]} rows, expected {tokens}, one a token of hidden_states"
            )
        return routing

    def as_routing(self, topk_weights: Tensor, topk_ids: Tensor) -> Routing:
        """The caller's own weights and ids as a Routing; ids checked where that costs no synchronisation.

        Raises:
            InputError: wrong shapes.  RoutingError: ids out of range.
        """
        if topk_weights.ndim < 2 or topk_weights.shape != topk_ids.shape or topk_ids.shape[-1] != self.config.top_k:
            raise InputError(
                f"topk_weights {tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)}: expected [T, K] with "
                f"K = top_k = {self.config.top_k} for both"
            )
        if topk_ids.dtype.is_floating_point or topk_ids.dtype == torch.bool:
            raise InputError(f"topk_ids has dtype {topk_ids.dtype}, expected an integer dtype; pass topk_ids.int()")
        k = self.config.top_k
        topk_weights, topk_ids = topk_weights.reshape(-1, k), topk_ids.reshape(-1, k)
        if checks_ids(self.config, topk_ids):
            check_ids(self.config, topk_ids, self.config.num_local_experts)
        return Routing(topk_weights.to(torch.float32), topk_ids.to(torch.int32))

    def _check(self, stage: str, fault: str) -> None:
        if fault:
            raise StageError(
                f"stage {stage} of backend {self.report.stages[stage]} returned {fault}; a stage decides at bind "
                f"whether it serves, never during a call: report it to the backend's author, or choose another backend"
            )

    def _failed(self, stage: str, error: BaseException) -> NoReturn:
        """A stage is a third party's code: anything may come out of it, and nothing but what is ours leaves unnamed."""
        if isinstance(error, UNCHANGED):
            raise error
        raise StageError(
            f"stage {stage} of backend {self.report.stages[stage]} failed: {describe(error)}; report it "
            f"to the backend's author, or choose another backend"
        ) from error


def _check_prepared(registry: Registry, name: str, plan: Plan, weights: MoEWeights) -> None:
    """The experts stage on two tokens, unseen by observers: nobody called the layer."""
    plugin = registry.plugins[name]
    experts = adapt(plugin.impls["moe_experts"], spec_arguments("moe_experts"))
    selfcheck.check_prepared(name, plugin.origin, experts, plan, weights)


def _prepare(registry: Registry, name: str, config: MoEConfig, weights: MoEWeights, platform: Platform) -> Any:
    plugin = registry.plugins[name]
    if "moe_prepare" not in plugin.impls:
        return weights
    try:
        prepared = plugin.call("moe_prepare", config=config, weights=weights, platform=platform)
    except UNCHANGED:
        raise
    except BaseException as error:  # a third party's code; chained, with the backend's name
        raise BindError(
            f"backend {name} failed to prepare its weights: {describe(error)}; choose another backend or "
            f"report it to the author of {plugin.origin or name}"
        ) from error
    if prepared is None:
        raise BindError(f"moe_prepare of backend {name} returned None, expected its weights; report it to the author")
    return prepared
