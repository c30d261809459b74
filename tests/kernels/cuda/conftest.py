"""Where these kernels run: on a GPU, or by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU and without the interpreter there is nothing to run kernels on."""
    if torch.cuda.is_available() or INTERPRETED:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device; TRITON_INTERPRET=1 runs kernels on the CPU"))


@pytest.fixture(params=[torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of a layer; not bfloat16 in the interpreter, which truncates where a GPU rounds."""
    found: torch.dtype = request.param
    return found


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
