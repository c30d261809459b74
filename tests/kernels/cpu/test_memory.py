"""What a bind costs beside the weights: one copy in panels, and nothing of size for a moment either."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moe_core.platform import Platform
from moe_cpu import strategies

CODE = """
import sys, torch
from moe_core import MoEConfig, MoERunner, MoEWeights

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

dtype = getattr(torch, sys.argv[1])
def bind(hidden, inner, experts):
    shapes = {"gate_weight": (experts, hidden), "w13_weight": (experts, 2 * inner, hidden)}
    shapes["w2_weight"] = (experts, hidden, inner)
    weights = MoEWeights(**{name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()})
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    runner = MoERunner(MoEConfig(hidden, inner, experts, 2), weights, backend="cpu")
    return sum(t.nbytes for _, t in weights.named_tensors()) / 1024, kilobytes("VmHWM") - before

bind(64, 32, 2)  # what is loaded once
size, added = bind(1024, 520, 24)
print(added / size)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bind_adds_one_copy(dtype: str) -> None:
    """At most 1.15 times the weights, at any moment, above the weights themselves."""
    if not strategies.native(Platform.detect("cpu", getattr(torch, dtype))).ok:
        pytest.skip("no C++ compiler is on PATH")
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError as error:
        pytest.skip(f"the peak of this process cannot be reset: {error}")
    done = subprocess.run([sys.executable, "-c", CODE, dtype], capture_output=True, text=True, timeout=200, check=True)
    assert 0.9 < float(done.stdout) < 1.15
