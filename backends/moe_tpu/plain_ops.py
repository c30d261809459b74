"""What adapter.py offers, in torch alone, for hosts whose torch_xla cannot call jax functions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, K] times weight [N, K] transposed plus bias: [n, N] float32."""
    out = F.linear(x, weight).float()
    return out if bias is None else out + bias.float()


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, E] float32."""
    return linear(x.float(), weight.float(), bias)
