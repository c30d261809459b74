"""XLA's own CPU device: numerics and shapes are checked on it; nothing here runs on a TPU."""

from __future__ import annotations

import os
import sys
from collections import Counter
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
    """(compilations, transfers to the host, fallbacks) since the fixture was made or last asked.

    As differences: what torch_xla counts is the process's, and other layers' reports are made of it too.
    """
    from moe_tpu.metrics import compilations, fallbacks, transfers_to_host

    def totals() -> tuple[int, int, Counter[str]]:
        torch_xla.sync(wait=True)
        return compilations(), transfers_to_host(), fallbacks()

    last = totals()

    def count() -> tuple[int, int, list[str]]:
        nonlocal last
        before, last = last, totals()
        return last[0] - before[0], last[1] - before[1], sorted(last[2] - before[2])

    return count
