"""Huge pages for packed weights."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

HUGE = 2**21


def ask_for_huge_pages(memory: Tensor) -> None:
    """Behind memory that was not written to yet; no more than a wish, and none on other systems than Linux.

    Weights are read from front to back, once a call: with small pages a third of the bandwidth goes to finding them.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if sys.platform != "linux" or advice is None or memory.nbytes < HUGE:
        return
    begin = -(-memory.data_ptr() // HUGE) * HUGE
    end = (memory.data_ptr() + memory.nbytes) // HUGE * HUGE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
