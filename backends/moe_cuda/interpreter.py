"""What Triton's interpreter needs that a GPU does not: one thread at a time, and quiet numpy."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import triton

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.RLock()


def guarded(stage: Callable[P, R]) -> Callable[P, R]:
    """The stage itself; where Triton interprets kernels, the stage under a lock and without numpy's warnings.

    The interpreter patches Triton's language in place while a kernel runs, so two threads would undo each other's; and
    it computes with numpy, which warns where a GPU gives inf or NaN, and at run-time loop bounds.
    """
    if not triton.knobs.runtime.interpret:
        return stage

    @functools.wraps(stage)
    def one_at_a_time(*args: P.args, **kwargs: P.kwargs) -> R:
        import numpy as np

        with _lock, np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0 to a scalar", DeprecationWarning)
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            return stage(*args, **kwargs)

    return one_at_a_time
