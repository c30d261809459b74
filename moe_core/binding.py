"""Binding: from a selection to four plain functions and the plans that they get."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import hookspecs, selfcheck, streams
from .config import MoEConfig
from .consume import ConsumableWeights
from .contract import (
    PASSED_ON,
    check_stage,
    experts_fault,
    output_fault,
    pending_fault,
    shared_fault,
    stage_failed,
)
from .errors import BindError, InputError, StageError, describe
from .gating import Gating, keep_gradients
from .latent import fit_input, truncate
from .platform import Platform
from .plugins import Registry, adapt, new_manager, spec_arguments
from .reduction import Group, OneProcess, ParallelFacts, ReductionPlan, finish, plan_reduction
from .reference import combine_shared
from .report import SelectionReport
from .routing_check import check_owned_routing
from .statistics import Taps
from .types import ExpertsOut, Pending, Plan, Routing
from .weights import MoEWeights, layer_dtype

StageFunction = Callable[..., Any]


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
        return any(function is not None and not isinstance(function, torch.nn.Module) for function in self._every())

    def _modules(self) -> list[torch.nn.Module]:
        return [module for module in self._every() if isinstance(module, torch.nn.Module)]

    def _every(self) -> tuple[Callable[..., Any] | None, ...]:
        return (self.gate, self.shared_experts, self.routed_input_transform, self.routed_output_transform)


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


def plain_function(registry: Registry, backend: str, hook: str) -> StageFunction:
    """A backend's own implementation as a function of all of the hook's arguments; no observer sees its calls."""
    return adapt(registry.plugins[backend].impls[hook], spec_arguments(hook))


def stage_function(registry: Registry, backend: str, hook: str) -> StageFunction:
    """The plain function of a backend's hook; through pluggy only where an observer wraps it."""
    names = spec_arguments(hook)
    plain = plain_function(registry, backend, hook)
    observers = registry.wrappers_of(hook)
    if not observers:
        return plain
    manager = new_manager()
    manager.register(SimpleNamespace(**{hook: hookspecs.hookimpl(NAMED[hook](plain))}), backend)
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


class Binding:
    """One selection, bound to weights: immutable, so any number of threads may call it.

    ``order`` is when shared experts run and ``separate_shared`` whether there are any, ``reduction`` the plan of sums;
    ``owns_routing`` and ``mutates_input`` are traits of the experts stage; ``enters_op`` is whether an eager call goes
    through the custom op; ``skips_empty``: a call without tokens runs no stage.
    """

    order: str
    separate_shared: bool
    enters_op: bool
    reduction: ReductionPlan
    owns_routing: bool
    mutates_input: bool
    skips_empty: bool

    def __init__(
        self,
        registry: Registry,
        report: SelectionReport,
        config: MoEConfig,
        weights: MoEWeights,
        platform: Platform,
        modules: Modules,
        *,
        taps: Taps | None = None,
        layer: int = -1,
        facts: ParallelFacts | None = None,
        linear_transform: bool = False,
    ) -> None:
        self.report = report
        self.config = config
        self.modules = modules
        self.order = shared_order(config, platform.device)
        self.skips_empty = report.purpose == "inference"
        self.separate_shared = config.has_shared_experts or modules.shared_experts is not None
        self.reduction = plan_reduction(
            config,
            facts,
            separate_shared=self.separate_shared,
            output_transform=modules.routed_output_transform is not None,
            linear_transform=linear_transform,
        )
        self._group: Group = OneProcess()
        self._width, self._joins_in_reduce = self.reduction.expert_width, self.reduction.shared_joins == "reduce"
        self._shared_at_once = self.separate_shared and self.order not in ("after", "overlap")
        candidate = report.candidate(report.backend)
        traits = candidate.traits if candidate else {}
        experts = traits.get("experts", {})
        self.owns_routing = bool(experts.get("owns_routing"))
        self.mutates_input = bool(experts.get("mutates_input"))
        checked_later = config.check_layout and isinstance(weights, ConsumableWeights)
        kept = selfcheck.last_expert(config, weights) if checked_later else None
        prepared: dict[str, Any] = {}
        functions: dict[str, StageFunction] = {}
        plans: dict[str, Plan] = {}
        strategies = dict(report.strategies)
        dtype = layer_dtype(config, weights)
        for stage, name in report.stages.items():
            if name not in prepared:
                if isinstance(weights, ConsumableWeights):
                    weights.allow(stage for stage, server in report.stages.items() if server == name)
                prepared[name] = _prepare(registry, name, config, weights, platform)
            function = registry.plugins[name].impls[f"moe_{stage}"].function
            served_by = f"{function.__module__}.{function.__qualname__}"
            done = getattr(prepared[name], "strategies", None)
            if isinstance(done, Mapping) and done.get(stage):
                strategies[stage] = str(done[stage])
            plans[stage] = Plan(config, prepared[name], platform.device, dtype, name, served_by, layer)
            if stage == "gate" and self.owns_routing:
                continue  # the experts route by themselves; no gate is built
            functions[stage] = stage_function(registry, name, f"moe_{stage}")
        self.enters_op = report.entry == "op"
        # What was done counts, not what was planned: a compiler may have failed in between.
        self.report = dataclasses.replace(report, strategies=strategies)
        self._prepared = prepared
        if not self.owns_routing and prepared[report.stages["experts"]] is not weights:
            _check_prepared(registry, report.stages["experts"], plans["experts"], weights, kept)
        # Plain weights are read at each call; only repacked ones can become stale.
        self.repacked = any(value is not weights for value in prepared.values())
        gone = weights.spent if isinstance(weights, ConsumableWeights) else frozenset()
        watched = (t for name, t in weights.named_tensors() if name not in gone and not t.is_inference())
        self.watched = tuple(watched) if self.repacked else ()
        self.versions = self._versions()
        # Token counts for which every stage's result was looked at once; shapes follow from the count and the config.
        self._checked: set[int] = set()
        self.stages = {stage: (functions[stage], plans[stage]) for stage in functions}
        self._gating = Gating(
            config,
            weights,
            report.stages,
            report.purpose,
            taps or Taps(),
            modules.gate,
            functions.get("gate"),
            plans["gate"],
            modules.routed_input_transform is not None,
        )
        self._experts, self._experts_plan = self.stages["experts"]
        self._reduce, self._reduce_plan = self.stages["reduce"]
        self._shared = functions.get("shared_experts")
        self._shared_plan = plans.get("shared_experts")
        if self.owns_routing:
            plain = plain_function(registry, report.stages["experts"], "moe_experts")
            check_owned_routing(self._experts_plan, weights, report.backend, plain)

    def _versions(self) -> list[tuple[Tensor, int, int]]:
        return [(t, t.data_ptr(), t._version) for t in self.watched]

    def counters(self) -> dict[str, dict[str, int]]:
        """What backends count of their own accord for these weights, compilations for example, by backend."""
        asked = {name: getattr(weights, "counters", None) for name, weights in self._prepared.items()}
        return {name: dict(count()) for name, count in asked.items() if callable(count)}

    def is_stale(self) -> bool:
        """Whether a weight was written to or moved since the bind, as far as torch can tell."""
        # At each call: without a list, and without a frame for one.
        for tensor, pointer, version in self.versions:
            if tensor._version != version or tensor.data_ptr() != pointer:
                return True
        return False

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None,
        routing: Routing | None,
        input_ids: Tensor | None,
        inplace: bool = False,
    ) -> Tensor:
        """One pass over [T, H], T > 0: the one place that knows the order. Inputs were checked.

        Args:
            routing: what the caller brought, or None.
            inplace: the routed experts may write into ``hidden_states``.
        """
        may_write = inplace and self.mutates_input and self.report.purpose == "inference"
        # The routed experts may write into the caller's tensor only when asked to; then the shared ones get a copy.
        tokens = hidden_states.shape[0]
        first = tokens not in self._checked
        # Steps that most layers lack are left out here, not in functions of their own: a frame costs up to 1 us where
        # the stages have filled the caches.
        launch = self._compute_shared if self._shared_at_once else self._launch_shared
        shared = launch(hidden_states.clone() if may_write else hidden_states, first)
        try:
            routing, router_logits = self._gating(hidden_states, router_logits, routing, input_ids, first)
            routed_input, width = hidden_states, self._width
            if self.modules.routed_input_transform is not None:
                routed_input, width = self._transformed(hidden_states)
            elif self.mutates_input and not may_write:
                routed_input = hidden_states.clone()
            try:
                experts_out = self._experts(self._experts_plan, routed_input, routing, router_logits)
            except BaseException as error:
                stage_failed("experts", self.report.stages, error)
            if first or type(experts_out) is not ExpertsOut:
                fault = experts_fault(experts_out, tokens, self.config.top_k, self._width)
                check_stage("experts", self.report.stages, fault)
            if experts_out.value.size(-1) != self._width:
                value = truncate(experts_out.value, self._width, self.report.stages["experts"])
                experts_out = ExpertsOut(value, experts_out.reduced)
            if self._joins_in_reduce:
                out = self._reduced(routing, experts_out, shared, tokens)
            else:
                out = self._reduced(routing, experts_out, Pending(None), tokens)
                out = self._finish(out[..., :width], shared)
        except BaseException:
            # Another stream may still read the input: join before the caller's memory can be reused.
            if not shared.consumed and self.order != "after":
                shared.result()
            raise
        if first:
            self._checked.add(tokens)
        return out

    def _transformed(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        """What the routed experts of a layer with an input transform read, and how much of a row is no padding."""
        assert self.modules.routed_input_transform is not None
        transformed = keep_gradients(self.modules.routed_input_transform(hidden_states), self.report.purpose)
        x = fit_input(self.config, transformed, hidden_states.shape[0])
        if self.mutates_input and x.untyped_storage().data_ptr() == hidden_states.untyped_storage().data_ptr():
            x = x.clone()  # an identity, or a view: the caller's tensor all the same
        return x, transformed.shape[1]

    def _finish(self, routed: Tensor, shared: Pending) -> Tensor:
        """The plan's steps behind the reduce stage, for shared experts that could not join in it."""

        def combine(routed: Tensor, beside: Tensor | None) -> Tensor:
            if routed.shape != (routed.shape[0], self.config.hidden_size):
                raise InputError(
                    f"routed_output_transform returned {tuple(routed.shape)}, expected [T, {self.config.hidden_size}]"
                )
            return combine_shared(self.config, routed.float(), beside).to(self._reduce_plan.dtype)

        return finish(self.reduction, routed, shared, combine, self.modules.routed_output_transform, self._group)

    def _reduced(self, routing: Routing | None, experts_out: ExpertsOut, shared: Pending, tokens: int) -> Tensor:
        """What the reduce stage returns, if it keeps its contract."""
        try:
            out: Tensor = self._reduce(self._reduce_plan, routing, experts_out, shared)
        except BaseException as error:
            stage_failed("reduce", self.report.stages, error)
        # At every call: a compiled graph believes what the op's fake says of the result.
        if (
            not isinstance(out, Tensor)
            or out.shape != (tokens, self._width)
            or out.dtype is not self._reduce_plan.dtype
        ):
            fault = output_fault(out, tokens, self._width, self._reduce_plan.dtype)
            check_stage("reduce", self.report.stages, fault)
        if not shared.consumed:
            raise StageError(
                f"stage reduce of backend {self.report.stages['reduce']} returned without calling shared.result(): "
                f"the shared experts would be lost; call it exactly once"
            )
        return out if out.is_contiguous() else out.contiguous()

    def _launch_shared(self, x: Tensor, first: bool) -> Pending:
        if not self.separate_shared:
            return Pending(None)
        if self.order == "after":
            return Pending(lambda: self._compute_shared(x, first).result())
        if self.order == "overlap" and x.shape[0] <= self.config.shared_experts_stream_token_threshold:
            return streams.run_aside(lambda x: self._compute_shared(x, first), x)
        return self._compute_shared(x, first)

    def _compute_shared(self, x: Tensor, first: bool) -> Pending:
        if self.modules.shared_experts is not None:
            return Pending(keep_gradients(self.modules.shared_experts(x), self.report.purpose))
        assert self._shared is not None
        try:
            pending: Pending = self._shared(self._shared_plan, x)
        except BaseException as error:
            stage_failed("shared_experts", self.report.stages, error)
        if not first and type(pending) is Pending:
            return pending
        check_stage("shared_experts", self.report.stages, pending_fault(pending))

        def take() -> Tensor:
            found = pending.result()
            check_stage("shared_experts", self.report.stages, shared_fault(found, x))
            return found  # type: ignore[return-value]

        # What is still being computed is not waited for.
        return Pending(take if pending.ready is None else take())


def _check_prepared(registry: Registry, name: str, plan: Plan, weights: MoEWeights, kept: MoEWeights | None) -> None:
    """The experts stage on two tokens, unseen by observers: nobody called the layer."""
    experts = plain_function(registry, name, "moe_experts")
    selfcheck.check_prepared(name, registry.plugins[name].origin, experts, plan, weights, kept)


def _prepare(registry: Registry, name: str, config: MoEConfig, weights: MoEWeights, platform: Platform) -> Any:
    plugin = registry.plugins[name]
    if "moe_prepare" not in plugin.impls:
        return weights
    try:
        prepared = plugin.call("moe_prepare", config=config, weights=weights, platform=platform)
    except PASSED_ON:
        raise
    except BaseException as error:  # a third party's code; chained, with the backend's name
        raise BindError(
            f"backend {name} failed to prepare its weights: {describe(error)}; choose another backend or "
            f"report it to the author of {plugin.origin or name}"
        ) from error
    if prepared is None:
        raise BindError(f"moe_prepare of backend {name} returned None, expected its weights; report it to the author")
    return prepared
