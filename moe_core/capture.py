"""Graphed calls of a bound runner, for callers without graphs of their own: one graph for each bucket of tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .binding import Binding
    from .runner import MoERunner

WARM_UP_CALLS = 3
"""Before a capture: kernels are compiled, libraries make their handles, the allocator settles."""


@dataclass(frozen=True)
class _Graph:
    """One captured call: what it reads, what it writes, and the binding that it was captured from."""

    binding: Binding
    graph: Any
    given: Tensor
    out: Tensor


class GraphedRunner:
    """``MoERunner.capture``: calls of up to the largest bucket replay a graph, any other call runs as it always did.

    A call copies its rows into the bucket's buffer, replays, and gets a copy of its rows of the result. Rows of the
    buffer behind them are computed too, and belong to nobody. Calls of several threads or streams take turns.
    A bucket whose weights changed since is captured again at its next call.
    """

    def __init__(self, runner: MoERunner, token_buckets: Sequence[int]) -> None:
        buckets = sorted(set(token_buckets))
        if not buckets or not all(isinstance(size, int) and size > 0 for size in buckets):
            raise InputError(f"token_buckets={list(token_buckets)!r}: expected positive numbers of tokens; pass [1, 8]")
        module = torch.get_device_module(runner.device) if runner.device.type != "cpu" else None
        self._new: Any = getattr(module, f"{runner.device.type.upper()}Graph", None)
        self._capturing: Any = getattr(module, "graph", None)
        if module is None or self._new is None or self._capturing is None:
            raise InputError(
                f"capture: torch {torch.__version__} has no graphs on {runner.device}; call the runner itself"
            )
        self._module: Any = module
        self.runner, self.token_buckets = runner, tuple(buckets)
        self._lock = threading.Lock()
        self._pool: Any = None
        self._last: Any = None
        self._graphs: dict[int, _Graph] = {}
        with torch.no_grad():
            # The largest first: the smaller ones then fit into its memory.
            for size in reversed(self.token_buckets):
                self._graphs[size] = self._capture(size)

    def bucket(self, tokens: int) -> int | None:
        """The bucket that a call of so many tokens replays; None where it runs without a graph."""
        if not tokens:
            return None
        if self.runner.config.expert_capacity is not None:
            # Rows of padding would take room in the experts that belongs to the caller's.
            return tokens if tokens in self._graphs else None
        return next((size for size in self.token_buckets if size >= tokens), None)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """The layer's output for hidden_states [..., H]; gradients need the runner itself."""
        runner = self.runner
        width = runner.config.hidden_size
        fits = (
            hidden_states.dtype == runner.dtype
            and hidden_states.device == runner.device
            and hidden_states.ndim > 0
            and hidden_states.shape[-1] == width
        )
        # A replay hides from autograd what went in, the parameters among it; of functions nobody knows before the call.
        grad = torch.is_grad_enabled() and (hidden_states.requires_grad or runner.requires_grad() or runner.opaque)
        size = self.bucket(hidden_states.numel() // width) if fits and not grad else None
        if size is None:
            return runner(hidden_states)
        rows = hidden_states.reshape(-1, width)
        count = rows.shape[0]
        stream = self._module.current_stream(runner.device)
        with self._lock, torch.no_grad():
            # One graph runs at a time: its buffers are the same in every call.
            if self._last is not None:
                stream.wait_event(self._last)
            captured = self._graphs[size]
            if runner.bound(False) is not captured.binding:
                captured = self._graphs[size] = self._capture(size)
            captured.given[:count].copy_(rows)
            captured.graph.replay()
            out = captured.out[:count].clone()
            self._last = stream.record_event()
        return out.view(hidden_states.shape)

    def _capture(self, size: int) -> _Graph:
        runner, module = self.runner, self._module
        given = torch.zeros(size, runner.config.hidden_size, dtype=runner.dtype, device=runner.device)
        side = module.Stream(runner.device)
        side.wait_stream(module.current_stream(runner.device))
        with module.stream(side):
            for _ in range(WARM_UP_CALLS):
                runner(given)
        module.current_stream(runner.device).wait_stream(side)
        binding, graph = runner.bound(False), self._new()
        with self._capturing(graph, pool=self._pool):
            out = runner(given)
        if self._pool is None:
            self._pool = graph.pool()
        return _Graph(binding, graph, given, out)
