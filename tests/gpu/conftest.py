"""A layer on the device, bound to the reference, and delays that make races certain instead of rare."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core import MoEConfig, MoELayer, MoERunner, plugins

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 4, "top_k": 2, "shared_intermediate_size": 40}


@pytest.fixture
def register() -> Iterator[Callable[..., Any]]:
    """``register(plugin)`` until the test ends; returns the plugin."""
    names: list[str] = []

    def add(plugin: Any) -> Any:
        plugins.register(plugin, plugin.name)
        names.append(plugin.name)
        return plugin

    yield add
    for name in names:
        plugins.unregister(name)


@pytest.fixture
def make_layer() -> Callable[..., MoELayer]:
    """``make_layer(**fields)``: a small layer on the device, biases filled."""

    @torch.no_grad()
    def make(dtype: torch.dtype = torch.float32, **fields: Any) -> MoELayer:
        layer = MoELayer(MoEConfig(**{**SIZES, **fields}), dtype=dtype, device="cuda")
        for name, tensor in layer.state_dict().items():
            if name.endswith("_bias"):
                tensor.normal_()
        return layer

    return make


@pytest.fixture
def bind() -> Callable[..., MoERunner]:
    """``bind(layer, backend, **options)``; options that are fields of the config change it."""

    @torch.no_grad()
    def make(layer: MoELayer, backend: str = "reference", **options: Any) -> MoERunner:
        import dataclasses

        fields = {name: options.pop(name) for name in list(options) if name in MoEConfig.__dataclass_fields__}
        return MoERunner(dataclasses.replace(layer.config, **fields), layer.weights(), backend=backend, **options)

    return make


@pytest.fixture
def delay() -> Callable[[], None]:
    """Keep the current stream busy for about a tenth of a second: far longer than the host takes for one call."""
    return lambda: torch.cuda._sleep(200_000_000)


@pytest.fixture
def still_busy() -> Callable[[], None]:
    """Fails where the delay ended before the host was through: such a run would prove nothing."""

    def check(stream: Any = None) -> None:
        stream = stream or torch.cuda.current_stream()
        assert not stream.query(), "the delay was too short, so no race could have shown"

    return check
