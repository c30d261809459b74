"""Arithmetic in which a row does not depend on the rows beside it, to the last bit.

BLAS libraries take other kernels, which sum in another order, for one row, for few rows and for odd remainders; torch's
vectorised and scalar loops, between which it divides a tensor by position, differ in the last bit. A token would then
differ with the batch that it comes in, and with it a close choice of experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8
"""Multiples of so many rows meet one kernel."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, K] times weight [N, K] transposed, plus bias: [n, N]."""
    rows = x.shape[0]
    missing = -rows % ROWS
    if not missing:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, missing)), weight, bias)[:rows]


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x); float32 on a CPU goes through float64, from which both loops round to the same float32."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return function(x.double()).float()
    return function(x)
