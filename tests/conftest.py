"""Shared fixtures: a small layer, and a process without anybody's settings."""

from __future__ import annotations

import pytest
import torch

import moe_core


@pytest.fixture(autouse=True)
def _clean_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the backend that the caller's environment asks for, nor another test's random numbers."""
    for variable in ("MOE_CORE_BACKEND", "MOE_CORE_DISABLE", "MOE_CORE_BACKENDS_ONLY"):
        monkeypatch.delenv(variable, raising=False)
    moe_core.configure()
    torch.manual_seed(0)


@pytest.fixture
def config() -> moe_core.MoEConfig:
    """Every stage, few sizes: T is up to the test."""
    return moe_core.MoEConfig(32, 24, 8, 2, renormalize=True, shared_intermediate_size=40, shared_expert_gate=True)


@pytest.fixture
def layer(config: moe_core.MoEConfig) -> moe_core.MoELayer:
    return moe_core.MoELayer(config)
