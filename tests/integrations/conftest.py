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
    """Inside the context, all of transformers that computes experts raises: classes, implementations, gatings.

    Args:
        classes: other classes than all of them.
        dispatch: leave each class's forward as the decorator made it, so that an implementation can be chosen; what the
            decorator falls back to raises.
    """

    def refuse(*args, **kwargs):
        raise AssertionError("transformers' experts ran")

    @contextlib.contextmanager
    def guard(classes=None, dispatch=False):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        with monkeypatch.context() as patch:
            for name in ("batched_mm", "grouped_mm", "deepgemm", "sonicmoe"):
                patch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, refuse)
            for cls in zoo.all_experts_classes() if classes is None else classes:
                variables = dict(zip(cls.forward.__code__.co_freevars, cls.forward.__closure__ or (), strict=True))
                if dispatch and "original_forward" in variables:
                    patch.setattr(variables["original_forward"], "cell_contents", refuse)
                else:
                    patch.setattr(cls, "forward", refuse)
                if hasattr(cls, "_apply_gate"):
                    patch.setattr(cls, "_apply_gate", refuse)
            yield

    return guard
