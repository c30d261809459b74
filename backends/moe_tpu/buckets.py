"""Token counts as a bounded set: XLA compiles a graph for each shape, which takes seconds.

Only what enters the device can bound the shapes of what runs on it: a pad on the device is a graph of its own for each
token count. So :class:`Bucketed` pads on the host, where tokens come from, and hands back which rows are real.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch_xla
from torch import Tensor

from moe_core import MoERunner
from moe_core.errors import InputError
from moe_core.report import SelectionReport

from .metrics import compilations

SMALLEST = 16
LAST_POWER = 2048
STEP = 512


def bucket_of(tokens: int) -> int:
    """The smallest bucket that holds ``tokens``: a power of two from 16, above 2048 a multiple of 512."""
    if tokens <= LAST_POWER:
        return max(SMALLEST, 1 << max(tokens - 1, 0).bit_length())
    return -(-tokens // STEP) * STEP


def buckets_up_to(tokens: int) -> list[int]:
    """Every bucket that a call of at most ``tokens`` tokens can fall into, ascending."""
    sizes = [bucket_of(1)]
    while sizes[-1] < tokens:
        sizes.append(bucket_of(sizes[-1] + 1))
    return sizes


def pad_rows(tensor: Tensor, rows: int, value: float = 0) -> Tensor:
    """[T, ...] with rows of ``value`` appended up to ``rows``."""
    missing = rows - tensor.shape[0]
    return tensor if not missing else F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing), value=value)


class Padded(NamedTuple):
    """A result of a bucket's size on the device: rows from ``tokens`` on belong to nobody."""

    value: Tensor
    tokens: int

    def cpu(self) -> Tensor:
        """The real rows, on the host."""
        return self.value.cpu()[: self.tokens]


class Bucketed:
    """A runner whose calls come from the host, any number of tokens each, and compile at most once a bucket.

    Args:
        runner: bound to this backend, weights on the XLA device.
        max_tokens: no call has more.
        warm_up: compile every bucket now.
    Raises:
        InputError: a layer in which padding rows would compete with real ones.
    """

    def __init__(self, runner: MoERunner, max_tokens: int, *, warm_up: bool = False) -> None:
        if getattr(runner.config, "expert_capacity", None) is not None:
            raise InputError(
                f"expert_capacity={runner.config.expert_capacity}: expected None, since padding rows would take places "
                f"from real ones; call the runner itself, which compiles for each number of tokens"
            )
        self.runner, self.max_tokens = runner, max_tokens
        self.buckets = buckets_up_to(max_tokens)
        self._compiled_before: int | None = None
        if warm_up:
            self.warm_up()

    def warm_up(self) -> None:
        """Run every bucket once on zeros, and wait; compilations from here on are recompilations."""
        config = self.runner.config
        for rows in self.buckets:
            ids = torch.zeros(rows, dtype=torch.int32) if config.hash_routing else None
            out = self(torch.zeros(rows, config.hidden_size, dtype=self.runner.dtype), input_ids=ids)
            torch_xla.sync(wait=True)
            del out
        self._compiled_before = compilations()

    @property
    def recompilations(self) -> int | None:
        """Graphs that this process compiled since the warm-up; None where there was none."""
        return None if self._compiled_before is None else compilations() - self._compiled_before

    @property
    def report(self) -> SelectionReport:
        """The runner's, with the recompilations since the warm-up among this backend's counts."""
        report = self.runner.report
        if self.recompilations is None:
            return report
        counts = {**report.counters.get("tpu", {}), "recompilations": self.recompilations}
        return dataclasses.replace(report, counters={**report.counters, "tpu": counts})

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_weights: Tensor | None = None,
        topk_ids: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Padded:
        """Pad on the host, move, run; waits for nothing.

        Args: as for the runner, [T, ...] each, on the CPU.
        Raises:
            InputError: a tensor on another device, or more than ``max_tokens`` tokens.
        """
        tokens = hidden_states.shape[0]
        if tokens > self.max_tokens:
            raise InputError(
                f"hidden_states has {tokens} rows, expected at most max_tokens = {self.max_tokens}; raise it, or call "
                f"in parts"
            )
        rows = bucket_of(tokens)

        def moved(name: str, tensor: Tensor | None, value: float = 0) -> Tensor | None:
            if tensor is None:
                return None
            if tensor.device.type != "cpu":
                raise InputError(
                    f"{name} is on {tensor.device}, expected the CPU: padding on the device would compile a graph for "
                    f"each number of tokens; pad where the tokens enter it, or call the runner itself"
                )
            return pad_rows(tensor, rows, value).to(self.runner.device)

        x = moved("hidden_states", hidden_states)
        assert x is not None
        out = self.runner(
            x,
            moved("router_logits", router_logits),
            topk_weights=moved("topk_weights", topk_weights),
            topk_ids=moved("topk_ids", topk_ids, -1),
            input_ids=moved("input_ids", input_ids),
        )
        return Padded(out, tokens)
