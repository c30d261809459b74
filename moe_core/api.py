"""Questions about backends: what is there, and what would be chosen."""

from __future__ import annotations

import torch

from .config import MoEConfig
from .platform import Platform
from .plugins import registry
from .report import BackendStatus, SelectionReport
from .select import probe, select
from .settings import requested


def backends() -> list[BackendStatus]:
    """Every plugin on this host, usable or not, highest priority first; nothing is bound."""
    platform = Platform.detect()
    found = [probe(plugin, platform) for plugin in registry()]
    return sorted(found, key=lambda status: (-status.priority, status.name))


def explain(
    config: MoEConfig,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    needs_grad: bool = False,
) -> SelectionReport:
    """What a bind would choose for weights on ``device`` (None: the current accelerator, or the CPU).

    Raises:
        SelectionError: as a bind would; its message holds the same table.
    """
    if dtype is None and config.quant is not None:
        dtype = getattr(torch, config.quant.dtype)
    platform = Platform.detect(device, dtype)
    return select(registry(), requested(backend), config, platform, needs_grad=needs_grad)
