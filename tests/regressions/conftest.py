"""Regressions that other MoE layers have had (docs/regressions.md), on every backend that takes CPU tensors here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_core import backends

sys.path.insert(0, str(Path(__file__).parent))

USABLE = [status.name for status in backends() if status.status == "ok" and "cpu" in status.device_types]


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """The name to ask for; ``dense.bind`` skips what it refuses."""
    return request.param
