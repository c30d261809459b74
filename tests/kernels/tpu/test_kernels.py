"""The Pallas kernels in the interpreter, at sizes at which all three serve a layer; the other tests' are too narrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_xla.core import xla_builder
from xla_helpers import on_device, reference_of, relative_error

from moe_core import MoEConfig, MoERunner
from moe_core.testing.cases import EXPERT_VARIANTS, random_weights
from moe_core.testing.tolerances import tolerance
from moe_tpu import functions, layout
from moe_tpu.kernels.work import most_visits, tile_columns, tile_rows

WIDE = {"hidden_size": 256, "intermediate_size": 128, "num_experts": 8, "top_k": 2}


def spread(tokens: int, k: int, experts: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])


CASES: dict[str, tuple[int, dict[str, Any], Callable[[int, int, int], torch.Tensor]]] = {
    "groups that meet inside tiles": (80, {}, spread),
    "one expert with every row": (40, {}, lambda t, k, e: torch.full((t, k), e - 1)),
    "the first and the last expert": (24, {}, lambda t, k, e: torch.tensor([[0, e - 1]] * t)),
    "no expert at all": (16, {}, lambda t, k, e: torch.full((t, k), -1)),
    "some experts are elsewhere": (56, {"num_local_experts": 4}, spread),
    "one token": (1, {}, spread),
    "the first product in parts": (32, {"intermediate_size": 384}, spread),
    "the second product in parts": (16, {"hidden_size": 2048}, spread),
    "clamped and shifted": (48, EXPERT_VARIANTS["swiglu_alpha"], spread),
    "scaled sum": (64, {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True}, spread),
}
"""Why -> tokens, fields of the layer, ids(tokens, top_k, experts)."""
NARROW = {"the first product in parts": 2 * 384 * 256, "the second product in parts": 2 * 128 * 1024}
"""Why -> numbers that fit into fast memory, so that an expert does not."""


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(case, torch.bfloat16) for case in list(CASES)[:2]],
    ids=str,
)
def test_routed_experts(case: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows gathered, multiplied and summed by the kernels, which all ran, are the reference's; ids of -1 weigh inf."""
    tokens, fields, ids_of = CASES[case]
    ran: list[str] = []

    def spy(name: str) -> None:
        kernel = getattr(functions, name)
        monkeypatch.setattr(functions, name, lambda *args, **options: ran.append(name) or kernel(*args, **options))

    for name in ("gathered_gate_up", "grouped_matmul", "combine"):
        spy(name)
    monkeypatch.setattr(xla_builder, "_JAX_TO_XLA_COMPUTATION_CACHE", {})  # or equal shapes would not be traced again
    if case in NARROW:
        monkeypatch.setattr("moe_tpu.kernels.work.WEIGHT_BYTES", NARROW[case] * dtype.itemsize)
    monkeypatch.setenv(layout.FORM_VARIABLE, "gmm")
    config = MoEConfig(**{**WIDE, **fields, "check_ids": False, "check_layout": False})
    weights = random_weights(config, dtype=dtype)
    runner = MoERunner(config, on_device(weights, device), backend="tpu")
    x = torch.randn(tokens, config.hidden_size).to(dtype)
    ids = ids_of(tokens, config.top_k, config.num_experts).int()
    ids[::5, 0] = -1
    here = torch.where(ids < config.num_held_experts, ids, -1)
    given = torch.rand(tokens, config.top_k).masked_fill(ids < 0, torch.inf)
    with torch.no_grad():
        found = runner(x.to(device), topk_weights=given.to(device), topk_ids=ids.to(device)).cpu()
    assert ran == ["gathered_gate_up", "grouped_matmul", "combine"]
    expected = reference_of(config, weights, x, topk_weights=given, topk_ids=here)
    if not expected.any():
        assert not found.any()
    else:
        assert relative_error(found, expected) <= tolerance(dtype, "layer")


def test_tiles() -> None:
    """Tiles are about a group's rows, divide the rows, and take in no more columns than fit."""
    assert tile_rows(16384, 16384, 128) == 128
    assert tile_rows(16384, 4096, 64) == 64  # a quarter of the experts is here
    assert tile_rows(128, 128, 128) == 8
    assert tile_rows(24, 24, 1) == 8
    assert most_visits(64, 8, 16) == 11
    assert tile_columns(768, 2048, 1, 2) == 2048
    assert tile_columns(7168, 2048, 2, 2) == 1024
    assert tile_columns(2048, 7168, 1, 2) == 7168
    assert tile_columns(14336, 4096, 1, 2) == 1024
    assert tile_columns(24, 40, 1, 4) == 40
