"""Toy backends, and streams made up on the CPU, so that order is seen where there is no accelerator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core import MoEConfig, MoELayer, MoERunner, hookimpl, plugins, streams

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toys


@pytest.fixture
def register() -> Iterator[Callable[..., Any]]:
    """``register(plugin)`` until the test ends; returns the plugin."""
    names: list[str] = []

    def add(plugin: Any, name: str = "") -> Any:
        names.append(name or plugin.name)
        plugins.register(plugin, names[-1])
        return plugin

    yield add
    for name in names:
        plugins.unregister(name)


@pytest.fixture
def bind(register) -> Callable[..., MoERunner]:
    """``bind(backend, **options)``: a small layer with shared experts, bound to a toy (or a name)."""

    def make(backend: Any = "reference", *, layer: MoELayer | None = None, **options: Any) -> MoERunner:
        fields = {name: options.pop(name) for name in list(options) if name in MoEConfig.__dataclass_fields__}
        if not isinstance(backend, str):
            register(backend)
            backend = backend.name
        with torch.no_grad():
            sizes = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 2}
            config = MoEConfig(**{**sizes, "shared_intermediate_size": 40, **fields})
            layer = layer or MoELayer(config)
            return MoERunner(config, layer.weights(), backend=backend, **options)

    return make


class FakeStream:
    """Work on it happens at once; only the order of calls is of interest."""

    current: FakeStream

    def __init__(self, name: str, number: int) -> None:
        self.name, self.stream_id = name, number

    def __enter__(self) -> None:
        self.before, FakeStream.current = FakeStream.current, self

    def __exit__(self, *error: object) -> None:
        FakeStream.current = self.before

    def record_event(self) -> str:
        return f"end of {self.name}"


@pytest.fixture
def trace(register, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in a call, in order: ``stage@stream`` from an observer, ``fork``, ``join``, ``keep``."""
    events: list[str] = []
    main, side = FakeStream("main", 1), FakeStream("side", 2)
    FakeStream.current = main

    def note(stage: str) -> None:
        events.append(f"{stage}@{FakeStream.current.name}")

    class Watch:
        name = "watch"

        @hookimpl(wrapper=True)
        def moe_gate(self):
            note("gate")
            return (yield)

        @hookimpl(wrapper=True)
        def moe_shared_experts(self):
            note("shared")
            return (yield)

        @hookimpl(wrapper=True)
        def moe_experts(self):
            note("experts")
            return (yield)

        @hookimpl(wrapper=True)
        def moe_reduce(self):
            note("reduce")
            return (yield)

    register(Watch())
    monkeypatch.setattr(streams, "has_streams", lambda device: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: FakeStream.current)
    monkeypatch.setattr(streams, "side_stream", lambda stream, device: side)
    monkeypatch.setattr(streams, "fork", lambda a, b: events.append(f"fork {a.name}->{b.name}"))
    monkeypatch.setattr(streams, "join", lambda stream, done: events.append(f"join {stream.name} <- {done}"))
    monkeypatch.setattr(streams, "keep_alive", lambda tensor, stream: events.append(f"keep for {stream.name}"))
    return events


__all__ = ["toys"]
