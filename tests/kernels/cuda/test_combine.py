"""The reduction kernel against its twin, and the stage against the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moe_core import ExpertsOut, MoEConfig, Pending, Routing, reference
from moe_core.testing.cases import SHARED_VARIANTS, SIZES
from moe_core.testing.tolerances import tolerance
from moe_core.types import Plan
from moe_cuda.kernels.combine import combine_rows, combine_rows_torch
from moe_cuda.reduce import reduce

REDUCES: dict[str, dict[str, Any]] = {
    **{name: dict(fields) for name, fields in SHARED_VARIANTS.items()},
    "plain": {},
    "output_scaled": {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
    "weight_on_input": {"apply_router_weight_on_input": True, "top_k": 1},
    "many_k": {"num_experts": 32, "top_k": 20},
}


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, stage: str = "reduce") -> None:
    error = (found.float() - wanted.float()).norm()
    assert error <= tolerance(dtype, stage) * wanted.float().norm(), f"error {error:.2e}"


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("case", REDUCES)
def test_reduce_equals_reference(case: str, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Weights, scale, shared experts and average as the reference has them; NaN behind an id of -1 stays there."""
    config = MoEConfig(**{**SIZES, **REDUCES[case]})
    plan = Plan(config, None, device, dtype)
    k, width = config.top_k, 300
    ids = torch.rand(tokens, config.num_experts).argsort(1)[:, :k].int()
    weights, value = torch.rand(tokens, k), torch.randn(tokens, k, width).to(dtype)
    shared = torch.randn(tokens, width) if config.has_shared_experts else None
    ids[tokens // 2, -1] = -1
    value[tokens // 2, -1] = 0
    routing = Routing(weights, ids)
    for reduced in (False, True):
        given = value[:, 0] if reduced else value
        wanted = reference.moe_reduce(
            Plan(config, None, torch.device("cpu"), dtype), routing, ExpertsOut(given, reduced), Pending(shared)
        )
        poisoned = given.clone()
        if not reduced:
            poisoned[tokens // 2, -1] = float("nan")
        on_device = Routing(weights.masked_fill(ids < 0, float("inf")).to(device), ids.to(device))
        pending = Pending(None if shared is None else shared.to(device))
        found = reduce(plan, on_device, ExpertsOut(poisoned.to(device), reduced), pending)
        assert found.dtype == dtype and pending.consumed
        close(found.cpu(), wanted, dtype)


@pytest.mark.parametrize("weighted", [False, True])
def test_combine_rows_equals_twin(weighted: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Rows that nobody wrote are not read, zero experts hand their token back, and padding behind rows is skipped."""
    tokens, k, width, held = 19, 3, 70, 5
    ids = torch.randint(-1, 9, (tokens, k), dtype=torch.int32)  # 5 and 6 are another rank's, 7 and 8 zero experts
    part = torch.randn(tokens * k, width + 6).to(dtype)
    part[(ids.reshape(-1) < 0) | (ids.reshape(-1) >= held)] = float("nan")
    part, ids = part.to(device)[:, :width], ids.to(device)
    weights = torch.rand(tokens, k).to(device)
    x, shared = torch.randn(tokens, width).to(device, dtype), torch.randn(tokens, width).to(device)
    options: dict[str, Any] = {
        "weighted": weighted,
        "limit": held,
        "hidden_states": x,
        "zero_experts": (7, 9),
        "scale": 1.5,
        "shared": shared,
        "divisor": 3,
    }
    found, wanted = (
        combine(part, ids, weights, torch.empty(tokens, width, dtype=dtype, device=device), **options)
        for combine in (combine_rows, combine_rows_torch)
    )
    assert torch.isfinite(found).all()
    close(found, wanted, dtype)


def test_rows_do_not_depend_on_their_batch(device: torch.device) -> None:
    """Bitwise: a token alone, in a small batch and in a large one."""
    part, weights = torch.randn(80, 4, 300).to(device), torch.rand(80, 4).to(device)
    ids = torch.zeros(80, 4, dtype=torch.int32, device=device)
    whole = combine_rows(part, ids, weights, torch.empty(80, 300, device=device))
    for count in (1, 5):
        some = combine_rows(part[:count], ids[:count], weights[:count], torch.empty(count, 300, device=device))
        assert torch.equal(some, whole[:count])


def test_no_tokens(device: torch.device) -> None:
    """T = 0 launches nothing."""
    config = MoEConfig(**SIZES)
    empty = torch.empty(0, 4, device=device)
    routing = Routing(empty, empty.int())
    value = ExpertsOut(torch.empty(0, 4, 32, device=device), False)
    out = reduce(Plan(config, None, device, torch.float16), routing, value, Pending(None))
    assert out.shape == (0, 32) and out.dtype == torch.float16
