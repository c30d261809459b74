"""The router on XLA: the logits with the whole of float32, then the public routing function, which is static."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_core import Routing
from moe_core.errors import InputError
from moe_core.routing import route
from moe_core.types import Plan


def gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """[T, H] (or [T, E] logits) to Routing."""
    plain = plan.weights.plain
    if not hidden_states.shape[0]:  # torch_xla has no form for some operators on nothing
        weights = torch.empty(0, plan.config.top_k, dtype=torch.float32, device=hidden_states.device)
        return Routing(weights, torch.empty_like(weights, dtype=torch.int32))
    if router_logits is None:
        if plain.gate_weight is None:
            raise InputError(
                "router_logits=None and the layer has no gate_weight; pass router_logits, topk_weights+topk_ids, or "
                "gate="
            )
        router_logits = plan.weights.ops.router_logits(hidden_states, plain.gate_weight, plain.gate_bias)
    with _Picking():
        return route(plan.config, plain, router_logits, hidden_states=hidden_states, input_ids=input_ids)


class _Picking(TorchFunctionMode):
    """Inside, ``gather`` along a row of experts compares with every expert instead.

    A TPU gathers single numbers by reading a tile of 4 KB for each. Compiled for v6e, 2048 tokens of 128 experts and
    top 8: the gather of the weights alone was 1.1 GB, more than half of what the layer moved besides its experts.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(named or {})
        if function is torch.Tensor.gather and not named and arguments[1] in (1, -1) and arguments[0].ndim == 2:
            return pick(arguments[0], arguments[2])
        return function(*arguments, **named)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """``values.gather(1, index)`` for [T, E] and [T, K], to the last bit; each row holds few enough to look at all."""
    places = torch.arange(values.shape[1], device=values.device)
    # Not a product with ones and zeros: what is not picked may be infinite.
    return torch.where(index.unsqueeze(-1) == places, values.unsqueeze(1), 0).sum(-1).to(values.dtype)
