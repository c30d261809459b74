"""Advice to the system about the memory behind CPU tensors."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor


def advise(memory: Tensor, advice: str, page: int = mmap.PAGESIZE) -> None:
    """``madvise`` the whole pages inside a contiguous tensor; nothing happens on a system that takes no such advice.

    Args:
        memory: on the CPU. advice: the name of a constant of :mod:`mmap`. page: bytes.
    """
    number = getattr(mmap, advice, None)
    if sys.platform != "linux" or number is None:
        return
    begin = -(-memory.data_ptr() // page) * page
    end = (memory.data_ptr() + memory.nbytes) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), number)
