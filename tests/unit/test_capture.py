"""MoERunner.capture where there is nothing to capture with."""

from __future__ import annotations

import pytest
import torch

from moe_core import MoEConfig, MoELayer, MoERunner
from moe_core.capture import GraphedRunner
from moe_core.errors import InputError


@pytest.fixture
def runner() -> MoERunner:
    layer = MoELayer(MoEConfig(16, 8, 4, 2))
    return MoERunner(layer.config, layer.weights(), backend="reference")


def test_a_device_without_graphs_says_so(runner: MoERunner) -> None:
    with pytest.raises(InputError, match="no graphs on cpu; call the runner itself"):
        runner.capture([1, 2])


@pytest.mark.parametrize("buckets", [[], [0], [1.5], [-2]])
def test_buckets_are_positive_numbers(runner: MoERunner, buckets: list[int]) -> None:
    with pytest.raises(InputError, match="token_buckets"):
        runner.capture(buckets)


@pytest.mark.parametrize("whose", ["input", "parameters", "functions"])
def test_gradients_go_past_the_graphs(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay has none: where the input, a parameter or a caller's function may need them, no graph is looked for."""
    layer = MoELayer(MoEConfig(16, 8, 4, 2)).requires_grad_(whose == "parameters")
    scale = torch.ones(1, requires_grad=whose == "functions")
    gate = (lambda x: x[:, :4] * scale) if whose == "functions" else None
    graphed = object.__new__(GraphedRunner)
    graphed.runner = MoERunner(layer.config, layer.weights(), backend="reference", gate=gate)
    monkeypatch.setattr(GraphedRunner, "bucket", lambda *_: pytest.fail("a graph was looked for"))
    x = torch.randn(3, 16, requires_grad=whose == "input")
    graphed(x).sum().backward()
    found = {"input": x, "parameters": layer.w2_weight, "functions": scale}[whose].grad
    assert found is not None and found.any()
