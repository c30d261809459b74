"""The layer on XLA against the reference: every router family, every variant of experts, one static graph each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_xla
from torch import Tensor
from xla_helpers import on_device, reference_of, relative_error

from moe_core import MoEConfig, MoERunner, MoEWeights, Routing
from moe_core.platform import Platform
from moe_core.routing import route
from moe_core.testing.cases import EXPERT_VARIANTS, ROUTER_FAMILIES, SHARED_VARIANTS, SIZES, random_weights
from moe_core.testing.tolerances import tolerance
from moe_core.types import Plan
from moe_tpu import gate, layout

TOKENS = 19
VARIANTS = {**EXPERT_VARIANTS, **SHARED_VARIANTS}
Counted = Callable[[], tuple[int, int, list[str]]]


def layer_of(fields: Any, dtype: torch.dtype, device: torch.device) -> tuple[MoEConfig, MoEWeights, MoERunner]:
    config = MoEConfig(**{**SIZES, **fields})
    weights = random_weights(config, dtype=dtype)
    return config, weights, MoERunner(config, on_device(weights, device), backend="tpu")


@pytest.mark.parametrize("name", ROUTER_FAMILIES)
def test_gate_chooses_as_the_reference(name: str, device: torch.device, counted: Counted) -> None:
    """Equal logits give equal ids and weights, in one graph that never asks the host."""
    config = MoEConfig(**{**SIZES, **ROUTER_FAMILIES[name]})
    weights = random_weights(config)
    x, logits = torch.randn(TOKENS, config.hidden_size), 3 * torch.randn(TOKENS, config.num_router_outputs)
    logits[3] = logits[3, 0]  # a tie
    ids = torch.randint(0, 64, (TOKENS,))
    if config.custom_routing_function is not None:
        config = dataclasses.replace(config, check_ids=False)  # a check waits for the device
    expected = route(config, weights, logits, hidden_states=x, input_ids=ids)
    there = on_device(weights, device)
    plan = Plan(config, layout.prepare(config, there, Platform.detect(device)), device, torch.float32)
    moved = [tensor.to(device) for tensor in (x, logits, ids)]
    counted()
    found = gate.gate(plan, *moved)
    compiled, transfers, fallbacks = counted()
    assert (compiled <= 1, transfers, fallbacks) == (True, 0, [])
    assert found.topk_ids.dtype == torch.int32
    torch.testing.assert_close(found.topk_ids.cpu(), expected.topk_ids)
    torch.testing.assert_close(found.topk_weights.cpu(), expected.topk_weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    # In float32 those that take a path of their own; in bfloat16 all.
    [
        (name, torch.float32)
        for name in ("silu", "relu2_ungated", "interleaved_bias_gelu", "situ", "shared_gate_average")
    ]
    + [(name, torch.bfloat16) for name in VARIANTS],
    ids=str,
)
def test_layer_equals_the_reference(name: str, dtype: torch.dtype, device: torch.device, counted: Counted) -> None:
    """Gate, experts, shared experts and reduce together, within the table of tolerances."""
    config, weights, runner = layer_of(VARIANTS[name], dtype, device)
    assert set(runner.report.stages.values()) == {"tpu"}
    x = torch.randn(TOKENS, config.hidden_size).to(dtype)
    moved = x.to(device)
    counted()
    with torch.no_grad():
        y = runner(moved)
    compiled, transfers, fallbacks = counted()
    assert (compiled <= 1, transfers, fallbacks) == (True, 0, [])
    assert y.dtype == dtype
    assert relative_error(y.cpu(), reference_of(config, weights, x)) <= tolerance(dtype, "layer")


@pytest.mark.parametrize("form", ["ragged", "gmm", "dense"])
@pytest.mark.parametrize(
    "fields",
    [{"zero_expert_num": 3, "zero_expert_type": "identity"}, {"num_local_experts": 12}],
    ids=["zero_experts", "local_experts"],
)
def test_ids_that_name_no_expert_here(
    form: str, fields: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-1 and experts elsewhere add nothing, zero experts hand the token back; by both forms."""
    monkeypatch.setenv(layout.FORM_VARIABLE, form)
    config, weights, runner = layer_of({**fields, "check_ids": False}, torch.float32, device)
    x = torch.randn(TOKENS, config.hidden_size)
    ids = torch.randint(-1, config.num_router_outputs, (TOKENS, config.top_k), dtype=torch.int32)
    ids[0] = -1
    if config.num_local_experts:
        here = torch.where(ids < config.num_local_experts, ids, -1)
    else:
        here = ids
    given = torch.rand(TOKENS, config.top_k)
    with torch.no_grad():
        found = runner(x.to(device), topk_weights=given.to(device), topk_ids=ids.to(device)).cpu()
    expected = reference_of(config, weights, x, topk_weights=given, topk_ids=here)
    assert relative_error(found, expected) <= tolerance(torch.float32, "layer")
    assert not found[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["silu", "bias_ungated", "swiglu_alpha", "interleaved_bias_gelu", "post_expert_norm"])
def test_pallas_form_in_the_interpreter(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels, interpreted: the same layer within the table, for groups that meet inside a tile."""
    monkeypatch.setenv(layout.FORM_VARIABLE, "gmm")
    config, weights, runner = layer_of(EXPERT_VARIANTS[name], dtype, device)
    x = torch.randn(TOKENS, config.hidden_size).to(dtype)
    with torch.no_grad():
        found = runner(x.to(device)).cpu()
    assert relative_error(found, reference_of(config, weights, x)) <= tolerance(dtype, "layer")


@pytest.mark.parametrize("name", ["silu", "bias", "swiglu_alpha_interleaved_bias", "post_expert_norm", "situ"])
def test_dense_form_needs_torch_alone(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for hosts without jax gives the same layer."""
    monkeypatch.setattr(layout, "missing_for_jax", lambda platform: ["flax"])
    config, weights, runner = layer_of(
        {**SHARED_VARIANTS["shared_gate"], **EXPERT_VARIANTS[name]}, torch.float32, device
    )
    x = torch.randn(TOKENS, config.hidden_size)
    with torch.no_grad():
        found = runner(x.to(device)).cpu()
    assert relative_error(found, reference_of(config, weights, x)) <= tolerance(torch.float32, "layer")


@pytest.mark.parametrize("tokens", [0, 1, 16, 17])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    config, weights, runner = layer_of(SHARED_VARIANTS["shared_gate"], torch.float32, device)
    x = torch.randn(tokens, config.hidden_size)
    with torch.no_grad():
        found = runner(x.to(device)).cpu()
    assert found.shape == x.shape
    if tokens:
        assert relative_error(found, reference_of(config, weights, x)) <= tolerance(torch.float32, "layer")


def test_unchosen_experts_may_overflow(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense form multiplies every expert's output by its share; 0 times inf must not be NaN."""
    monkeypatch.setenv(layout.FORM_VARIABLE, "dense")
    config = MoEConfig(**SIZES)
    weights = random_weights(config)
    assert weights.w2_weight is not None
    weights.w2_weight[0] = torch.inf
    runner = MoERunner(config, on_device(weights, device), backend="tpu")
    ids = torch.full((2, config.top_k), -1, dtype=torch.int32)
    ids[:, 0] = 5
    routing = Routing(torch.ones(2, config.top_k), ids)
    with torch.no_grad():
        y = runner(
            torch.randn(2, config.hidden_size).to(device),
            topk_weights=routing.topk_weights.to(device),
            topk_ids=routing.topk_ids.to(device),
        )
    assert bool(torch.isfinite(y.cpu()).all())


@pytest.mark.filterwarnings(
    "ignore:Found tensor with shape:UserWarning"
)  # the layer's handle, which is read on the host
def test_compiles_whole_with_openxla(device: torch.device) -> None:
    """torch.compile with fullgraph gives the eager result, for each of two layers and after a change of weights."""
    layers = [layer_of(SHARED_VARIANTS["shared_gate"], torch.float32, device)[2] for _ in range(2)]

    def both(x: Tensor) -> Tensor:
        return layers[1](layers[0](x) + 1)

    x = torch.randn(TOKENS, SIZES["hidden_size"]).to(device)
    compiled = torch.compile(both, backend="openxla", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).cpu(), both(x).cpu())
        assert layers[0].weights.w2_weight is not None
        layers[0].weights.w2_weight.mul_(2)
        expected = both(x).cpu()  # binds anew
        torch.testing.assert_close(compiled(x).cpu(), expected)


def test_operators_keep_their_contract(device: torch.device) -> None:
    """Shapes and dtypes of the fakes are those of the results; openxla compiles the operator itself into its graph."""
    from moe_tpu import adapter

    x, w = torch.randn(8, 32).to(device), torch.randn(4, 32, 24).to(device)
    sizes = torch.tensor([2, 0, 5, 1], dtype=torch.int32).to(device)

    def products(x: Tensor, w: Tensor, sizes: Tensor) -> Tensor:
        return adapter.grouped_linear(x, w, sizes) + adapter.linear(x, w[0].t(), None)

    want = products(x, w, sizes).cpu()
    found = torch.compile(products, backend="openxla", fullgraph=True)(x, w, sizes)
    torch.testing.assert_close(found.cpu(), want)
    torch_xla.sync(wait=True)
