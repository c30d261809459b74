"""What torch_xla counts, for the whole process."""

from __future__ import annotations

from collections import Counter

import torch_xla.debug.metrics as metrics


def compilations() -> int:
    """Graphs that XLA compiled."""
    return _samples("CompileTime")


def transfers_to_host() -> int:
    """Times that the host waited for values of the device."""
    return _samples("TransferFromDeviceTime")


def fallbacks() -> Counter[str]:
    """Operators without an XLA form, and how often each ran on the host."""
    names = [name for name in metrics.counter_names() if name.startswith("aten::")]
    return Counter({name: int(metrics.counter_value(name) or 0) for name in names})


def _samples(name: str) -> int:
    return int((metrics.metric_data(name) or [0])[0])
