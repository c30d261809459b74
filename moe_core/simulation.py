"""Simulated routing: distinct experts without a router, for benchmarks of a load that one can choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import MoEConfig

_WORD = 0xFFFFFFFF


def simulated_ids(config: MoEConfig, tokens: int, device: torch.device) -> Tensor:
    """[T, K] int64 distinct ids, drawn without replacement with popularity 1 / (id + 1) ** skew (uniform: equal).

    They depend on the seed and on a row's place only, so fewer tokens get a prefix. Nothing waits for the device.
    Source: an exponential race, the K first of -log(u) / popularity, draws like that.
    """
    width = config.num_router_outputs
    place = torch.arange(tokens * width, device=device)
    seed = _scatter_bits(config.simulated_seed & _WORD)
    bits = _scatter_bits(_scatter_bits(place & _WORD) ^ seed)
    uniform = ((bits >> 8).to(torch.float32) + 0.5) * 2.0**-24
    race = -torch.log(uniform.view(tokens, width))
    if config.simulated_routing == "zipf":
        ranks = torch.arange(1, width + 1, dtype=torch.float32, device=device)
        race = race * ranks**config.simulated_zipf_skew
    return torch.sort(race, dim=-1, stable=True).indices[:, : config.top_k]


def _scatter_bits(values: Any) -> Any:
    """A bijection of 32-bit numbers, an int or int64 tensor, that leaves no pattern; no step overflows int64."""
    for _ in range(2):
        values = ((values ^ (values >> 16)) * 0x45D9F3B) & _WORD
    return values ^ (values >> 16)
