"""What was routed where: captured on request, for any backend, and replayed.

Off, it costs one comparison with None a call.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import MoEConfig
from .errors import InputError
from .routing import check_ids


@dataclass
class RoutingRecord:
    """Filled by ``with runner.recording() as record``.

    The counts live on the layer's device and are summed over all calls; a captured graph goes on counting when it is
    replayed. ``routed_experts`` holds the ids [T, K] of each call with tokens (each chunk of a chunked one), logical
    ids before any placement, if they were asked for.
    """

    _counts: Tensor
    keep_ids: bool
    routed_experts: list[Tensor] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def empty(cls, config: MoEConfig, device: torch.device, keep_ids: bool) -> RoutingRecord:
        """No tokens yet."""
        # One more place than ids, for -1 and whatever is no id: a selection would have a size that depends on data.
        return cls(torch.zeros(config.num_router_outputs + 1, dtype=torch.int64, device=device), keep_ids)

    def add(self, topk_ids: Tensor) -> None:
        """Count one call; does not wait for the device."""
        places, nobody = topk_ids.reshape(-1).long(), self._counts.numel() - 1
        places = places.masked_fill((places < 0) | (places > nobody), nobody)
        with self._lock:
            self._counts.scatter_add_(0, places, torch.ones_like(places))
            if self.keep_ids and topk_ids.shape[0]:
                self.routed_experts.append(topk_ids.clone())

    @property
    def tokens_per_expert(self) -> Tensor:
        """[E + zero experts] int64: how often each was chosen."""
        return self._counts[:-1]


class Replay:
    """Recorded ids handed out call by call."""

    def __init__(self, config: MoEConfig, routed_experts: list[Tensor], device: torch.device) -> None:
        self._ids = list(routed_experts)
        self._top_k, self._device = config.top_k, device
        for call, ids in enumerate(self._ids):
            if ids.ndim != 2 or ids.shape[1] != config.top_k or ids.dtype not in (torch.int32, torch.int64):
                raise InputError(
                    f"replay: the ids of call {call} are {tuple(ids.shape)} of {ids.dtype}, expected int32 or int64 "
                    f"[T, K] with K = top_k = {config.top_k}; pass what recording(ids=True) kept"
                )
            check_ids(config, ids)
        self._next = 0
        self._lock = threading.Lock()

    def take(self, tokens: int) -> Tensor:
        """The ids of the next call.

        Raises:
            InputError: there are none left, or they belong to another number of tokens.
        """
        if tokens == 0:  # calls without tokens may skip the gate, so they are neither recorded nor replayed
            return torch.empty(0, self._top_k, dtype=torch.int32, device=self._device)
        with self._lock:
            if self._next == len(self._ids):
                raise InputError(
                    f"replay: {self._next} calls were recorded and all are used; record as many as you replay"
                )
            ids = self._ids[self._next]
            if ids.shape[0] != tokens:
                raise InputError(
                    f"replay: call {self._next} was recorded with {ids.shape[0]} tokens, this has {tokens}; replay the "
                    f"calls in the order in which they were recorded"
                )
            self._next += 1
            return ids


@dataclass
class Taps:
    """What a runner wants to see, or to force, of the routing; both None almost always."""

    record: RoutingRecord | None = None
    replay: Replay | None = None
