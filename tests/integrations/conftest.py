"""The zoo of transformers' modules, and a guard that makes its experts functions raise."""

import contextlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed in this row")
sys.path.insert(0, str(Path(__file__).parent))

import zoo


@pytest.fixture
def no_transformers_experts(monkeypatch):
    """Inside the context, any routed experts of transformers, eager or by an implementation, raise."""

    @contextlib.contextmanager
    def guard():
        from transformers.integrations import moe

        def refuse(*args, **kwargs):
            raise AssertionError("transformers' experts ran")

        with monkeypatch.context() as patch:
            for found in zoo.all_experts_classes():
                patch.setattr(found, "forward", refuse)
            for name in ("batched_mm_experts_forward", "grouped_mm_experts_forward"):
                patch.setattr(moe, name, refuse)
            yield

    return guard
