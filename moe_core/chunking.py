"""Chunking: a bound on the memory of one call, nothing else.

A call of more tokens than the budget runs chunk by chunk; each row is computed and written exactly once. Ranks need no
agreement on chunks, so this is no lock-step mechanism.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .config import MoEConfig
from .streams import has_streams, is_capturing
from .types import Routing


def bytes_per_token(config: MoEConfig, dtype: torch.dtype) -> int:
    """Intermediate bytes that a token needs at most: both products of K experts, their float32 sum, the shared ones."""
    size = dtype.itemsize
    routed = config.top_k * (config.w13_rows * size + config.intermediate_size * size + config.expert_hidden_size * 4)
    inner = config.shared_intermediate_size or 0
    shared = inner * (3 if config.gated else 2) * size + (config.hidden_size * 4 if inner else 0)
    return routed + shared + config.num_router_outputs * 8 + config.hidden_size * (4 + size)


def chunk_tokens(config: MoEConfig, dtype: torch.dtype) -> int | None:
    """Tokens in one chunk by the token and the byte budget, at least 1; None where neither is set."""
    budgets = []
    if config.max_chunk_tokens is not None:
        budgets.append(config.max_chunk_tokens)
    if config.max_chunk_bytes is not None:
        budgets.append(max(1, config.max_chunk_bytes // bytes_per_token(config, dtype)))
    return min(budgets, default=None)


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Disjoint slices that cover 0 .. tokens - 1 in order; none for no tokens."""
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


class Staging:
    """Buffers [chunk, H] for chunks that are not contiguous in the caller's tensor.

    One is allocated at bind. A call leases one for as long as it runs; a second caller at the same time, or a stream
    that is being captured (whose graph must own its memory), gets one of its own.
    """

    def __init__(self, size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = (size, width), dtype, device
        self._lock = threading.Lock()
        self._free: dict[int, list[Tensor]] = {self._stream(): [self._new()]}

    @property
    def rows(self) -> int:
        """Tokens that a buffer holds."""
        return self._shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated at bind."""
        return self._shape[0] * self._shape[1] * self._dtype.itemsize

    def lease(self) -> Tensor:
        """A buffer that nobody else uses until it is given back."""
        if is_capturing(self._device):
            return self._new()
        with self._lock:
            free = self._free.get(self._stream())
            return free.pop() if free else self._new()

    def give_back(self, buffer: Tensor) -> None:
        """Return a leased buffer; later work on the same stream may use it."""
        if is_capturing(self._device):
            return
        with self._lock:
            self._free.setdefault(self._stream(), []).append(buffer)

    def _new(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def _stream(self) -> int:
        if not has_streams(self._device):
            return 0
        return int(torch.accelerator.current_stream(self._device).stream_id)


def in_chunks(
    forward: Callable[[Tensor, Tensor | None, Routing | None, Tensor | None], Tensor],
    staging: Staging,
    grad: bool,
    rows: Tensor,
    router_logits: Tensor | None,
    routing: Routing | None,
    input_ids: Tensor | None,
) -> Tensor:
    """Chunk by chunk into one output [T, H]; rows that are not contiguous pass through a staging buffer.

    Args:
        forward: one pass, of rows [t, H] and what belongs to them.
        grad: gradients may be needed, so nothing is written in place.
        rows: [T, H].
    """
    out = None if grad else rows.new_empty(rows.shape)
    ids = None if input_ids is None else input_ids.reshape(-1)
    pieces: list[Tensor] = []
    buffer = None if grad else staging.lease()
    try:
        for part in chunks(rows.shape[0], staging.rows):
            x = rows[part]
            if not x.is_contiguous():
                x = x.contiguous() if buffer is None else buffer[: x.shape[0]].copy_(x)
            y = forward(
                x,
                None if router_logits is None else router_logits[part],
                None if routing is None else Routing(routing.topk_weights[part], routing.topk_ids[part]),
                None if ids is None else ids[part],
            )
            if out is None:
                pieces.append(y)
            else:
                out[part] = y
    finally:
        if buffer is not None:
            staging.give_back(buffer)
    return torch.cat(pieces) if out is None else out
