"""What a caller knows of the other ranks' tokens: with it no rank has to ask, and nothing waits for a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from ..errors import InputError

_counts: ContextVar[tuple[int, ...] | None] = ContextVar("moe_core_token_counts", default=None)


@contextlib.contextmanager
def token_counts(counts: Sequence[int]) -> Iterator[None]:
    """Calls inside know how many tokens each rank brings; outside, the ranks tell each other in every call.

    Args:
        counts: of every rank that has tokens of its own, in the order of the mesh: along "ep", and under sequence
            parallelism along "tp" within each. Equal on all ranks.
    """
    if any(not isinstance(count, int) or count < 0 for count in counts):
        raise InputError(f"token_counts({list(counts)!r}): expected numbers of tokens of at least 0")
    before = _counts.set(tuple(counts))
    try:
        yield
    finally:
        _counts.reset(before)


def given_counts(ranks: int) -> list[int] | None:
    """What the caller said, or None.

    Raises:
        InputError: it is for another number of ranks.
    """
    counts = _counts.get()
    if counts is None:
        return None
    if len(counts) != ranks:
        raise InputError(f"token_counts has {len(counts)} numbers, expected {ranks}, one a rank with tokens of its own")
    return list(counts)
