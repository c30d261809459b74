"""Which form the grouped products take on which chip.

Made from what the compiler says of each form (benchmarks/tpu-aot.json); nothing here was measured on a TPU.
"""

from __future__ import annotations

import dataclasses
import functools

from .kernels.work import tile_columns
from .spec import Spec

GROUPED_KERNELS = ("v5e", "v6e")
"""Chips that the Pallas kernels were compiled for."""
ROWS_OF_AN_EXPERT = 64
"""With fewer the kernels' tiles are half empty, or shared by groups, and XLA's own product moves no more bytes."""


@functools.cache
def choose(base: Spec, form: str | None, chip: str, tokens: int, top_k: int, sizes: tuple[int, int], item: int) -> Spec:
    """The spec with its form for a call.

    Args:
        form: what was asked for; None leaves it to the table.
        tokens: of the call. sizes: H and I of the experts. item: bytes of a weight.
    """
    chosen = form or "ragged"
    if form is None and chip in GROUPED_KERNELS and tokens * top_k >= ROWS_OF_AN_EXPERT * max(base.first_zero, 1):
        hidden, inner = sizes
        # Where an expert does not fit into fast memory whole, the rows are read again for each part of it.
        first, second = tile_columns(hidden, inner, 2, item), tile_columns(inner, hidden, 1, item)
        if (first, second) == (inner, hidden):
            chosen = "gmm"
    return dataclasses.replace(base, form=chosen, interpret=chip == "cpu")
