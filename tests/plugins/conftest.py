"""Third parties made up on the spot: real distributions with entry points, found by the real importlib.metadata."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HEALTHY = """
from moe_core import BackendInfo, Verdict, hookimpl, reference


@hookimpl
def moe_backend_info():
    return BackendInfo(name="{name}", hook_api={hook_api}, priority={priority})


@hookimpl
def moe_probe(platform):
    return Verdict.yes()


@hookimpl
def moe_supports(config, stage, platform):
    return Verdict.yes()


@hookimpl
def moe_experts(plan, hidden_states, routing, router_logits):
    return reference.moe_experts(plan, hidden_states, routing)
"""

Distribute = Callable[..., str]


def healthy(name: str, *, hook_api: int = 1, priority: int = 5) -> str:
    """The source of a plugin that serves the experts stage."""
    return HEALTHY.format(name=name, hook_api=hook_api, priority=priority)


@pytest.fixture
def distribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribute]:
    """``distribute(name, source)`` installs a distribution ``name-dist`` whose entry point ``name`` is that module.

    Returns the module's name; nothing is imported. ``dist`` names the distribution where two claim one name.
    """

    def install(name: str, source: str, *, dist: str = "") -> str:
        dist = dist or f"{name}-dist"
        module = f"plugin_{dist.replace('-', '_')}"
        folder = tmp_path / dist
        info = folder / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[moe_core.backends]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        return module

    before = set(sys.modules)
    yield install
    for module in set(sys.modules) - before:
        if module.startswith("plugin_"):
            del sys.modules[module]
