"""The gate stage: logits from hidden states, and every family from there on as the reference has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moe_core import MoEConfig, MoEWeights, reference
from moe_core.errors import InputError, RoutingError
from moe_core.testing.cases import CALL_FAMILIES, ROUTER_FAMILIES, SIZES, random_weights
from moe_core.testing.tolerances import tolerance
from moe_core.types import Plan
from moe_cuda.gate import gate, why_reference
from moe_cuda.kernels.logits import logits_parts, logits_parts_torch, split_for

FAMILIES = {**ROUTER_FAMILIES, **CALL_FAMILIES}
HALVES = (torch.float16, torch.bfloat16)


def plans(fields: Any, device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Plan, Plan]:
    """The same layer for the kernels, on their device, and for the reference, on the CPU."""
    config = MoEConfig(**{**SIZES, **fields, **changes})
    weights = random_weights(config, dtype=dtype)
    moved = MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})
    return Plan(config, moved, device, dtype), Plan(config, weights, torch.device("cpu"), dtype)


@pytest.mark.parametrize("tokens", [1, 3, 5, 37])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16,) * 2, HALVES], ids=str)
def test_logits_equal_twin(dtypes: tuple[torch.dtype, torch.dtype], tokens: int, device: torch.device) -> None:
    """Sums in float32 of exact products, for few tokens and more, experts and widths that fill no block, and views."""
    generator = torch.Generator().manual_seed(tokens)
    for experts, hidden in ((16, 32), (21, 200), (5, 1100)):
        x = torch.randn(tokens, hidden + 3, generator=generator).to(device, dtypes[0])[:, :hidden]
        w = torch.randn(experts, hidden, generator=generator).to(device, dtypes[1])
        found, wanted = logits_parts(x, w).sum(0), logits_parts_torch(x, w)[0]
        assert (found - wanted).norm() <= tolerance(torch.float32, "gate") * wanted.norm()


@pytest.mark.parametrize("upcast", [False, True])
def test_parts_cover_the_sum(upcast: bool) -> None:
    """Every chunk of H is in one part, no part is without one, and blocks have sizes that Triton takes."""
    for tokens in (1, 4, 5, 16, 17, 64, 300, 4096, 16384):
        for experts in (1, 8, 60, 128, 256, 512):
            for hidden in (8, 100, 2048, 2880, 7168):
                split = split_for(tokens, experts, hidden, upcast)
                chunks = -(-hidden // split.hidden)
                each = -(-chunks // split.parts)
                assert (split.parts - 1) * each < chunks <= split.parts * each
                assert (split.tokens == 1 and each <= 4) or min(split.tokens, split.experts, split.hidden) >= 16


@pytest.mark.parametrize("case", FAMILIES)
def test_families_from_hidden_states(case: str, device: torch.device) -> None:
    """Ids and weights of every family, kernel or not, are the reference's on rows without a close call."""
    plan, plain = plans(FAMILIES[case], device)
    x, ids = torch.randn(6, 32), torch.randint(0, 64, (6,))
    for given in (None, reference.router_logits_of(plain.config, plain.weights, x)):
        found = gate(plan, x.to(device), None if given is None else given.to(device), ids.to(device))
        wanted = reference.moe_gate(plain, x, given, ids)
        assert torch.equal(found.topk_ids.cpu(), wanted.topk_ids)
        error = (found.topk_weights.cpu() - wanted.topk_weights).norm()
        assert error <= tolerance(torch.float32, "gate") * wanted.topk_weights.norm()


@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_gate_weight_of_another_dtype(tokens: int, device: torch.device) -> None:
    """A float32 router in a 16-bit layer is not rounded, for few tokens and for many."""
    plan, plain = plans({"renormalize": True, "gate_bias": True}, device)
    x = torch.randn(tokens, 32).half()
    found, wanted = gate(plan, x.to(device), None, None), reference.moe_gate(plain, x, None, None)
    assert torch.equal(found.topk_ids.cpu(), wanted.topk_ids)
    error = (found.topk_weights.cpu() - wanted.topk_weights).norm()
    assert error <= tolerance(torch.float16, "gate") * wanted.topk_weights.norm()


def test_what_kernels_do_not_serve_has_a_reason() -> None:
    """Python functions, simulations and routers too wide for one program; nothing else."""
    for case, fields in FAMILIES.items():
        config = MoEConfig(**{**SIZES, **fields})
        served = config.custom_routing_function is None and config.simulated_routing is None
        assert (why_reference(config) == "") == served, case
    assert "4096" in why_reference(MoEConfig(8, 8, 5000, 2))


def test_errors(device: torch.device) -> None:
    """What the reference refuses, the kernels' gate refuses."""
    plan, _ = plans({"nan_policy": "raise"}, device)
    logits = torch.full((3, 16), float("nan"), device=device)
    with pytest.raises(RoutingError, match="row 0"):
        gate(plan, torch.zeros(3, 32, device=device), logits, None)
    without = dataclasses.replace(plan, weights=MoEWeights())
    with pytest.raises(InputError, match="gate_weight"):
        gate(without, torch.zeros(3, 32, device=device), None, None)
    hashed, _ = plans(ROUTER_FAMILIES["sqrtsoftplus_hash"], device)
    with pytest.raises(InputError, match="input_ids"):
        gate(hashed, torch.zeros(3, 32, device=device), None, None)


@pytest.mark.parametrize("case", ["softmax", "sqrtsoftplus_hash", "custom", "group_top2_bias"])
def test_no_tokens(case: str, device: torch.device) -> None:
    """T = 0 works, from hidden states and from logits."""
    plan, _ = plans(ROUTER_FAMILIES[case], device)
    ids = torch.zeros(0, dtype=torch.long, device=device)
    for logits in (None, torch.zeros(0, 16, device=device)):
        found = gate(plan, torch.zeros(0, 32, device=device), logits, ids)
        assert found.topk_ids.shape == found.topk_weights.shape == (0, plan.config.top_k)
