"""What a strategy packs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Matrices:
    """The routed experts', or the shared experts' as one expert.

    Args:
        w13, w2: [E, 2I, H] and [E, H, I]: tensors in the layer's dtype, or :class:`moe_cpu.native.codes.Coded` where
            the layer is quantised, which strategies of ``strategies.CODED`` alone are given. b13, b2: their biases.
        spent: to be called with "w13" or "w2" and an expert's number, once that is packed.
    """

    w13: Any
    w2: Any
    b13: Tensor | None
    b2: Tensor | None
    routed: bool
    spent: Callable[[str, int], None]
