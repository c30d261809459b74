"""The activation kernel against the library's own activations, which are its meaning."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe_core import MoEConfig
from moe_core.testing.cases import EXPERT_VARIANTS, SIZES
from moe_core.testing.tolerances import tolerance
from moe_cuda.kernels.activation import activate_rows, activate_rows_torch, activation_constants

SERVED = (
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu2",
    "silu_ungated",
    "gelu_tanh_ungated",
    "relu2_ungated",
    "interleaved",
    "interleaved_bias_gelu",
    "swiglu_limit",
    "swiglu_limit_gelu",
    "swiglu_alpha",
    "swiglu_alpha_interleaved_bias",
)


@pytest.mark.parametrize("case", SERVED)
def test_activation_equals_the_library(case: str, dtype: torch.dtype, device: torch.device) -> None:
    """Every named activation, gated or not, packed or interleaved, clamped or not; also in rows of odd width."""
    config = MoEConfig(**{**SIZES, **EXPERT_VARIANTS[case]})
    for width in (24, 7):
        projected = (3 * torch.randn(53, width * (2 if config.gated else 1))).to(device, dtype)
        found, wanted = activate_rows(config, projected, dtype), activate_rows_torch(config, projected, dtype)
        assert found.dtype == dtype
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert error <= tolerance(dtype, "reduce")


@pytest.mark.parametrize("case", SERVED)
def test_activation_hands_nan_on(case: str, device: torch.device) -> None:
    """NaN and infinity give what torch gives: a clamp that swallowed NaN would hide a broken layer."""
    config = MoEConfig(**{**SIZES, **EXPERT_VARIANTS[case]})
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -0.0, 90.0])
    rows = torch.cartesian_prod(special, special)
    if not config.gated:
        rows = rows[:, :1]
    projected = rows.contiguous().to(device)
    found = activate_rows(config, projected, torch.float32)
    torch.testing.assert_close(found, activate_rows_torch(config, projected, torch.float32), equal_nan=True)


@pytest.mark.parametrize("case", EXPERT_VARIANTS)
def test_python_functions_are_not_served(case: str) -> None:
    """What is no name has no kernel, and says so with None; every name has one."""
    config = MoEConfig(**{**SIZES, **EXPERT_VARIANTS[case]})
    named = isinstance(config.activation, str) and config.custom_activation_function is None
    assert (activation_constants(config) is not None) == named


def test_no_rows(device: torch.device) -> None:
    """n = 0 launches nothing."""
    config = MoEConfig(**SIZES)
    assert activate_rows(config, torch.empty(0, 48, device=device), torch.float32).shape == (0, 24)
