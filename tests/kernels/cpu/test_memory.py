"""What a bind costs beside the weights: one copy in panels, at any moment, or little where they are given away."""

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

dtype, consume = getattr(torch, sys.argv[1]), sys.argv[2] == "consume"
def bind(hidden, inner, experts):
    shapes = {"gate_weight": (experts, hidden), "w13_weight": (experts, 2 * inner, hidden)}
    shapes["w2_weight"] = (experts, hidden, inner)
    weights = MoEWeights(**{name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()})
    size = sum(t.nbytes for _, t in weights.named_tensors()) / 1024
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    runner = MoERunner(MoEConfig(hidden, inner, experts, 2), weights, backend="cpu", consume_weights=consume)
    assert (weights.w13_weight.numel() == 0) == (weights.w2_weight.numel() == 0) == consume
    return size, kilobytes("VmHWM") - before

bind(64, 32, 2)  # what is loaded once
size, added = bind(*map(int, sys.argv[3].split(",")))
print(added / size)
"""


@pytest.mark.parametrize(
    ("weights", "size", "least", "most"), [("keep", "1024,520,24", 0.9, 1.15), ("consume", "1024,512,32", -0.1, 0.15)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bind_adds_one_copy(dtype: str, weights: str, size: str, least: float, most: float) -> None:
    """At most 1.15 times the weights, at any moment, above the weights themselves; 0.15 where they are consumed: the
    check at bind keeps one expert of 32, and reads it in float32."""
    if not strategies.native(Platform.detect("cpu", getattr(torch, dtype))).ok:
        pytest.skip("no C++ compiler is on PATH")
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError as error:
        pytest.skip(f"the peak of this process cannot be reset: {error}")
    command = [sys.executable, "-c", CODE, dtype, weights, size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert least < float(done.stdout) < most
