"""XLA's own CPU device: numerics and shapes are checked on it; nothing here runs on a TPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("PJRT_DEVICE", "CPU")
sys.path.insert(0, str(Path(__file__).parent))  # for xla_helpers
torch_xla = pytest.importorskip("torch_xla", reason="the row tpu alone installs torch_xla")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch_xla.device()


@pytest.fixture
def counted() -> Callable[[], tuple[int, int, list[str]]]:
    """(compilations, transfers to the host, fallbacks) since the fixture was made or last asked."""
    import torch_xla.debug.metrics as metrics

    from moe_tpu.metrics import compilations, fallbacks, transfers_to_host

    torch_xla.sync(wait=True)
    metrics.clear_all()

    def count() -> tuple[int, int, list[str]]:
        torch_xla.sync(wait=True)
        found = compilations(), transfers_to_host(), fallbacks()
        metrics.clear_all()
        return found

    return count
