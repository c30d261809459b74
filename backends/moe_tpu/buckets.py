"""Token counts as a bounded set: XLA compiles a graph for each shape, which takes seconds.

Only what enters the device can bound the shapes of what runs on it: a pad on the device is a graph of its own for each
token count. So :class:`Bucketed` pads on the host, where tokens come from, and hands back which rows are real.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST = 16
LAST_POWER = 2048
STEP = 512


def bucket_of(tokens: int) -> int:
    """The smallest bucket that holds ``tokens``: a power of two from 16, above 2048 a multiple of 512."""
    if tokens <= LAST_POWER:
        return max(SMALLEST, 1 << max(tokens - 1, 0).bit_length())
    return -(-tokens // STEP) * STEP


def buckets_up_to(tokens: int) -> list[int]:
    """Every bucket that a call of at most ``tokens`` tokens can fall into, ascending."""
    sizes = [bucket_of(1)]
    while sizes[-1] < tokens:
        sizes.append(bucket_of(sizes[-1] + 1))
    return sizes


def pad_rows(tensor: Tensor, rows: int, value: float = 0) -> Tensor:
    """[T, ...] with rows of ``value`` appended up to ``rows``."""
    missing = rows - tensor.shape[0]
    if not missing:
        return tensor
    import torch.nn.functional as F

    return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing), value=value)
