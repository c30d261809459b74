"""The custom ops: how a compiled or captured graph sees a layer as one opaque call.

One pair serves all layers: ``moe_forward`` for layers without shared experts, ``moe_forward_shared`` for those with
them, so that a graph's profile shows which is which. The layer is named by a handle that travels as a 0-d CPU tensor,
because an integer would be baked into each compiled graph and every layer would compile anew.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .config import MoEConfig
    from .runner import MoERunner

_SCHEMA = (
    "(Tensor hidden_states, Tensor? router_logits, Tensor? topk_weights, Tensor? topk_ids, Tensor? input_ids, "
    "Tensor handle) -> Tensor"
)
_library = torch.library.Library("moe_core", "DEF")
_runners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_next_handle = itertools.count()


def op_of(config: MoEConfig) -> Any:
    """Which op of the pair serves a layer; it is kept, because a graph guards whatever it reads on the way to it."""
    namespace = torch.ops.moe_core
    return namespace.moe_forward_shared.default if config.has_shared_experts else namespace.moe_forward.default


def register(runner: Any) -> Tensor:
    """A handle for a runner, or for a module that has one, valid as long as it lives."""
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
    owner = _runners.get(number)
    if owner is None:
        raise InputError(f"handle {number} names no living MoERunner; keep the runner alive as long as its graph")
    runner: MoERunner = owner.bound_runner()
    return runner.run(runner.bound(False), hidden_states, router_logits, topk_weights, topk_ids, input_ids)


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


def outside_graph(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function``; a graph that is being traced breaks here, and nothing behind it is traced."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(function)(*arguments)
    return function(*arguments)


# What torch.compiler.disable sets; as a decorator it would import the compiler for everybody.
outside_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def call(
    runner: Any,
    hidden_states: Tensor,
    router_logits: Tensor | None,
    topk_weights: Tensor | None,
    topk_ids: Tensor | None,
    input_ids: Tensor | None,
) -> Tensor:
    """Enter through the op of this layer's kind. Gives no gradients: training never comes this way."""
    return runner.op(hidden_states, router_logits, topk_weights, topk_ids, input_ids, runner.handle)  # type: ignore[no-any-return]
