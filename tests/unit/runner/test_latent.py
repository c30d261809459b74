"""Transforms around the routed experts, and the padding that comes and goes with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import toys

from moe_core import ExpertsOut, MoEConfig, MoELayer, MoERunner, hookimpl, reference
from moe_core.errors import ConfigError, InputError, StageError


@pytest.fixture
def latent() -> dict:
    """A layer whose routed experts work in 16 of 32 columns, and its transforms."""
    torch.manual_seed(1)
    down, up = torch.nn.Linear(32, 16), torch.nn.Linear(16, 32)
    return {"moe_latent_size": 16, "routed_input_transform": down, "routed_output_transform": up}


@torch.no_grad()
@pytest.mark.parametrize("shared", [None, 40])
@pytest.mark.parametrize("combination", ["sum", "average"])
def test_gate_and_shared_experts_see_the_input_and_only_experts_the_transform(
    bind, latent, shared, combination
) -> None:
    config = MoEConfig(32, 24, 8, 2, moe_latent_size=16, shared_intermediate_size=shared)
    layer, x = MoELayer(config), torch.randn(7, 32)
    runner = bind(layer=layer, shared_intermediate_size=shared, shared_expert_combination=combination, **latent)
    weights, want = layer.weights(), torch.zeros(7, 16)
    scores = torch.softmax(x @ layer.gate_weight.t(), -1).topk(2)
    z = latent["routed_input_transform"](x)
    for t in range(7):
        for k in range(2):
            gate, up = (weights.w13_weight[scores.indices[t, k]] @ z[t]).chunk(2)
            want[t] += scores.values[t, k] * (weights.w2_weight[scores.indices[t, k]] @ (F.silu(gate) * up))
    want = latent["routed_output_transform"](want)
    if shared:
        gate, up = (x @ layer.shared_w13_weight.t()).chunk(2, -1)
        want = want + (F.silu(gate) * up) @ layer.shared_w2_weight.t()
        want = want / 2 if combination == "average" else want
    torch.testing.assert_close(runner(x), want, rtol=1e-5, atol=1e-5)


def padded(layer: MoELayer, width: int) -> MoELayer:
    """The same experts with columns of garbage where inputs are zero, and rows of garbage that must be cut off."""
    wide = MoELayer(MoEConfig(32, 24, 8, 2, moe_latent_size=width, shared_intermediate_size=40))
    state = {name: tensor for name, tensor in layer.state_dict().items() if name not in ("w13_weight", "w2_weight")}
    wide.load_state_dict(state, strict=False)
    with torch.no_grad():
        wide.w13_weight.fill_(toys.MARK)[:, :, :16] = layer.w13_weight
        wide.w2_weight.fill_(toys.MARK)[:, :16] = layer.w2_weight
    return wide


@torch.no_grad()
def test_a_transform_narrower_than_padded_experts_is_padded_and_truncated(bind, latent) -> None:
    layer = MoELayer(MoEConfig(32, 24, 8, 2, moe_latent_size=16, shared_intermediate_size=40))
    x = torch.randn(7, 32)
    want = bind(layer=layer, **latent)(x)
    got = bind(layer=padded(layer, 24), **{**latent, "moe_latent_size": 24})(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("shared", [None, 40])
def test_the_padding_of_a_kernel_is_cut_off_behind_the_experts(bind, reduced: bool, shared) -> None:
    class Padding(toys.Toy):
        name = "padding"

        @hookimpl
        def moe_experts(self, plan, hidden_states, routing, router_logits):
            out = reference.moe_experts(plan, hidden_states, routing).value
            if reduced:
                out = torch.einsum("tkh,tk->th", out, routing.topk_weights)
            return ExpertsOut(F.pad(out, (0, 9), value=toys.MARK), reduced)

    config = MoEConfig(32, 24, 8, 2, shared_intermediate_size=shared)
    layer, x = MoELayer(config), torch.randn(7, 32)
    want = MoERunner(config, layer.weights(), backend="reference")(x)
    assert torch.equal(bind(Padding(), layer=layer, shared_intermediate_size=shared)(x), want)


@torch.no_grad()
def test_experts_narrower_than_the_layer_are_an_error(bind) -> None:
    class Narrow(toys.Toy):
        name = "narrow"

        @hookimpl
        def moe_experts(self, plan, hidden_states, routing, router_logits):
            return ExpertsOut(reference.moe_experts(plan, hidden_states, routing).value[..., :31], False)

    with pytest.raises(StageError, match=r"returned \[3, 2, 31\] .*expected \[3, 2, 32\]"):
        bind(Narrow())(torch.randn(3, 32))


@pytest.mark.parametrize("missing", ["routed_input_transform", "routed_output_transform"])
def test_a_latent_layer_without_a_transform_is_refused_at_bind(bind, latent, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing}=None"):
        bind(**{**latent, missing: None})


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "into", "text"),
    [
        (16, lambda x: x, "rows of 32, expected at most 16"),
        (16, lambda x: x[:3, :16], "expected a tensor [5, 16]"),
        (16, lambda x: (x,), "returned tuple"),
        (None, lambda x: x[:, :16], "rows of 16, expected 32"),
    ],
)
def test_an_input_transform_of_another_shape_is_refused(bind, latent, size, into, text: str) -> None:
    runner = bind(**{**latent, "moe_latent_size": size, "routed_input_transform": into})
    with pytest.raises(InputError) as caught:
        runner(torch.randn(5, 32))
    assert text in str(caught.value)


@torch.no_grad()
def test_an_output_transform_of_another_shape_is_refused(bind, latent) -> None:
    runner = bind(**{**latent, "routed_output_transform": lambda x: x})
    with pytest.raises(InputError, match=r"returned \(5, 16\), expected \[T, 32\]"):
        runner(torch.randn(5, 32))


def test_gradients_pass_through_padding_and_transforms(bind, latent) -> None:
    layer = padded(MoELayer(MoEConfig(32, 24, 8, 2, moe_latent_size=16, shared_intermediate_size=40)), 24)
    x = torch.randn(40, 32, requires_grad=True)
    config = layer.config
    transforms = {name: latent[name] for name in ("routed_input_transform", "routed_output_transform")}
    MoERunner(config, layer.weights(), **transforms)(x).square().sum().backward()
    for tensor in (x, layer.w13_weight, *(p for module in transforms.values() for p in module.parameters())):
        assert tensor.grad.abs().sum() > 0
    assert layer.w13_weight.grad[:, :, 16:].abs().sum() == 0, "columns behind the padding see zeros"
