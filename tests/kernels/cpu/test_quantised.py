"""Experts of 8 and 4 bits in the native kernel: every scheme, every set of instructions, and which bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from moe_core import MoEConfig, Routing, explain, reference
from moe_core.errors import BackendUnavailableError
from moe_core.testing.cases import QUANT_VARIANTS
from moe_core.testing.tolerances import tolerance
from moe_core.types import Plan
from moe_cpu import layout, shared

SERVED = [name for name, fields in QUANT_VARIANTS.items() if fields["quant"].scheme in layout.SCHEMES]
REFUSED = [name for name in QUANT_VARIANTS if name not in SERVED]


@pytest.fixture
def coded(make: Any) -> Any:
    """``coded(variant, dtype, **sizes)``: a layer that 32, tiles and panels do not divide."""

    def case(name: str, dtype: torch.dtype, **fields: Any) -> Any:
        variant = {**QUANT_VARIANTS[name], **fields}
        quant = dataclasses.replace(variant["quant"], dtype=str(dtype).removeprefix("torch."))
        sizes = {"hidden_size": 300, "intermediate_size": 138, "num_experts": 5, "top_k": 2}
        return make(dtype, **{**variant, **sizes, "quant": quant})

    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SERVED)
def test_every_scheme(coded: Any, name: str, dtype: torch.dtype) -> None:
    """One token, a tile, two tiles, and more rows than are multiplied at a time; ids of no expert."""
    case = coded(name, dtype)
    for tokens in (1, 16, 61, 250):
        x, routing = case.hidden(tokens), case.routing(tokens)
        routing.topk_ids[3::7, 0] = -1
        found, expected = case.run(x, routing).double(), case.expected(x, routing).double()
        assert (found - expected).norm() <= tolerance(dtype, "experts") * expected.norm()


@pytest.mark.parametrize("name", ["int8_zero_32", "int4_128", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_neither_threads_nor_neighbours(coded: Any, name: str, dtype: torch.dtype) -> None:
    """Codes are expanded beside the product of few rows and before that of many: the same bits."""
    case = coded(name, dtype)
    x, routing = case.hidden(211), case.routing(211)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = case.run(x, routing)
        torch.set_num_threads(3)
        for part in (slice(0, 211), slice(0, 1), slice(5, 7), slice(9, 60), slice(60, 211)):
            alone = case.run(x[part], Routing(routing.topk_weights[part], routing.topk_ids[part]))
            assert torch.equal(alone, first[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8_weight_only", "mxfp4", None])
def test_shared_experts_have_a_scheme_of_their_own(coded: Any, scheme: str | None, dtype: torch.dtype) -> None:
    """Another than the routed ones, or none."""
    quant = dataclasses.replace(QUANT_VARIANTS["int4_128"]["quant"], shared_scheme=scheme)
    case = coded("int4_128", dtype, quant=quant, shared_intermediate_size=70)
    x = case.hidden(9)
    found, expected = (
        serve(Plan(case.config, weights, torch.device("cpu"), dtype), x).result().double()
        for serve, weights in ((shared.shared_experts, case.packed), (reference.moe_shared_experts, case.weights))
    )
    assert (found - expected).norm() <= tolerance(dtype, "experts") * expected.norm()


@pytest.mark.parametrize("name", REFUSED)
def test_quantised_activations_are_refused_by_name(name: str) -> None:
    """With the schemes that are served as the remedy."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_experts": 4, "top_k": 2}
    config = MoEConfig(**{**sizes, **QUANT_VARIANTS[name]})
    with pytest.raises(BackendUnavailableError, match=rf"{config.quant.scheme}.*int8_weight_only"):
        explain(config, "cpu", dtype=torch.bfloat16, backend="cpu")


def test_a_strategy_without_such_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_CPU_STRATEGY", "onednn")
    config = MoEConfig(64, 64, 4, 2, quant=QUANT_VARIANTS["int4_row"]["quant"])
    with pytest.raises(BackendUnavailableError, match="onednn has no kernel for quantised weights"):
        explain(config, "cpu", dtype=torch.bfloat16, backend="cpu")
