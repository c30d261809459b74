"""Which form the grouped products take on which chip.

Made from what the compiler says of each form (benchmarks/tpu-aot.json); nothing here was measured on a TPU.
"""

from __future__ import annotations

import dataclasses
import functools

from .kernels.work import LANES, MOST_SLOTS
from .spec import Spec

GROUPED_KERNELS = ("v5e", "v6e")
"""Chips that the Pallas kernels were compiled for."""
ROWS_OF_AN_EXPERT = 8
"""With fewer, tiles of rows are partly empty, and XLA's own product moves no more bytes."""


@functools.cache
def choose(base: Spec, form: str | None, chip: str, tokens: int, top_k: int, hidden: int) -> Spec:
    """The spec with its form for a call.

    Args:
        form: what was asked for; None leaves it to the table.
        tokens: of the call. hidden: H of the experts.
    """
    chosen, slots = form or "ragged", tokens * top_k
    kernels = chip in GROUPED_KERNELS and hidden % LANES == 0
    if form is None and kernels and ROWS_OF_AN_EXPERT * base.first_zero <= slots <= MOST_SLOTS:
        chosen = "gmm"
    return dataclasses.replace(base, form=chosen, interpret=chip == "cpu")
