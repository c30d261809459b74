"""How far a quantised layer is from the unquantised one, and two computations of it from each other, by arithmetic.

A product of rounded numbers is off by the root of the sum of the squared relative rounding errors of its factors, since
roundings are independent. Two products follow each other, with act(gate) * up between them, where gate and up bring an
error each (a gated SiLU hands both on unmagnified), so with w for weights and a for activations

    layer**2 = gain * (w13**2 + a13**2) + w2**2 + a2**2          gain = 2 where gated, else 1.

w is known: it is measured on the weights. a is 0 in weight-only schemes. A number rounded to p bits behind the point of
its mantissa is off by 2**-p / sqrt(12) / m, m between 1 and 2: 0.736 * 2**-p / sqrt(12), 2.7 % for e4m3 (p = 3). One of
int8 is off by scale / sqrt(12), scale = largest / 127; the largest of n normal numbers is about sqrt(2 ln n).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

from .dequantise import dequantise_matrix, slice_of, tensors_of
from .layout import matrix_of

if TYPE_CHECKING:
    from ..config import MoEConfig
    from ..weights import MoEWeights

SPACING: Final = {"e4m3": 2.0**-3.5, "int8": 2.0**-5}
"""About how far apart neighbouring codes lie, relative to a value of usual size."""


def weight_error(config: MoEConfig, plain: MoEWeights, quantised: MoEWeights, field: str) -> float:
    """Relative L2 distance of one matrix (of all experts) from what it was quantised from; 0 where it is not.

    Args:
        config: the quantised layer's.
    """
    matrix = matrix_of(config, field)
    if matrix is None:
        return 0.0
    tensors, before = tensors_of(quantised, matrix), getattr(plain, field)
    if not matrix.lead:
        return _distance(dequantise_matrix(matrix, tensors), before)
    after = [dequantise_matrix(matrix, slice_of(matrix, tensors, e)) for e in range(matrix.lead[0])]
    return _distance(torch.stack(after), before)


def _distance(after: torch.Tensor, before: torch.Tensor) -> float:
    return float((after.double() - before.double()).norm() / before.double().norm())


def activation_error(config: MoEConfig, field: str) -> float:
    """Expected relative rounding error of what the product with a matrix gets; 0 where nothing rounds it."""
    matrix = matrix_of(config, field)
    if matrix is None or matrix.scheme.activations is None:
        return 0.0
    if matrix.scheme.activations == "e4m3":
        return 0.736 * 2.0**-3 / math.sqrt(12)
    return math.sqrt(2 * math.log(matrix.columns)) / 127 / math.sqrt(12)


def predicted_error(config: MoEConfig, plain: MoEWeights, quantised: MoEWeights, prefix: str = "") -> float:
    """Expected relative L2 error of quantised experts against the unquantised ones.

    Args:
        config: the quantised layer's. plain: what ``quantised`` was made from.
        prefix: ``shared_`` for the shared experts.
    """
    first, second = f"{prefix}w13_weight", f"{prefix}w2_weight"
    w13, w2 = (weight_error(config, plain, quantised, field) for field in (first, second))
    a13, a2 = activation_error(config, first), activation_error(config, second)
    gain = 2 if config.gated else 1
    return math.sqrt(gain * (w13**2 + a13**2) + w2**2 + a2**2)


def flip_allowance(config: MoEConfig, dtype: torch.dtype, values: int, prefix: str = "") -> float:
    """What two correct computations of a layer that rounds activations may differ by, beyond the table of tolerances.

    A value that both know up to a relative error t (rounding to ``dtype`` in between, or another order of float32 sums)
    falls to different neighbours of spacing u with a probability of about t / u, and is then off by u: sqrt(t * u) in
    all. Of few values a single one counts: it may be four times the usual size.

    Args:
        values: how many intermediate values the compared result comes from: T * K * I.
    """
    matrix = matrix_of(config, f"{prefix}w2_weight")
    if matrix is None or matrix.scheme.activations is None:
        return 0.0
    spacing = SPACING[matrix.scheme.activations]
    known = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    return float(spacing * math.sqrt(known / spacing + 16 / max(values, 1)))
