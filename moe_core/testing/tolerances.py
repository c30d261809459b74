"""The one table of tolerances: relative L2 error against the float32 reference, by dtype and stage.

A test never loosens it. float32: two summation orders of a few thousand products. bfloat16 has 8 bits of mantissa: a
rounding error of 2^-9 for each of the about five values on a path, and the intermediate is rounded once more.
A gradient (``backward``, each tensor's) takes the path twice.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

import torch

TOLERANCES: Final = MappingProxyType(
    {
        (torch.float32, "gate"): 1e-6,
        (torch.float32, "experts"): 1e-5,
        (torch.float32, "shared_experts"): 1e-5,
        (torch.float32, "reduce"): 1e-6,
        (torch.float32, "layer"): 1e-5,
        (torch.float32, "backward"): 1e-5,
        (torch.bfloat16, "gate"): 1e-6,
        (torch.bfloat16, "experts"): 1e-2,
        (torch.bfloat16, "shared_experts"): 1e-2,
        (torch.bfloat16, "reduce"): 5e-3,
        (torch.bfloat16, "layer"): 1e-2,
        (torch.bfloat16, "backward"): 2e-2,
        (torch.float16, "gate"): 1e-6,
        (torch.float16, "experts"): 2e-3,
        (torch.float16, "shared_experts"): 2e-3,
        (torch.float16, "reduce"): 1e-3,
        (torch.float16, "layer"): 2e-3,
        (torch.float16, "backward"): 4e-3,
    }
)


def tolerance(dtype: torch.dtype, stage: str) -> float:
    """Allowed relative L2 error of ``stage`` (or ``layer``, or ``backward``) in ``dtype``."""
    return TOLERANCES[dtype, stage]
