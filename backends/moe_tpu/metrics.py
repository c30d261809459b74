"""What torch_xla counts, for the whole process."""

from __future__ import annotations

import torch_xla.debug.metrics as metrics


def compilations() -> int:
    """Graphs that XLA compiled."""
    return _samples("CompileTime")


def transfers_to_host() -> int:
    """Times that the host waited for values of the device."""
    return _samples("TransferFromDeviceTime")


def fallbacks() -> list[str]:
    """Operators without an XLA form, which ran on the host."""
    return [name for name in metrics.counter_names() if name.startswith("aten::")]


def _samples(name: str) -> int:
    return int((metrics.metric_data(name) or [0])[0])
