"""What may come out of a stage, which is a third party's code: results of the right shape, and errors that name it.

A wrong shape would broadcast into garbage without an error. Each function of results names what is wrong, or returns an
empty text; only attributes are read and nothing waits for the device. Shapes follow from T and the config, so a binding
looks at every stage's result once for each T, which would cost 3 us at each call, and at the layer's output always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from .errors import MoECoreError, StageError, describe, show
from .types import ExpertsOut, Pending, Routing


class GradientsNeeded(Exception):
    """A function that the caller passed returned a tensor that requires gradients, in a binding without a backward."""


CALLERS_OWN = (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)
"""What a caller handles by type."""

PASSED_ON = (MoECoreError, GradientsNeeded, *CALLERS_OWN)
"""What leaves a third party's hook as it is; all else becomes an error of ours, chained."""


def stage_failed(stage: str, served_by: Mapping[str, str], error: BaseException) -> NoReturn:
    """Raise what a stage raised, under its name unless it is :data:`PASSED_ON`."""
    if isinstance(error, PASSED_ON):
        raise error
    raise StageError(
        f"stage {stage} of backend {served_by[stage]} failed: {describe(error)}; report it to the backend's author, or "
        f"choose another backend"
    ) from error


def check_stage(stage: str, served_by: Mapping[str, str], fault: str) -> None:
    """Raise StageError where there is a fault."""
    if fault:
        raise StageError(
            f"stage {stage} of backend {served_by[stage]} returned {fault}; a stage decides at bind whether it serves, "
            f"never during a call: report it to the backend's author, or choose another backend"
        )


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


def experts_fault(found: object, tokens: int, k: int, width: int) -> str:
    """The experts' result: [T, K, H], or [T, H] where it is reduced; a kernel's padding may follow each row."""
    if isinstance(found, ExpertsOut):
        value, reduced = found
        rows = (tokens,) if reduced else (tokens, k)
        whole = isinstance(value, Tensor) and value.shape[:-1] == rows and value.shape[-1] >= width
        if whole and isinstance(reduced, bool):
            return ""
        return f"{_what(value)} with reduced={show(reduced)}, expected {[*rows, width]} with reduced a bool"
    return f"{type(found).__name__}, expected ExpertsOut(value, reduced)"


def shared_fault(found: object, hidden_states: Tensor) -> str:
    """What the shared experts' Pending holds: [T, H]."""
    if isinstance(found, Tensor) and found.shape == hidden_states.shape:
        return ""
    return f"a Pending of {_what(found)}, expected [T, H] = {list(hidden_states.shape)}"


def pending_fault(found: object) -> str:
    """The shared experts' result before anybody waits for it."""
    return "" if isinstance(found, Pending) else f"{type(found).__name__}, expected a Pending"


def output_fault(found: object, tokens: int, width: int, dtype: torch.dtype) -> str:
    """The reduced result: [T, H] in the layer's dtype."""
    if isinstance(found, Tensor) and found.shape == (tokens, width) and found.dtype is dtype:
        return ""
    return f"{_what(found)}, expected [T, H] = {[tokens, width]} {str(dtype).removeprefix('torch.')}"


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
