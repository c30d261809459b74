"""What the tests on XLA share."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core import MoEConfig, MoERunner, MoEWeights


def on_device(weights: MoEWeights, device: torch.device) -> MoEWeights:
    """The same tensors on another device."""
    return MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})


def reference_of(config: MoEConfig, weights: MoEWeights, x: Tensor, **inputs: Tensor | None) -> Tensor:
    """The layer by the reference, in float32 on the CPU, from the same rounded weights and input."""
    exact = {name: t.float() if t.is_floating_point() else t for name, t in weights.named_tensors()}
    with torch.no_grad():
        return MoERunner(config, MoEWeights(**exact), backend="reference")(x.float(), **inputs)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())
