"""The custom ops: how a compiled or captured graph sees a layer as one opaque call.

One pair serves all layers: ``moe_forward`` for layers without shared experts, ``moe_forward_shared`` for those with
them, so that a graph's profile shows which is which. The layer is named by a handle that travels as a 0-d CPU tensor,
because an integer would be baked into each compiled graph and every layer would compile anew.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .runner import MoERunner

_SCHEMA = (
    "(Tensor hidden_states, Tensor? router_logits, Tensor? topk_weights, Tensor? topk_ids, Tensor? input_ids, "
    "Tensor handle) -> Tensor"
)
_library = torch.library.Library("moe_core", "DEF")
_runners: weakref.WeakValueDictionary[int, MoERunner] = weakref.WeakValueDictionary()
_next_handle = itertools.count()


def register(runner: MoERunner) -> Tensor:
    """A handle for ``runner``, valid as long as it lives."""
    number = next(_next_handle)
    _runners[number] = runner
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _run(
    hidden_states: Tensor,
    router_logits: Tensor | None,
    topk_weights: Tensor | None,
    topk_ids: Tensor | None,
    input_ids: Tensor | None,
    handle: Tensor,
) -> Tensor:
    number = int(handle)
    runner = _runners.get(number)
    if runner is None:
        raise InputError(f"handle {number} names no living MoERunner; keep the runner alive as long as its graph")
    binding = runner.bound(needs_grad=False)
    return runner.run(binding, hidden_states, router_logits, topk_weights, topk_ids, input_ids)


def _fake(
    hidden_states: Tensor,
    router_logits: Tensor | None,
    topk_weights: Tensor | None,
    topk_ids: Tensor | None,
    input_ids: Tensor | None,
    handle: Tensor,
) -> Tensor:
    return torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)


for _name in ("moe_forward", "moe_forward_shared"):
    _library.define(_name + _SCHEMA)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_core::{_name}", _fake, lib=_library)


def call(
    runner: MoERunner,
    hidden_states: Tensor,
    router_logits: Tensor | None,
    topk_weights: Tensor | None,
    topk_ids: Tensor | None,
    input_ids: Tensor | None,
) -> Tensor:
    """Enter through the op of this layer's kind. Gives no gradients: training never comes this way."""
    namespace = torch.ops.moe_core
    op = namespace.moe_forward_shared if runner.config.has_shared_experts else namespace.moe_forward
    return op(hidden_states, router_logits, topk_weights, topk_ids, input_ids, runner.handle)  # type: ignore[no-any-return]
