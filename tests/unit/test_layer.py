"""MoELayer behaves as any nn.Module does: saving, moving, copying, training; and it never uses stale weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoELayer, MoERunner, backends, explain
from moe_core.errors import BackendUnavailableError, ConfigError, GradientError
from moe_core.testing import tolerance

USABLE = [status.name for status in backends() if status.status == "ok" and "cpu" in status.device_types]
FAST = [name for name in USABLE if name != "reference"]
BIAS = {"scoring_func": "sigmoid", "e_score_correction_bias": True, "expert_bias": True, "shared_expert_bias": True}


@pytest.fixture
def biased() -> MoELayer:
    layer = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40, shared_expert_gate=True, **BIAS))
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name.endswith("_bias"):
                tensor.normal_()
    return layer


@torch.no_grad()
def expected(layer: MoELayer, x: Tensor) -> Tensor:
    """What a runner makes of these weights that has never seen others."""
    return MoERunner(layer.config, layer.weights(), backend="reference")(x)


@torch.no_grad()
def assert_current(layer: MoELayer) -> None:
    x = torch.randn(5, layer.config.hidden_size, dtype=layer.w13_weight.dtype)
    want = expected(layer, x)
    assert (layer(x) - want).norm() <= tolerance(x.dtype, "layer") * want.norm()


@torch.no_grad()
def test_state_dict_round_trip(biased: MoELayer) -> None:
    file = io.BytesIO()
    torch.save(biased.state_dict(), file)
    file.seek(0)
    other = MoELayer(biased.config)
    assert other.load_state_dict(torch.load(file)) == ([], [])
    x = torch.randn(5, 32)
    assert torch.equal(other(x), biased(x))
    assert set(biased.state_dict()) == {name for name, _ in biased.weights().named_tensors()}


@torch.no_grad()
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_are_equal_and_independent(biased: MoELayer, clone) -> None:
    x = torch.randn(5, 32)
    before = biased(x)
    other = clone(biased)
    assert torch.equal(other(x), before)
    other.w2_weight.zero_()
    assert torch.equal(biased(x), before)
    assert_current(other)


@torch.no_grad()
def test_a_layer_saved_whole_can_be_loaded(biased: MoELayer) -> None:
    x, file = torch.randn(5, 32), io.BytesIO()
    before = biased(x)
    torch.save(biased, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), before)


@torch.no_grad()
def test_to_converts_parameters_and_keeps_the_selection_bias_exact(biased: MoELayer) -> None:
    bias = biased.e_score_correction_bias.clone()
    assert_current(biased)
    biased.to(torch.bfloat16)
    assert {p.dtype for p in biased.parameters()} == {torch.bfloat16}
    assert torch.equal(biased.e_score_correction_bias, bias)
    assert biased(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert_current(biased)
    biased.float()
    assert torch.equal(biased.e_score_correction_bias, bias)
    assert_current(biased)


def test_it_can_be_made_without_memory_and_filled_later(biased: MoELayer) -> None:
    with torch.device("meta"):
        empty = MoELayer(biased.config)
    assert empty.w13_weight.is_meta
    empty.to_empty(device="cpu").load_state_dict(biased.state_dict())
    assert_current(empty)
    assigned = MoELayer(biased.config, device="meta")
    assigned.load_state_dict(biased.state_dict(), assign=True)
    assert_current(assigned)


def test_a_quantised_layer_is_refused() -> None:
    from moe_core import QuantConfig

    with pytest.raises(ConfigError, match="MoERunner"):
        MoELayer(MoEConfig(32, 24, 8, 2, quant=QuantConfig("fp8_tensor")))


# Weights that change after the bind.


def step(layer: MoELayer) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with torch.enable_grad():
        layer(torch.randn(9, 32)).square().sum().backward()
    optimizer.step()


CHANGES = {
    "copy_": lambda layer: layer.w13_weight.copy_(torch.randn_like(layer.w13_weight)),
    "one row": lambda layer: layer.w2_weight[3].mul_(-2),
    "shared": lambda layer: layer.shared_w2_weight.neg_(),
    "router": lambda layer: layer.gate_weight.neg_(),
    "selection bias": lambda layer: layer.e_score_correction_bias.neg_(),
    "a bias": lambda layer: layer.w2_bias.add_(1),
    "load_state_dict": lambda layer: layer.load_state_dict(MoELayer(layer.config).state_dict()),
    "assign": lambda layer: layer.load_state_dict(MoELayer(layer.config).state_dict(), assign=True),
    "new parameter": lambda layer: setattr(layer, "w2_weight", torch.nn.Parameter(-layer.w2_weight)),
    "another storage": lambda layer: layer.w2_weight.set_(-layer.w2_weight),
    "optimizer": step,
    "reset": lambda layer: layer.reset_parameters(),
    "to": lambda layer: layer.to(torch.bfloat16),
    "to and back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "requires_grad_": lambda layer: layer.requires_grad_(False),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("backend", [None, *USABLE])
def test_changed_weights_are_never_used_stale(biased: MoELayer, change, backend: str | None) -> None:
    if change is step and backend in FAST:
        biased.backend = None  # the backend itself can't train; the layer's own choice for prediction is the same one
    else:
        biased.backend = backend
    assert_current(biased)
    change(biased)
    if not serves(biased):  # a processor without bfloat16: asked for by name, so an error and no substitute
        with pytest.raises(BackendUnavailableError, match="never substituted"):
            biased(torch.randn(5, 32, dtype=biased.w13_weight.dtype))
        return
    assert_current(biased)


def serves(layer: MoELayer) -> bool:
    """Whether the backend that was asked for, if any, takes the layer as it is now."""
    found = explain(layer.config, "cpu", dtype=layer.w13_weight.dtype).candidate(layer.backend or "reference")
    return found is not None and found.status == "ok"


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_refresh_is_for_writes_that_torch_cannot_see(biased: MoELayer, backend: str) -> None:
    biased.backend = backend
    biased(torch.randn(2, 32))
    biased.w2_weight.data.numpy()[:] *= -2
    biased.runner.refresh()
    assert_current(biased)


# Gradients.


def test_it_trains_out_of_the_box() -> None:
    layer = MoELayer(MoEConfig(16, 24, 4, 2, renormalize=True, shared_intermediate_size=16))
    x, optimizer = torch.randn(64, 16), torch.optim.Adam(layer.parameters(), lr=1e-2)
    target, losses = x.roll(1, dims=1), []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert_current(layer)


def plain_layer(layer: MoELayer, x: Tensor) -> Tensor:
    """The same layer as a dozen lines of dense torch: every expert on every token."""
    silu, c = torch.nn.functional.silu, layer.config

    def mlp(w13: Tensor, w2: Tensor) -> Tensor:
        gate, up = (x @ w13.t()).chunk(2, dim=-1)
        return (silu(gate) * up) @ w2.t()

    scores = torch.softmax(x @ layer.gate_weight.t(), dim=-1)
    best = scores.topk(c.top_k, dim=-1)
    weights = torch.zeros_like(scores).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    experts = torch.stack([mlp(w13, w2) for w13, w2 in zip(layer.w13_weight, layer.w2_weight, strict=True)], dim=1)
    shared = mlp(layer.shared_w13_weight, layer.shared_w2_weight)
    return (experts * weights[..., None]).sum(1) + shared * torch.sigmoid(x @ layer.shared_gate_weight.t())


@pytest.mark.parametrize("tokens", [1, 17])
def test_gradients_are_those_of_plain_torch(layer: MoELayer, tokens: int) -> None:
    x, probe = torch.randn(tokens, 32, requires_grad=True), torch.randn(tokens, 32)
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad((layer(x) * probe).sum(), inputs)
    wanted = torch.autograd.grad((plain_layer(layer, x) * probe).sum(), inputs)
    for name, ours, theirs in zip(["input", *dict(layer.named_parameters())], found, wanted, strict=True):
        assert ours.abs().sum() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_of_every_part_that_a_config_can_add(biased: MoELayer) -> None:
    biased(torch.randn(40, 32)).square().sum().backward()
    for name, parameter in biased.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_no_tokens_can_be_trained_on(layer: MoELayer) -> None:
    x = torch.empty(0, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 32)
    layer(torch.empty(0, 32)).sum().backward()


def test_it_trains_with_one_backend_and_predicts_with_another(layer: MoELayer) -> None:
    x = torch.randn(5, 32)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    report = layer.report
    assert report.training is not None
    assert report.training.backend == "reference"
    assert report.training.purpose == "training"
    assert report.backend == (FAST[0] if FAST else "reference")
    assert "with gradients" in str(report)


@pytest.mark.parametrize("backend", FAST)
def test_a_forced_backend_without_backward_says_no_grad(layer: MoELayer, backend: str) -> None:
    layer.backend = backend
    x = torch.randn(5, 32)
    with pytest.raises(GradientError, match=r"torch\.no_grad\(\)"):
        layer(x)
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    with pytest.raises(GradientError, match=r"torch\.no_grad\(\)"):
        layer.requires_grad_(False)(x.requires_grad_())


def needs_input(layer: MoELayer) -> list[Tensor]:
    x = torch.randn(5, 32, requires_grad=True)
    layer.requires_grad_(False)(x).sum().backward()
    return [x]


def needs_logits(layer: MoELayer) -> list[Tensor]:
    logits = torch.randn(5, 8, requires_grad=True)
    layer.requires_grad_(False)(torch.randn(5, 32), logits).square().sum().backward()
    return [logits]


def needs_given_weights(layer: MoELayer) -> list[Tensor]:
    weights = torch.rand(5, 2, requires_grad=True)
    ids = torch.tensor([[0, 1]]).expand(5, 2)
    layer.requires_grad_(False)(torch.randn(5, 32), topk_weights=weights, topk_ids=ids).sum().backward()
    return [weights]


def needs_thawed_weight(layer: MoELayer) -> list[Tensor]:
    weights = layer.requires_grad_(False).weights()
    runner = MoERunner(layer.config, weights)
    runner(torch.randn(5, 32))
    layer.w2_weight.requires_grad_()
    runner(torch.randn(5, 32)).sum().backward()
    return [layer.w2_weight]


def needs_gate_module(layer: MoELayer) -> list[Tensor]:
    gate = torch.nn.Linear(32, 8, bias=False)
    weights = layer.requires_grad_(False).weights()
    MoERunner(layer.config, weights, gate=gate)(torch.randn(5, 32)).square().sum().backward()
    return [gate.weight]


def needs_gate_function(layer: MoELayer) -> list[Tensor]:
    gate = torch.randn(32, 8, requires_grad=True)
    weights = layer.requires_grad_(False).weights()
    MoERunner(layer.config, weights, gate=lambda x: x @ gate)(torch.randn(5, 32)).square().sum().backward()
    return [gate]


def needs_shared_function(layer: MoELayer) -> list[Tensor]:
    shared = torch.randn(32, 32, requires_grad=True)
    weights = layer.requires_grad_(False).weights()
    MoERunner(layer.config, weights, shared_experts=lambda x: x @ shared)(torch.randn(5, 32)).sum().backward()
    return [shared]


def needs_transform(layer: MoELayer) -> list[Tensor]:
    into = torch.nn.Linear(32, 32)
    weights = layer.requires_grad_(False).weights()
    MoERunner(layer.config, weights, routed_input_transform=into)(torch.randn(5, 32)).sum().backward()
    return list(into.parameters())


@pytest.mark.parametrize(
    "needs",
    [
        needs_input,
        needs_logits,
        needs_given_weights,
        needs_thawed_weight,
        needs_gate_module,
        needs_gate_function,
        needs_shared_function,
        needs_transform,
    ],
)
def test_no_gradient_is_lost(layer: MoELayer, needs) -> None:
    for tensor in needs(layer):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0
