"""The shared experts against the reference's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe_core import MoEConfig, MoEWeights, reference
from moe_core.testing.cases import EXPERT_VARIANTS, SHARED_VARIANTS, SIZES, quick_gelu, random_weights
from moe_core.testing.tolerances import tolerance
from moe_core.types import Plan
from moe_cuda.kernels.row_gate import scale_by_gate, scale_by_gate_torch
from moe_cuda.shared import shared_experts

CASES = {
    **SHARED_VARIANTS,
    "swiglu_alpha": {**SHARED_VARIANTS["shared_bias"], **EXPERT_VARIANTS["swiglu_alpha_interleaved_bias"]},
    "python_activation": {**SHARED_VARIANTS["shared"], "activation": quick_gelu},
}


@pytest.mark.parametrize("case", CASES)
def test_shared_experts_equal_reference(case: str, dtype: torch.dtype, device: torch.device) -> None:
    """Every variant, one token and several, hidden states unchanged."""
    config = MoEConfig(**{**SIZES, **CASES[case]})
    weights = random_weights(config, dtype=dtype)
    moved = MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})
    for tokens in (0, 1, 5):
        x = torch.randn(tokens, 32).to(dtype)
        given = x.to(device)
        found = shared_experts(Plan(config, moved, device, dtype), given).result()
        wanted = reference.moe_shared_experts(Plan(config, weights, torch.device("cpu"), dtype), x).result()
        assert found is not None and wanted is not None and found.shape == wanted.shape
        assert torch.equal(given.cpu(), x)
        assert (found.cpu().float() - wanted).norm() <= tolerance(dtype, "shared_experts") * wanted.norm()


def test_weights_of_another_dtype_are_not_rounded(device: torch.device) -> None:
    """float32 shared experts in a 16-bit layer."""
    config = MoEConfig(**{**SIZES, **SHARED_VARIANTS["shared_gate"]})
    weights = random_weights(config)
    moved = MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})
    x = torch.randn(3, 32).half()
    found = shared_experts(Plan(config, moved, device, torch.float16), x.to(device)).result()
    wanted = reference.moe_shared_experts(Plan(config, weights, torch.device("cpu"), torch.float16), x).result()
    assert found is not None and wanted is not None
    assert (found.cpu() - wanted).norm() <= tolerance(torch.float32, "shared_experts") * wanted.norm()


@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (2, 1500), (65, 70)])
def test_row_gate_equals_twin(tokens: int, width: int, device: torch.device) -> None:
    """Rows in one program and in several, and widths that fill no block."""
    rows, x, w = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(1, width)
    rows, x, w = rows.to(device, torch.float16), x.to(device, torch.float16), w.to(device)
    found, wanted = scale_by_gate(rows, x, w), scale_by_gate_torch(rows, x, w)
    assert found.dtype == torch.float16
    assert (found.float() - wanted.float()).norm() <= tolerance(torch.float16, "reduce") * wanted.float().norm()
