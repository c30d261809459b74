"""Expert parallel on four virtual devices of XLA's CPU client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from moe_core.testing.tolerances import tolerance

HERE = Path(__file__).parent


def test_experts_on_four_devices() -> None:
    """The reference's numbers, one compilation for equal shapes, no transfer; and mark_sharding is an error."""
    env = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, str(HERE / "expert_parallel.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 4
    for name in ("silu", "bias", "gmm"):
        assert found[name]["error"] <= tolerance(torch.float32, "experts")
        assert found[name]["compilations"] == 1
        assert found[name]["transfers"] == 0
    assert found["fallbacks"] == []
    assert "mark_sharding" in found["marked"]
    assert "ExpertParallel" in found["marked"]
