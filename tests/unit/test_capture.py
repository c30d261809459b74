"""MoERunner.capture where there is nothing to capture with."""

from __future__ import annotations

import pytest

from moe_core import MoEConfig, MoELayer, MoERunner
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
