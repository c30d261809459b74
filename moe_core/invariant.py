"""Arithmetic in which a row does not depend on the rows beside it, to the last bit.

BLAS libraries take other kernels, which sum in another order, for one row, for few rows and for odd remainders, and
divide many rows among threads in another way than few: on a CPU every product is of one size. torch's vectorised and
scalar loops, between which it divides a tensor by position, differ in the last bit. A token would then differ with the
batch that it comes in, and with it a close choice of experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16
"""Rows of a block: on every processor tried, a row's result is then the same at each place in it."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, K] times weight [N, K] transposed, plus bias: [n, N]."""
    rows = x.shape[0]
    missing = -rows % ROWS
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    if x.device.type != "cpu" or rows <= ROWS:
        out = F.linear(x, weight, bias)
    else:
        out = torch.cat([F.linear(block, weight, bias) for block in x.split(ROWS)])
    return out[:rows] if missing else out


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x); float32 on a CPU goes through float64, from which both loops round to the same float32."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return function(x.double()).float()
    return function(x)
