"""Huge pages for packed weights."""

from __future__ import annotations

from torch import Tensor

from moe_core.pages import advise

HUGE = 2**21


def ask_for_huge_pages(memory: Tensor) -> None:
    """Behind memory that was not written to yet; no more than a wish, and none on other systems than Linux.

    Weights are read from front to back, once a call: with small pages a third of the bandwidth goes to finding them.
    """
    advise(memory, "MADV_HUGEPAGE", HUGE)
