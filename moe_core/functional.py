"""fused_experts: routed experts as one function call, for code that has its own router."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import MoEConfig
from .errors import InputError, RoutingError, WeightsError
from .runner import MoERunner
from .settings import requested
from .weights import MoEWeights

_lock = threading.Lock()
_bound: dict[tuple[Any, ...], tuple[MoERunner, tuple[weakref.ref[Tensor] | None, ...]]] = {}


def fused_experts(
    hidden_states: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str | Callable[[Tensor], Tensor] = "silu",
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Routed experts and their weighted sum.

    Args:
        hidden_states: [..., H].
        w13_weight: [E, 2I, H], gate rows first, or [E, I, H] for experts without a gate.
        w2_weight: [E, H, I].
        topk_weights, topk_ids: [..., K]; an id of -1 contributes nothing.
        activation: a name of :data:`moe_core.activations.ACTIVATIONS` or a callable.
        w13_bias, w2_bias: [E, 2I] (or [E, I]) and [E, H].
        expert_map: int [number of experts in the whole layer], global id -> index into the weights, -1 elsewhere.
        backend: as for :class:`MoERunner`.
    Returns:
        the shape and dtype of ``hidden_states``. Bindings are cached by the weights' identity and dropped with them.
    Raises:
        InputError, WeightsError, RoutingError, SelectionError: as for :class:`MoERunner`.
    """
    if topk_ids.ndim < 1:
        raise InputError(f"topk_ids has shape {tuple(topk_ids.shape)}, expected [T, K]")
    if expert_map is not None:
        topk_ids = map_expert_ids(topk_ids, expert_map)
    runner = _runner(w13_weight, w2_weight, w13_bias, w2_bias, activation, int(topk_ids.shape[-1]), backend)
    return runner(hidden_states, topk_weights=topk_weights, topk_ids=topk_ids)


def map_expert_ids(topk_ids: Tensor, expert_map: Tensor) -> Tensor:
    """Global to local ids; -1 stays -1, and so does what the map lacks, where that is not checked.

    Raises:
        RoutingError: an id outside -1 .. len(expert_map) - 1, where checking it costs no synchronisation.
    """
    if topk_ids.device.type == "cpu":
        bad = (topk_ids < -1) | (topk_ids >= expert_map.numel())
        if topk_ids.numel() and bool(bad.any()):
            raise RoutingError(
                f"topk_ids holds {int(topk_ids[bad][0])}: expected -1 or 0 to {expert_map.numel() - 1}, the ids that "
                f"expert_map covers"
            )
    known = (topk_ids >= 0) & (topk_ids < expert_map.numel())
    local = expert_map[torch.where(known, topk_ids, 0).long()]
    return local.masked_fill(~known, -1)


def _runner(
    w13_weight: Tensor,
    w2_weight: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    activation: Any,
    top_k: int,
    backend: str | None,
) -> MoERunner:
    tensors = (w13_weight, w2_weight, w13_bias, w2_bias)
    facts = tuple(None if t is None else (id(t), t.dtype, t.device, t.requires_grad) for t in tensors)
    key = (*facts, activation, top_k, requested(backend))
    found = _bound.get(key)
    if found is not None and all(ref is None or ref() is t for ref, t in zip(found[1], tensors, strict=True)):
        return found[0]
    if w13_weight.ndim != 3 or w2_weight.ndim != 3:
        raise WeightsError(
            f"w13_weight {tuple(w13_weight.shape)}, w2_weight {tuple(w2_weight.shape)}: expected [E,2I,H] and [E,H,I]"
        )
    experts, rows, hidden = w13_weight.shape
    inner = w2_weight.shape[2]
    if rows not in (inner, 2 * inner):
        raise WeightsError(
            f"w13_weight has {rows} rows, expected 2I = {2 * inner} or, without a gate, I = {inner} from w2_weight "
            f"{tuple(w2_weight.shape)}; transpose one of them"
        )
    # Of a larger layer only some experts may be held here, so top_k may exceed them; ids are checked against these.
    config = MoEConfig(
        hidden,
        inner,
        max(experts, top_k),
        top_k,
        num_local_experts=experts,
        activation=activation,
        gated=rows == 2 * inner,
    )
    weights = MoEWeights(w13_weight=w13_weight, w2_weight=w2_weight, w13_bias=w13_bias, w2_bias=w2_bias)
    runner = MoERunner(config, weights, backend=backend)

    def forget(_: weakref.ref[Tensor]) -> None:
        _bound.pop(key, None)

    refs = tuple(None if t is None else weakref.ref(t, forget) for t in tensors)
    with _lock:
        _bound[key] = (runner, refs)
    return runner


__all__ = ["fused_experts", "map_expert_ids"]
