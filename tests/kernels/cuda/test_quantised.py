"""Quantised experts: rounding of rows, and forms that the kit's small layers do not reach."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_core import MoEConfig, QuantConfig, Routing
from moe_core.platform import Platform
from moe_core.quant.rounding import quantise_rows
from moe_core.testing import random_weights
from moe_core.testing.harness import Oracle, error_of
from moe_core.testing.quant_checks import allowance
from moe_core.testing.tolerances import tolerance
from moe_core.types import Plan

pytest.importorskip("triton")
from moe_cuda import experts, layout, quantised
from moe_cuda.kernels import w8a8
from moe_cuda.quant_tuning import Form, Step


@pytest.mark.parametrize("code", ["e4m3", "int8"])
def test_rows_are_rounded_as_the_reference_rounds_them(code: str, device: torch.device) -> None:
    x = (
        torch.randn(5, 100, generator=torch.Generator().manual_seed(2))
        * torch.tensor([1.0, 1e-3, 1e4, 0.0, 1.0])[:, None]
    )
    x[4, 70] = float("nan")
    expected, expected_scales = quantise_rows(x, code, 64)
    codes = torch.empty_like(expected, device=device)
    scales = torch.empty_like(expected_scales, device=device)
    w8a8.round_kernel[(5, 1)](
        x.to(device),
        None,
        codes,
        scales,
        codes,
        codes,
        WIDTH=100,
        GROUP=64,
        INT8=code == "int8",
        GIVEN=False,
        GROUPS=2,
        BLOCK=64,
        LIMITED=False,
        UPCAST=layout.interpreted(),
        PDL=False,
    )
    torch.testing.assert_close(scales.cpu(), expected_scales, rtol=1e-6, atol=0, equal_nan=True)
    finite = codes.cpu().float()[:4]
    # A quotient on the boundary of two codes may go either way; nowhere else.
    assert (finite != expected.float()[:4]).float().mean() < 0.01


FORMS = {
    # Four codes a word make four products of a quarter of the step, and a GPU's products have at least 16 columns.
    "tiles": Form(16, Step(16, 64, 4, 1, 0, 2), Step(32, 64, 4, 1, 0, 2)),
    "persistent": Form(32, Step(32, 64, 4, 1, 1, 1), Step(64, 64, 4, 1, 1, 4)),
    "led, columns first": Form(
        16, Step(16, 64, 4, 1, columns_first=True), Step(32, 64, 4, 1, columns_first=True), led=True
    ),
}
ONE = Form(1, Step(16, 128, 4, 1), Step(32, 32, 4, 2))
ONE_CASES = {
    "mxfp4": (QuantConfig("mxfp4", dtype="float32"), {"w13_interleaved": True, "expert_bias": True}),
    "int4, zeros": (QuantConfig("int4_weight_only", group_size=64, symmetric=False, dtype="float32"), {}),
    "int4, a scale a row": (QuantConfig("int4_weight_only", dtype="float32"), {"gated": False}),
    "int8, zeros": (QuantConfig("int8_weight_only", symmetric=False, dtype="float32"), {"gated": False}),
    "int8": (QuantConfig("int8_weight_only", group_size=32, dtype="float32"), {"apply_router_weight_on_input": True}),
    "mxfp4 by fours": (QuantConfig("mxfp4"), {}),
    "not readable": (QuantConfig("nvfp4", dtype="float32"), {}),
}
CASES = [
    (
        "mxfp4",
        QuantConfig("mxfp4", dtype="float32"),
        {"w13_interleaved": True, "expert_bias": True},
        "led, columns first",
    ),
    ("int4", QuantConfig("int4_weight_only", group_size=64, symmetric=False, dtype="float32"), {}, "tiles"),
    ("nvfp4", QuantConfig("nvfp4", dtype="float32"), {"gated": False}, "persistent"),
    ("int8", QuantConfig("int8_weight_only", symmetric=False, dtype="float32"), {}, "persistent"),
    ("blocks", QuantConfig("fp8_block", block_shape=(48, 32), dtype="float32"), {"expert_bias": True}, "tiles"),
    (
        "mixed blocks",
        QuantConfig("fp8_block", block_shape=(48, 32), dtype="float32"),
        {"w13_interleaved": True},
        "tiles",
    ),
    ("channels", QuantConfig("int8_w8a8", dtype="float32"), {"gated": False, "activation": "relu2"}, "persistent"),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_form_equals_the_dequantised_reference(case: tuple, device: torch.device) -> None:
    _, quant, fields, name = case
    form = FORMS[name]
    if quant.block_shape is not None:
        width = quant.block_shape[1]
        first, second = dataclasses.replace(form.first, n=width, k=width), dataclasses.replace(form.second, k=width)
        form = dataclasses.replace(form, first=first, second=second)
    _check(MoEConfig(72, 52, 5, 2, quant=quant, **fields), form, 21, device)


@pytest.mark.parametrize("name", ONE_CASES)
def test_one_row_equals_the_dequantised_reference(name: str, device: torch.device) -> None:
    quant, fields = ONE_CASES[name]
    top_k = 1 if "apply_router_weight_on_input" in fields else 2
    _check(MoEConfig(104, 72, 5, top_k, quant=quant, **fields), ONE, 4, device)


LOADER_CASES = {
    "plain": {},
    "biases": {"expert_bias": True, "swiglu_limit": 0.7},
    "weight on input": {"apply_router_weight_on_input": True},
}


@pytest.mark.parametrize("name", LOADER_CASES)
def test_blocks_with_a_loading_warpgroup_equal_the_dequantised_reference(name: str, device: torch.device) -> None:
    """Where there is no such warpgroup the same form means the other kernel.

    The last tile of weights has one block of rows; experts have none, few, and more than a tile's rows.
    """
    top_k = 1 if name == "weight on input" else 3
    quant = QuantConfig("fp8_block", block_shape=(128, 128), dtype="float32" if layout.interpreted() else "bfloat16")
    step = Step(128, 128, 8, 3, 1, 2, loader=True)
    _check(MoEConfig(384, 256, 5, top_k, quant=quant, **LOADER_CASES[name]), Form(128, step, step), 230, device)


MMA_CASES = {
    "mxfp4": (QuantConfig("mxfp4"), {"w13_interleaved": True, "expert_bias": True, "swiglu_limit": 0.7}),
    "int4": (QuantConfig("int4_weight_only", group_size=128), {"expert_bias": True}),
    "int4, narrow groups": (QuantConfig("int4_weight_only", group_size=32), {"apply_router_weight_on_input": True}),
    "int4, a scale a row": (QuantConfig("int4_weight_only"), {}),
    "int4, zeros": (QuantConfig("int4_weight_only", group_size=64, symmetric=False), {}),
}


@pytest.mark.parametrize("tokens", [1, 35])
@pytest.mark.parametrize("name", MMA_CASES)
def test_rows_without_shared_memory_equal_the_dequantised_reference(
    name: str, tokens: int, device: torch.device
) -> None:
    """Where these products do not run (zero points, other GPUs, the interpreter) the same form means another kernel.

    Of 35 tokens an expert has more than the eight of a product; rows and steps do not divide the layer's sizes.
    """
    quant, fields = MMA_CASES[name]
    quant = dataclasses.replace(quant, dtype="float32") if layout.interpreted() else quant
    top_k = 1 if "apply_router_weight_on_input" in fields else 3
    for chunks in (1, 2):
        form = Form(8, Step(16, 128 * chunks, 2, 1), Step(64, 256, 4, 1, columns_first=True), led=True)
        _check(MoEConfig(416, 224, 5, top_k, quant=quant, **fields), form, tokens, device)


@pytest.mark.parametrize("name", MMA_CASES)
def test_a_row_on_tensor_cores_equals_the_dequantised_reference(name: str, device: torch.device) -> None:
    """Where it does not run the same form means another kernel; columns, steps and warps do not divide the sizes."""
    quant, fields = MMA_CASES[name]
    quant = dataclasses.replace(quant, dtype="float32") if layout.interpreted() else quant
    top_k = 1 if "apply_router_weight_on_input" in fields else 3
    for steps in (
        (Step(4, 1024, 4, 2), Step(16, 1024, 4, 1)),
        (Step(8, 1024, 2, 3), Step(8, 1024, 1, 9)),
        (Step(2, 2048, 4, 1), Step(4, 4096, 4, 2)),
    ):
        form = Form(1, *steps, tensor_cores=True)
        _check(MoEConfig(2208, 1120, 5, top_k, quant=quant, **fields), form, 4, device)


def _check(config: MoEConfig, form: Form, tokens: int, device: torch.device) -> None:
    weights = random_weights(config, device=device)
    dtype = torch.float32 if config.quant is None else getattr(torch, config.quant.dtype)
    plan = Plan(config, layout.prepare(config, weights, Platform.detect(device, dtype)), device, dtype)
    oracle = Oracle(config, weights)
    hidden = config.hidden_size
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(4)).to(dtype)
    routing = oracle.gate(x)
    routing.topk_ids[tokens // 7 : tokens // 7 + 3 * (tokens > 1)] = -1
    out = torch.empty(tokens, hidden, dtype=dtype, device=device)
    experts.run(plan, form, x.to(device), Routing(*(tensor.to(device) for tensor in routing)), out)
    assert error_of(out, oracle.layer(x, routing)) <= tolerance(dtype, "layer") + allowance(config, dtype, tokens)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MoEConfig(66, 32, 4, 2, quant=QuantConfig("mxfp4")), "66 columns"),
        (MoEConfig(64, 33, 4, 2, quant=QuantConfig("int8_weight_only")), "33 columns"),
        (MoEConfig(64, 32, 4, 2, quant=QuantConfig("fp8_block", block_shape=(8, 48))), "blocks of 8 x 48"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_kernels_cannot_read_is_refused_with_the_rule(config: MoEConfig, says: str) -> None:
    reason, remedy = quantised.refused(config, "experts", None) or ("", "")
    assert says in reason
    assert "dequantise" in remedy
    assert (
        quantised.refused(dataclasses.replace(config, quant=QuantConfig("fp8_channel")), "experts", (8, 0)) is not None
    )
