"""The native kernel in every set of instructions that this processor has, and the layer around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, Routing, reference
from moe_core.platform import Platform
from moe_core.testing.cases import random_weights
from moe_core.types import Pending, Plan
from moe_cpu import layout
from moe_cpu.native import build

CAPABILITY = torch.backends.cpu.get_cpu_capability()
ORDER = ["DEFAULT", *build.INSTRUCTIONS]
WIDTHS = ORDER[: ORDER.index(build.instructions({}, CAPABILITY)) + 1]


@dataclass(frozen=True)
class Case:
    """One layer's experts by the native kernel, beside the reference's."""

    config: MoEConfig
    weights: MoEWeights
    packed: layout.PackedWeights
    dtype: torch.dtype

    def routing(self, tokens: int, seed: int = 1) -> Routing:
        """Distinct experts for each token."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(tokens, self.config.num_experts, generator=generator).argsort(dim=1)[:, : self.config.top_k]
        return Routing(torch.rand(tokens, self.config.top_k, generator=generator), ids.int())

    def hidden(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.config.hidden_size, generator=torch.Generator().manual_seed(2)).to(self.dtype)

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, H] float32 by the native kernel."""
        plan = Plan(self.config, self.packed, torch.device("cpu"), torch.float32)
        return self._sum(routing, self.packed.experts.routed(plan, x, routing))

    def expected(self, x: Tensor, routing: Routing) -> Tensor:
        """The same by the reference."""
        plan = Plan(self.config, self.weights, torch.device("cpu"), torch.float32)
        return self._sum(routing, reference.moe_experts(plan, x, routing))

    def _sum(self, routing: Routing, out: Any) -> Tensor:
        if out.reduced:
            return out.value
        plan = Plan(self.config, self.weights, torch.device("cpu"), torch.float32)
        return reference.moe_reduce(plan, routing, out, Pending(None))


@pytest.fixture(autouse=True)
def _no_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees which strategy the caller's environment asks for."""
    monkeypatch.delenv("MOE_CORE_CPU_STRATEGY", raising=False)


@pytest.fixture(params=WIDTHS)
def platform(request: pytest.FixtureRequest, _no_strategy: None) -> Platform:
    """This machine, with one of its sets of instructions."""
    env = {**os.environ, build.VARIABLE: request.param.lower()}
    found = Platform(torch.device("cpu"), torch.float32, cpu_capability=CAPABILITY, env=env)
    if reason := build.obstacle(found.env, found.cpu_capability):
        pytest.skip(reason)
    return found


@pytest.fixture
def make(platform: Platform) -> Callable[..., Case]:
    """``make(dtype, **fields of MoEConfig)``."""

    def case(dtype: torch.dtype, **fields: Any) -> Case:
        config = MoEConfig(**{"hidden_size": 45, "intermediate_size": 37, "num_experts": 5, "top_k": 2, **fields})
        weights = random_weights(config, dtype=dtype)
        packed = layout.pack(config, weights, platform)
        assert packed.strategies["experts"].startswith("native"), packed.strategies
        return Case(config, weights, packed, dtype)

    return case
