"""MoELayer: an nn.Module that owns the parameters and lets a runner do the work."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import ops
from .config import MoEConfig
from .errors import ConfigError
from .report import SelectionReport
from .runner import MoERunner
from .weights import MoEWeights

_RUNTIME_STATE = ("_runner", "_bound_to", "handle", "op", "mesh")


class BoundModule(nn.Module):
    """A module whose tensors an :class:`MoERunner` works on; it rebinds when they move, change type or are replaced.

    A subclass sets ``config`` and ``backend`` and says in :meth:`weights` how its parameters and buffers make up
    MoEWeights. What :meth:`exact_tensor` gives stays float32 through ``.to(dtype)``.
    """

    config: MoEConfig
    backend: str | None
    mesh: Any = None
    """As for :class:`MoERunner`; :func:`moe_core.parallel.spread_model` sets it. A copy of the layer has none."""

    def __init__(self, config: MoEConfig, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self._runner: MoERunner | None = None
        self._bound_to: list[Any] = []
        self.op = ops.op_of(config)
        self.handle = ops.register(self)

    def weights(self) -> MoEWeights:
        """The parameters and buffers in the canonical layout."""
        raise NotImplementedError

    def runner_options(self) -> dict[str, Any]:
        """Further keyword arguments of :class:`MoERunner`."""
        return {}

    def exact_tensor(self) -> Tensor | None:
        """The correction bias, where there is one: rounded, it would choose other experts."""
        return getattr(self, "e_score_correction_bias", None)

    @property
    def runner(self) -> MoERunner:
        """The bound runner; binds if need be."""
        return _InGraph(self) if is_compiling() else self.bound_runner()  # type: ignore[return-value]

    def bound_runner(self) -> MoERunner:
        """The runner of the tensors that are here now; binds if need be."""
        runner = self._runner
        if runner is not None and self.still_bound():
            return runner
        identity = self.identity()
        options = {"backend": self.backend, "mesh": self.mesh, **self.runner_options()}
        self._runner = MoERunner(self.config, self.weights(), **options)
        self._bound_to = identity
        return self._runner

    def identity(self) -> list[Any]:
        """What must stay equal for the bound runner to stay valid."""
        tensors = (*self._parameters.values(), *self._buffers.values())
        return [(tensor, getattr(tensor, "dtype", None), getattr(tensor, "device", None)) for tensor in tensors]

    def still_bound(self) -> bool:
        """Whether :meth:`identity` is what it was; cheap, it is asked at every call."""
        tensors, bound_to = (*self._parameters.values(), *self._buffers.values()), self._bound_to
        if len(tensors) != len(bound_to):
            return False
        # A loop, no generator: inside a compiled graph each step of one would pass through the compiler's frame hook.
        for tensor, (was, dtype, device) in zip(tensors, bound_to, strict=True):
            if tensor is not was or (tensor is not None and (tensor.dtype is not dtype or tensor.device != device)):
                return False
        return True

    @property
    def report(self) -> SelectionReport:
        """Which backend serves this layer and why."""
        return self.runner.report

    def extra_repr(self) -> str:
        c = self.config
        sizes = ("hidden_size", "intermediate_size", "num_experts", "top_k")
        return ", ".join(f"{name}={getattr(c, name)}" for name in sizes)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        bias = self.exact_tensor()
        exact = None if bias is None or bias.dtype != torch.float32 else bias.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.exact_tensor()
        if exact is not None and moved is not None and moved.dtype != torch.float32:
            moved.data = exact.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Bound runners hold locks and repacked weights; a copy or an unpickled layer binds anew.
        return {**self.__dict__, **dict.fromkeys(_RUNTIME_STATE), "_bound_to": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.op = ops.op_of(self.config)
        self.handle = ops.register(self)


class MoELayer(BoundModule):
    """An MoE layer with parameters of its own.

    The parameters have the names of :class:`MoEWeights`; ``e_score_correction_bias`` is a float32 buffer and stays
    float32 through ``.to(dtype)``. It rebinds when its device, dtype or parameters change.

    The buffer ``tid2eid`` [vocabulary, K] of hash routing is None until it is assigned or loaded, as no field of the
    config says how many token ids there are.

    Args:
        config: what the layer computes; a bias field of None means no bias.
        backend: as for :class:`MoERunner`.
        dtype, device: of the parameters; None is torch's default.
    Raises:
        ConfigError: quantised configs, whose weights cannot be initialised.
    """

    e_score_correction_bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(
        self,
        config: MoEConfig,
        *,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, backend)
        for name, shape in parameter_shapes(config).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        bias = None
        if config.e_score_correction_bias:
            bias = torch.zeros(config.num_router_outputs, dtype=torch.float32, device=device)
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("tid2eid", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan_in), as nn.Linear; biases zero, scales and norms one."""
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    parameter.zero_()
                elif name in ("per_expert_scale", "post_expert_norm_weight"):
                    parameter.fill_(1.0)
                else:
                    bound = 1 / math.sqrt(parameter.shape[-1])
                    parameter.uniform_(-bound, bound)

    def weights(self) -> MoEWeights:
        """The parameters and buffers as MoEWeights; nothing is copied."""
        tensors: dict[str, Any] = dict(self.named_parameters(recurse=False))
        tensors["e_score_correction_bias"] = self.e_score_correction_bias
        tensors["tid2eid"] = self.tid2eid
        return MoEWeights(**tensors)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        table = state_dict.get(f"{prefix}tid2eid")
        if self.config.hash_routing and self.tid2eid is None and table is not None:
            self.tid2eid = torch.empty_like(table, device=self.weights().device)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_weights: Tensor | None = None,
        topk_ids: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`MoERunner.__call__`: [..., H] to [..., H]."""
        return self.runner(
            hidden_states, router_logits, topk_weights=topk_weights, topk_ids=topk_ids, input_ids=input_ids
        )


class _InGraph:
    """What stands for a layer's runner while a graph is traced: one op, which binds when the graph runs.

    Where gradients may be needed the graph breaks, and the layer runs outside.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def weights(self) -> MoEWeights:
        """The layer's, bound or not."""
        return self.layer.weights()  # type: ignore[no-any-return]

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_weights: Tensor | None = None,
        topk_ids: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor:
        layer, inputs = self.layer, (router_logits, topk_weights, topk_ids, input_ids)
        if torch.is_grad_enabled():  # first, because each parameter that is looked at becomes a guard of the graph
            tensors = (hidden_states, *inputs, *layer.parameters())
            if any(t is not None and t.requires_grad for t in tensors):
                return ops.outside_graph(_run, layer, hidden_states, *inputs)  # type: ignore[no-any-return]
        return ops.call(layer, hidden_states, *inputs)


def _run(
    layer: Any, hidden_states: Tensor, router_logits: Any, topk_weights: Any, topk_ids: Any, input_ids: Any
) -> Tensor:
    return layer.runner(  # type: ignore[no-any-return]
        hidden_states, router_logits, topk_weights=topk_weights, topk_ids=topk_ids, input_ids=input_ids
    )


def parameter_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters of a layer, in the canonical layout."""
    if config.quant is not None:
        raise ConfigError(
            f"quant={config.quant!r}: a MoELayer initialises its own parameters, expected quant=None; load quantised "
            f"weights into MoEWeights and use MoERunner"
        )
    experts, rows, hidden, width = (
        config.num_held_experts,
        config.num_router_outputs,
        config.hidden_size,
        config.expert_hidden_size,
    )
    shapes: dict[str, tuple[int, ...]] = {"gate_weight": (rows, hidden)}
    if config.gate_bias:
        shapes["gate_bias"] = (rows,)
    if config.per_expert_scale:
        shapes["per_expert_scale"] = (rows,)
    shapes["w13_weight"] = (experts, config.w13_rows, width)
    shapes["w2_weight"] = (experts, width, config.intermediate_size)
    if config.expert_bias:
        shapes |= {"w13_bias": (experts, config.w13_rows), "w2_bias": (experts, width)}
    if config.post_expert_norm_eps is not None:
        shapes["post_expert_norm_weight"] = (width,)
    if config.shared_intermediate_size is not None:
        shared = config.shared_intermediate_size
        rows13 = shared * (2 if config.gated else 1)
        shapes |= {"shared_w13_weight": (rows13, hidden), "shared_w2_weight": (hidden, shared)}
        if config.shared_expert_bias:
            shapes |= {"shared_w13_bias": (rows13,), "shared_w2_bias": (hidden,)}
        if config.shared_expert_gate:
            shapes["shared_gate_weight"] = (1, hidden)
    return shapes
