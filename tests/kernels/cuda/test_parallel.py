"""These kernels on simulated ranks that send their sums in pieces as they are made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "parallel"))

from layers import SHARED, assert_near, config_of, parts, random_weights
from memory import directly, in_pieces

KINDS: dict[str, dict[str, Any]] = {
    "shared": SHARED,
    "biases": {"expert_bias": True},
    "weight on input": {"apply_router_weight_on_input": True, "top_k": 1},
    "zero experts": {"zero_expert_num": 3, "zero_expert_type": "identity"},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_sums_in_pieces_equal_sums_as_a_whole(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cpu":
        pytest.skip("simulated ranks share memory of the host; tests/gpu/run_parallel.sh has real ones")
    config = config_of(**KINDS[kind])
    weights = random_weights(config)
    calls = [parts(torch.randn(sum(counts), 32), counts) for counts in ([9, 9], [7, 0])]
    in_pieces(monkeypatch, beside_from=0, piece=256)
    found = directly(config, weights, calls, backend="cuda")
    in_pieces(monkeypatch, most_pieces=1)
    for pieces, once in zip(found, directly(config, weights, calls, backend="cuda"), strict=True):
        assert_near(torch.cat(pieces), torch.cat(once))
