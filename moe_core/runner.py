"""MoERunner: bind once, then call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import ops
from .binding import Binding, Modules
from .capture import GraphedRunner
from .chunking import Staging, chunk_tokens, in_chunks
from .config import MoEConfig
from .consume import ConsumableWeights, consumed
from .contract import GradientsNeeded
from .errors import InputError
from .gating import cannot_replay
from .inputs import Common, common_routing, flat, given_routing, refuse_hidden_states
from .latent import check_transforms
from .platform import Platform
from .plugins import Registry, registry
from .report import SelectionReport
from .select import select
from .settings import Request, requested
from .statistics import Replay, RoutingRecord, Taps
from .types import Routing
from .weights import MoEWeights, check_weights, layer_dtype, resolve_config

if TYPE_CHECKING:
    from .parallel.mesh import Ranks

logger = logging.getLogger("moe_core")


class FallbackWarning(UserWarning):
    """A stage is served by the reference, because the chosen backend does not serve it."""


_warned: set[tuple[str, str, str]] = set()


class MoERunner:
    """One MoE layer, bound to the fastest backend that can serve it.

    Args:
        config: what the layer computes.
        weights: its tensors, all on one device, in the canonical layout.
        backend: a name; then that backend serves or an error says why not. None follows ``use_backend``,
            ``configure``, ``MOE_CORE_BACKEND`` and automatic choice, in this order.
        device: must be the weights' device if given; weights are never moved behind the caller's back.
        gate: called with [T, H] in place of the gate's product; returns router_logits [T, E], or (topk_weights,
            topk_ids), in which case it replaces the whole gate stage.
        shared_experts: called with [T, H] in place of the shared experts; returns [T, H].
        routed_input_transform, routed_output_transform: around the routed experts (latent MoE); gate and shared experts
            see the input before the transform.
        mesh: a DeviceMesh with dimensions named dp, ep or tp, or a :class:`moe_core.parallel.Parallel` that says more;
            ``weights`` are then the whole layer's, or this rank's part. None is one process.
        inplace: the routed experts may overwrite ``hidden_states``.
        consume_weights: a backend that repacks may free the originals as it goes; the caller must not use them again
            (those that were freed have no elements any more). The layer then serves inference only.

    Raises:
        ConfigError, WeightsError: config and weights do not fit.
        InputError: ``device`` or ``consume_weights`` does not go with the other arguments.
        SelectionError: no backend can serve, or the one asked for can't; the message lists every candidate.
        BindError: the backend failed to prepare its weights.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: MoEWeights,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        gate: Callable[..., Any] | None = None,
        shared_experts: Callable[..., Any] | None = None,
        routed_input_transform: Callable[[Tensor], Tensor] | None = None,
        routed_output_transform: Callable[[Tensor], Tensor] | None = None,
        mesh: Any = None,
        inplace: bool = False,
        consume_weights: bool = False,
    ) -> None:
        if consume_weights and mesh is not None:
            raise InputError(
                "consume_weights=True with a mesh: the ranks' parts are cut from weights that must stay; leave "
                "consume_weights=False, or pass this rank's part to a runner without a mesh"
            )
        # A copy of the container: replacing one of its fields afterwards must not slip past the checks below.
        container = ConsumableWeights if consume_weights else MoEWeights
        self.weights = container(**dict(weights.named_tensors()))
        self._consumed: tuple[str, ...] = ()
        self.parallel: Ranks | None = None
        if mesh is not None:
            from .parallel.mesh import Ranks  # costs what torch.distributed does

            self.parallel = Ranks.of(mesh, config, self.weights, shared_experts is not None)
        self._part: MoEWeights | None = None
        held, self._part = self._held(config)
        check_weights(held, self._part)
        self.config = resolve_config(config, self.weights)
        if device is not None and torch.device(device).type != self.weights.device.type:
            raise InputError(
                f"device={device!r}, but the weights are on {self.weights.device}; move the weights first, or leave "
                f"device=None"
            )
        self.device, self.dtype = self.weights.device, layer_dtype(self.config, self.weights)
        self._common = Common.of(self.config, self.device)
        self._may_autocast = torch.amp.is_autocast_available(self.device.type)
        check_transforms(self.config, routed_input_transform is not None, routed_output_transform is not None)
        self._modules = Modules(gate, shared_experts, routed_input_transform, routed_output_transform)
        self.opaque = self._modules.opaque
        self._inplace = inplace
        self._taps = Taps()
        self._chunk = chunk_tokens(self.config, self.dtype)
        self._staging: Staging | None = None
        if self._chunk is not None and self.parallel is None:
            self._staging = Staging(self._chunk, self.config.hidden_size, self.dtype, self.device)
        self._request: Request = requested(backend)
        self._tensors = tuple(tensor for _, tensor in self.weights.named_tensors())
        self._functions_need_grad = False
        self._lock = threading.Lock()
        self._bindings: dict[bool, Binding] = {}
        self.op = ops.op_of(self.config)
        self.handle = ops.register(self)
        trains = torch.is_grad_enabled() and self.requires_grad() and not self._request.explicit
        if trains and self.parallel is None and not consume_weights:
            self._bind(needs_grad=True)
        else:
            self._bind(needs_grad=False)

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens at most in one pass by the token and the byte budget; None where every call runs whole."""
        return self._chunk

    @property
    def report(self) -> SelectionReport:
        """What serves this layer and why; ``report.training`` is there once gradients may be needed."""
        inference = self._bindings.get(False)
        training = self._bindings.get(True)
        if inference is None:
            report = self._select(needs_grad=False)
        else:
            report = inference.report
            if counters := inference.counters():
                report = dataclasses.replace(report, counters=counters)
        if training is None:
            return report
        return dataclasses.replace(report, training=training.report)

    def capture(self, token_buckets: Sequence[int]) -> GraphedRunner:
        """Graphs of this runner for calls of up to so many tokens, where the device has graphs.

        Args:
            token_buckets: a call replays the graph of the smallest bucket that holds it; one that no bucket holds runs
                without a graph.
        Raises:
            InputError: no buckets, or a device without graphs.
        """
        return GraphedRunner(self, token_buckets)

    def refresh(self) -> None:
        """Prepare the weights again: for writes that torch can't see (``.data``, numpy, inference tensors).

        Raises:
            WeightsError: they were consumed.
        """
        if self._consumed:
            raise consumed(self._consumed, "refresh")
        with self._lock:
            bound, self._bindings = list(self._bindings), {}
        for needs_grad in bound:
            self._bind(needs_grad=needs_grad)

    def rebind(self, config: MoEConfig, weights: MoEWeights, parallel: Ranks) -> None:
        """Go on with another part of the same layer, as :func:`moe_core.parallel.apply_placement` has moved it."""
        with self._lock:
            self.config, self.weights, self.parallel = config, weights, parallel
            self._common = Common.of(config, self.device)
            self._tensors = tuple(tensor for _, tensor in weights.named_tensors())
            self._bindings = {}
        self._bind(needs_grad=False)

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_weights: Tensor | None = None,
        topk_ids: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: [..., H] in the weights' dtype, on their device.
            router_logits: [..., E], where the caller has computed them.
            topk_weights, topk_ids: [..., K] both, where the caller has routed already; no gate runs.
            input_ids: [...] token ids; only hash routing needs them.
        Returns:
            a new tensor of the shape, dtype and device of ``hidden_states``.
        Raises:
            InputError: an argument has the wrong shape, dtype or device.
            RoutingError: ids out of range, or NaN rows that the policy refuses.
            GradientError: gradients may be needed, and the backend that was asked for has no backward.
        """
        grad = torch.is_grad_enabled() and (
            hidden_states.requires_grad
            or (router_logits is not None and router_logits.requires_grad)
            or (topk_weights is not None and topk_weights.requires_grad)
            or self.requires_grad()
        )
        # The op hides from autograd what a caller's function returns.
        may_enter_op = not grad and not (self.opaque and torch.is_grad_enabled())
        if is_compiling():
            inputs = (self, hidden_states, router_logits, topk_weights, topk_ids, input_ids)
            return ops.call(*inputs) if may_enter_op else ops.outside_graph(_run, *inputs)
        binding = self._bindings.get(grad) or self._bind(needs_grad=grad)
        if binding.enters_op and may_enter_op and not self._inplace:
            # The op looks by itself whether the weights have changed.
            return ops.call(self, hidden_states, router_logits, topk_weights, topk_ids, input_ids)
        if binding.repacked and binding.is_stale():
            binding = self._bind(needs_grad=grad)
        try:
            return self.run(binding, hidden_states, router_logits, topk_weights, topk_ids, input_ids, self._inplace)
        except GradientsNeeded:
            self._functions_need_grad = True
            return self.run(self.bound(True), hidden_states, router_logits, topk_weights, topk_ids, input_ids)

    def requires_grad(self) -> bool:
        """Whether a weight, or something that the caller passed in place of one, requires gradients now."""
        return (
            self._functions_need_grad
            or any(tensor.requires_grad for tensor in self._tensors)
            or self._modules.require_grad()
        )

    def run(
        self,
        binding: Binding,
        hidden_states: Tensor,
        router_logits: Tensor | None,
        topk_weights: Tensor | None,
        topk_ids: Tensor | None,
        input_ids: Tensor | None,
        inplace: bool = False,
    ) -> Tensor:
        """Check the inputs, flatten them, run the binding and restore the shape. Both entries end here.

        Only the Python entry may pass ``inplace``: a graph believes the op's schema, by which nothing is written.
        """
        # Asked without the device's name first, which costs 2 us less.
        if torch._C._is_any_autocast_enabled() and self._may_autocast and torch.is_autocast_enabled(self.device.type):
            # Each stage says what it computes in which type; autocast would round the router, and choose other experts.
            with torch.autocast(self.device.type, enabled=False):
                return self.run(binding, hidden_states, router_logits, topk_weights, topk_ids, input_ids, inplace)
        config = self.config
        shape = hidden_states.shape
        if (
            hidden_states.dtype != self.dtype
            or hidden_states.device != self.device
            or not shape
            or shape[-1] != config.hidden_size
        ):
            refuse_hidden_states(config, hidden_states, self.dtype, self.device)
        # Most calls bring [T, H] already; each look at a tensor costs, and so does a view.
        as_is = len(shape) == 2
        tokens = shape[0] if as_is else hidden_states.numel() // config.hidden_size
        if router_logits is not None:
            router_logits = flat("router_logits", router_logits, tokens, config.num_router_outputs, self.device)
        routing: Routing | None = None
        if topk_weights is not None or topk_ids is not None:
            if router_logits is not None:
                raise InputError(
                    "router_logits and topk_ids are both given; pass the logits, or what was chosen from them"
                )
            if binding.owns_routing:
                raise InputError(
                    f"topk_ids given, but the experts of backend {binding.report.backend} route by themselves; pass "
                    f"router_logits, or choose another backend"
                )
            routing = common_routing(self._common, tokens, topk_weights, topk_ids)
            if routing is None:
                routing = given_routing(config, tokens, topk_weights, topk_ids, self.device)
        if input_ids is not None and input_ids.numel() != tokens:
            raise InputError(f"input_ids has {input_ids.numel()} ids for {tokens} tokens; pass one id a token")
        if tokens == 0 and binding.skips_empty:
            return hidden_states.new_empty(shape)
        if self._staging is not None and tokens > self._staging.rows:
            rows = hidden_states.flatten(0, -2)
            grad = binding.report.purpose == "training"
            pass_ = functools.partial(binding.forward, inplace=inplace)
            return in_chunks(pass_, self._staging, grad, rows, router_logits, routing, input_ids).view(shape)
        x = hidden_states if as_is else hidden_states.reshape(tokens, config.hidden_size)
        if not x.is_contiguous():
            x = x.contiguous()
        out = binding.forward(x, router_logits, routing, input_ids, inplace)
        return out if as_is else out.view(shape)

    @contextlib.contextmanager
    def recording(self, *, ids: bool = False) -> Iterator[RoutingRecord]:
        """Count which experts are chosen inside the ``with``, whatever backend serves.

        Args:
            ids: also keep the ids [T, K] of every call, for :meth:`replaying`.
        """
        record = RoutingRecord.empty(self.config, self.device, ids)
        before, self._taps.record = self._taps.record, record
        try:
            yield record
        finally:
            self._taps.record = before

    @contextlib.contextmanager
    def replaying(self, routed_experts: list[Tensor]) -> Iterator[None]:
        """Force recorded ids, call by call, in the order in which they were recorded; weights come from the router.

        Raises:
            InputError: the experts' backend routes by itself, or the ids do not fit the layer or (in a call) the input.
            RoutingError: ids out of range.
        """
        if any(binding.owns_routing for binding in self._bindings.values()):
            raise cannot_replay(f"the experts of backend {self.report.backend} route by themselves")
        replay = Replay(self.config, routed_experts, self.device)
        before, self._taps.replay = self._taps.replay, replay
        try:
            yield
        finally:
            self._taps.replay = before

    def _workspace_bytes(self, report: SelectionReport) -> dict[str, int]:
        declared = {}
        for stage, name in report.stages.items():
            candidate = report.candidate(name)
            declared[stage] = int(candidate.traits.get(stage, {}).get("workspace_bytes", 0)) if candidate else 0
        return {"staging": self._staging.nbytes if self._staging else 0, **declared}

    def bound_runner(self) -> MoERunner:
        """Itself; what :func:`ops.register` names has a runner or is one."""
        return self

    def bound(self, needs_grad: bool) -> Binding:
        """The current binding for a call that needs gradients, or not; bound now if it is missing or stale."""
        binding = self._bindings.get(needs_grad)
        if binding is None or (binding.repacked and binding.is_stale()):
            binding = self._bind(needs_grad=needs_grad)
        return binding

    def _select(self, *, needs_grad: bool) -> SelectionReport:
        platform = Platform.detect(self.device, self.dtype)
        return self._choose(registry(), platform, needs_grad)

    def _choose(self, plugins: Registry, platform: Platform, needs_grad: bool) -> SelectionReport:
        config = self.config if self.parallel is None else self.parallel.local_config(self.config)
        parallel = self.parallel is not None and self.parallel.dispatches
        return select(plugins, self._request, config, platform, needs_grad=needs_grad, parallel=parallel)

    def _held(self, config: MoEConfig) -> tuple[MoEConfig, MoEWeights]:
        """Config and weights of what this process holds of the layer: all of it without a mesh."""
        if self.parallel is None:
            self._part = None
            return config, self.weights
        from .parallel.shard import shard_weights

        # What was cut for the checks is what the first bind takes: a slice is a copy.
        part, self._part = self._part, None
        return self.parallel.local_config(config), part or shard_weights(config, self.weights, self.parallel)

    def _bind(self, *, needs_grad: bool) -> Binding:
        with self._lock:
            found = self._bindings.get(needs_grad)
            if found is not None and not found.is_stale():
                return found  # another thread was faster
            if self._consumed:
                raise consumed(self._consumed, "a call with gradients" if needs_grad else "binding anew")
            plugins = registry()
            platform = Platform.detect(self.device, self.dtype)
            report = self._choose(plugins, platform, needs_grad)
            caller = {"gate": self._modules.gate, "shared_experts": self._modules.shared_experts}
            replaced = {stage: "caller" for stage, module in caller.items() if module is not None}
            held = (plugins, report, *self._held(self.config), platform, self._modules)
            if self.parallel is None:
                try:
                    binding = Binding(*held, taps=self._taps, layer=int(self.handle))
                finally:
                    # Also where it failed: what was freed in part must not be read as weights.
                    if isinstance(self.weights, ConsumableWeights):
                        self._consumed = self.weights.let_go()
            else:
                binding = self.parallel.bind(*held, given=self.weights, taps=self._taps, layer=int(self.handle))
            strategies = {stage: way for stage, way in binding.report.strategies.items() if stage not in replaced}
            binding.report = dataclasses.replace(
                report,
                stages={**report.stages, **replaced},
                strategies=strategies,
                workspace_bytes=self._workspace_bytes(report),
            )
            self._bindings[needs_grad] = binding
        logger.info("%s", binding.report.summary())
        for stage, (reason, remedy) in report.fallbacks.items():
            if stage not in replaced:
                _warn_once(report.backend, stage, reason, remedy)
        plugins.notify_bound(binding.report)
        return binding


def _run(
    runner: MoERunner, hidden_states: Tensor, router_logits: Any, weights: Any, ids: Any, input_ids: Any
) -> Tensor:
    return runner(hidden_states, router_logits, topk_weights=weights, topk_ids=ids, input_ids=input_ids)


def _warn_once(backend: str, stage: str, reason: str, remedy: str) -> None:
    key = (backend, stage, reason)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"stage {stage} runs on the reference at plain-torch speed: {reason}; remedy: {remedy}",
            FallbackWarning,
            stacklevel=4,
        )
