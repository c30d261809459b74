"""What a stage may return: a wrong shape would broadcast into garbage without an error.

Each function names what is wrong, or returns an empty text. Only attributes are read and nothing waits for the device.
Shapes follow from T and the config, so a binding looks at every stage's result once for each T, which would cost 3 us
at each call, and at the layer's output always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import show
from .types import ExpertsOut, Pending, Routing

CALLERS_OWN = (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)
"""What a caller handles by type: these leave a third party's hook as they are; all else becomes an error of ours."""


def routing_fault(found: object, tokens: int, k: int) -> str:
    """A gate's result: weights [T, K] float32 and ids [T, K] int32."""
    if isinstance(found, Routing):
        weights, ids = found
        if isinstance(weights, Tensor) and isinstance(ids, Tensor):
            shape = (tokens, k)
            shaped = weights.shape == shape and ids.shape == shape
            if shaped and weights.dtype is torch.float32 and ids.dtype is torch.int32:
                return ""
        return (
            f"topk_weights {_what(weights)} and topk_ids {_what(ids)}, expected [{tokens}, {k}] float32 and "
            f"[{tokens}, {k}] int32"
        )
    return f"{type(found).__name__}, expected Routing(topk_weights, topk_ids)"


def experts_fault(found: object, hidden_states: Tensor, k: int) -> str:
    """The experts' result: [T, K, H], or [T, H] where it is reduced."""
    if isinstance(found, ExpertsOut):
        value, reduced = found
        tokens, width = hidden_states.shape
        shape = (tokens, width) if reduced else (tokens, k, width)
        if isinstance(value, Tensor) and value.shape == shape and isinstance(reduced, bool):
            return ""
        return f"{_what(value)} with reduced={show(reduced)}, expected {list(shape)} with reduced a bool"
    return f"{type(found).__name__}, expected ExpertsOut(value, reduced)"


def shared_fault(found: object, hidden_states: Tensor) -> str:
    """What the shared experts' Pending holds: [T, H]."""
    if isinstance(found, Tensor) and found.shape == hidden_states.shape:
        return ""
    return f"a Pending of {_what(found)}, expected [T, H] = {list(hidden_states.shape)}"


def pending_fault(found: object) -> str:
    """The shared experts' result before anybody waits for it."""
    return "" if isinstance(found, Pending) else f"{type(found).__name__}, expected a Pending"


def output_fault(found: object, hidden_states: Tensor, dtype: torch.dtype) -> str:
    """The reduced result: [T, H] in the layer's dtype."""
    if isinstance(found, Tensor) and found.shape == hidden_states.shape and found.dtype is dtype:
        return ""
    return f"{_what(found)}, expected [T, H] = {list(hidden_states.shape)} {str(dtype).removeprefix('torch.')}"


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
