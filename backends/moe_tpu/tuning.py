"""Which form a product takes on which chip: a table, made from what the compiler says of each form.

Nothing here was measured on a TPU. benchmarks/tpu-aot.json has the figures that it follows.
"""

from __future__ import annotations

import dataclasses
import functools

from .spec import Spec


@functools.cache
def choose(base: Spec, form: str | None, chip: str, tokens: int) -> Spec:
    """The spec with its form and tiles for a call of ``tokens`` tokens."""
    return dataclasses.replace(base, form=form or "ragged", interpret=chip == "cpu")
