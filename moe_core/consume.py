"""Weights whose memory a backend may free as soon as it has packed them (``consume_weights``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .errors import WeightsError
from .pages import advise
from .weights import MoEWeights

STAGES = {"experts": ("w13_weight", "w2_weight"), "shared_experts": ("shared_w13_weight", "shared_w2_weight")}
"""The matrices that a stage alone reads: all others are small, and the router's stay with the layer."""


@dataclass
class ConsumableWeights(MoEWeights):
    """The caller has given its tensors away."""

    def __post_init__(self) -> None:
        self._allowed: frozenset[str] = frozenset()
        self.spent: set[str] = set()

    def allow(self, stages: Iterable[str]) -> None:
        """Only what these stages read may be released from now on: another backend still reads the rest."""
        self._allowed = frozenset(name for stage in stages for name in STAGES.get(stage, ()))

    def release(self, name: str, expert: int | None = None) -> None:
        """As :meth:`MoEWeights.release`; pages go back at once, the tensor itself with :meth:`let_go`."""
        if name not in self._allowed:
            return
        self.spent.add(name)
        tensor = getattr(self, name)
        # Pages can go before the tensor as a whole does. Experts of another layout may lie in one another.
        if expert is not None and tensor.is_contiguous() and tensor.device.type == "cpu":
            advise(tensor[expert], "MADV_DONTNEED")

    def let_go(self) -> tuple[str, ...]:
        """Empty what was released: the caller's tensors have no elements any more, these have no memory.

        Returns: the names, in the order of the fields.
        """
        names = tuple(name for name, _ in self.named_tensors() if name in self.spent)
        for name in names:
            tensor = getattr(self, name)
            setattr(self, name, torch.empty_like(tensor, device="meta", requires_grad=False))
            with torch.inference_mode(tensor.is_inference()):
                tensor.data = tensor.new_empty(0)
        self.spent.clear()
        return names


def consumed(names: tuple[str, ...], purpose: str) -> WeightsError:
    """The error of whoever needs such weights again."""
    return WeightsError(
        f"{', '.join(names)} of this layer had {'its' if len(names) == 1 else 'their'} memory given to the backend "
        f"(consume_weights=True), but {purpose} needs them; load them again, and make the runner with "
        f"consume_weights=False"
    )
