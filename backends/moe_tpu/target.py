"""Which chip graphs are traced for: the one at hand, or the one that aot.py compiles for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_compiling_for: ContextVar[str | None] = ContextVar("compiling_for", default=None)


def chip() -> str:
    """``v5e``, ``v6e`` and so on, or ``cpu`` for XLA's own CPU device."""
    asked = _compiling_for.get()
    if asked is not None:
        return asked
    import torch_xla.runtime

    if torch_xla.runtime.device_type() != "TPU":
        return "cpu"
    from torch_xla._internal import tpu

    found = str(tpu.get_tpu_type())
    return "v5e" if found == "v5litepod" else found


def ahead_of_time() -> bool:
    """Whether graphs are traced to be compiled elsewhere, from tensors that hold no values."""
    return _compiling_for.get() is not None


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Inside, layers are bound and traced for this chip."""
    token = _compiling_for.set(name)
    try:
        yield
    finally:
        _compiling_for.reset(token)
