"""The check at bind: deliberately wrong backends are refused with their cause, good ones of every config bind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_core import BackendInfo, ExpertsOut, MoEConfig, MoELayer, MoERunner, MoEWeights, Verdict, hookimpl
from moe_core import reference as plain
from moe_core.checkpoints import check_layout
from moe_core.errors import BindError, StageError, WeightsError
from moe_core.plugins import register, unregister

H, I, E, K = 32, 24, 5, 2
CONFIG = MoEConfig(H, I, E, K)
BIASED = MoEConfig(H, I, E, K, expert_bias=True)
INTERLEAVED = MoEConfig(H, I, E, K, w13_interleaved=True)
SQUARE = MoEConfig(24, 24, E, K)
NORMED = MoEConfig(H, I, E, K, post_expert_norm_eps=1e-6)

Prepare = Callable[[MoEWeights], MoEWeights]


def copied(weights: MoEWeights) -> MoEWeights:
    """A repacking that is none: other objects, the same numbers."""
    return dataclasses.replace(weights)


class Backend:
    """The reference's experts on whatever ``prepare`` makes of the weights."""

    def __init__(
        self,
        prepare: Prepare = copied,
        *,
        change: Callable[[MoEConfig], MoEConfig] = lambda config: config,
        reduced: bool = False,
        after: Callable[[Tensor], Any] = lambda x: None,
        **traits: Any,
    ) -> None:
        self.prepare, self.change, self.reduced, self.after, self.traits = prepare, change, reduced, after, traits
        self.calls: list[tuple[int, ...]] = []

    @hookimpl
    def moe_backend_info(self) -> BackendInfo:
        return BackendInfo(name="tested", device_types=("cpu", "meta"), priority=90)

    @hookimpl
    def moe_probe(self, platform: Any) -> Verdict:
        return Verdict.yes()

    @hookimpl
    def moe_supports(self, config: MoEConfig, stage: str) -> Verdict:
        return Verdict.yes(**self.traits)

    @hookimpl
    def moe_prepare(self, weights: MoEWeights) -> MoEWeights:
        return self.prepare(weights)

    @hookimpl
    def moe_experts(self, plan: Any, hidden_states: Tensor, routing: Any) -> ExpertsOut:
        self.calls.append(tuple(hidden_states.shape))
        changed = dataclasses.replace(plan, config=self.change(plan.config))
        out = plain.moe_experts(changed, hidden_states, routing)
        self.after(hidden_states)
        if not self.reduced:
            return out
        weights = routing.topk_weights.masked_fill(routing.topk_ids < 0, 0.0)
        summed = torch.einsum("tkh,tk->th", out.value, weights)
        scale = plan.config.routed_scaling_factor if plan.config.apply_routed_scale_to_output else 1.0
        return ExpertsOut(summed * scale, True)


@pytest.fixture
def use() -> Iterator[Callable[..., Backend]]:
    """Registers a backend for the test."""
    names = []

    def install(*arguments: Any, **options: Any) -> Backend:
        backend = Backend(*arguments, **options)
        register(backend, "tested")
        names.append("tested")
        return backend

    yield install
    for name in names:
        unregister(name)


def random_weights(config: MoEConfig, dtype: torch.dtype = torch.float32) -> MoEWeights:
    """Biases and norms included."""
    layer = MoELayer(config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 1 or name in ("w13_bias", "w2_bias"):
                parameter.normal_(1.0, 0.5)
    weights = {name: tensor.detach().to(dtype) for name, tensor in layer.weights().named_tensors()}
    return MoEWeights(**weights)


pytestmark = pytest.mark.filterwarnings("ignore::moe_core.runner.FallbackWarning")


def bind(config: MoEConfig, weights: MoEWeights | None = None, **options: Any) -> MoERunner:
    with torch.no_grad():
        return MoERunner(config, random_weights(config) if weights is None else weights, **options)


def on(field: str, function: Callable[[Tensor], Tensor | None]) -> Prepare:
    return lambda weights: dataclasses.replace(weights, **{field: function(getattr(weights, field))})


def swapped(t: Tensor) -> Tensor:
    return t.roll(t.shape[1] // 2, 1)


def memory_as_transposed(t: Tensor) -> Tensor:
    """The bytes of [E, A, B] read as [E, B, A]."""
    return t.reshape(t.shape[0], t.shape[2], t.shape[1]).transpose(1, 2)


def transposed_then_read(t: Tensor) -> Tensor:
    """A transposed copy, read as if it were not."""
    return t.transpose(1, 2).reshape(t.shape)


def both(function: Callable[[Tensor], Tensor]) -> Prepare:
    def prepare(weights: MoEWeights) -> MoEWeights:
        fields = ("w13_weight", "w2_weight", "w13_bias", "w2_bias")
        found = {name: function(t) for name, t in weights.named_tensors() if name in fields}
        return dataclasses.replace(weights, **found)

    return prepare


def gate_and_up(weights: MoEWeights) -> MoEWeights:
    return dataclasses.replace(weights, w13_weight=swapped(weights.w13_weight), w13_bias=swapped(weights.w13_bias))


WRONG: list[tuple[str, MoEConfig, dict[str, Any], str]] = [
    ("swapped", CONFIG, {"prepare": on("w13_weight", swapped)}, "gate and up are swapped"),
    ("swapped with bias", BIASED, {"prepare": gate_and_up}, "gate and up are swapped"),
    (
        "swapped pairs",
        INTERLEAVED,
        {"prepare": on("w13_weight", lambda t: t.unflatten(1, (-1, 2)).flip(2).flatten(1, 2))},
        "gate and up are swapped",
    ),
    (
        "read as interleaved",
        CONFIG,
        {"change": lambda c: dataclasses.replace(c, w13_interleaved=True)},
        "w13_weight is read as interleaved, it has all gate rows first",
    ),
    (
        "read as packed",
        INTERLEAVED,
        {"change": lambda c: dataclasses.replace(c, w13_interleaved=False)},
        "w13_weight is read as all gate rows first, it is interleaved",
    ),
    (
        "w13 read transposed",
        CONFIG,
        {"prepare": on("w13_weight", memory_as_transposed)},
        "w13_weight is read transposed",
    ),
    ("w2 read transposed", CONFIG, {"prepare": on("w2_weight", memory_as_transposed)}, "w2_weight is read transposed"),
    (
        "w13 left transposed",
        CONFIG,
        {"prepare": on("w13_weight", transposed_then_read)},
        "w13_weight is read transposed",
    ),
    ("w2 left transposed", CONFIG, {"prepare": on("w2_weight", transposed_then_read)}, "w2_weight is read transposed"),
    ("square w2 transposed", SQUARE, {"prepare": on("w2_weight", lambda t: t.mT)}, "w2_weight is read transposed"),
    (
        "backwards",
        BIASED,
        {"prepare": both(lambda t: t.flip(0))},
        "it computes expert 0, the experts are in another order",
    ),
    (
        "off by one",
        CONFIG,
        {"prepare": both(lambda t: t.roll(1, 0))},
        "it computes expert 3, the experts are in another order",
    ),
    ("no first bias", BIASED, {"prepare": on("w13_bias", lambda t: None)}, "w13_bias left out"),
    ("no second bias", BIASED, {"prepare": on("w2_bias", lambda t: None)}, ": w2_bias left out"),
    (
        "no bias",
        BIASED,
        {"prepare": lambda w: dataclasses.replace(w, w13_bias=None, w2_bias=None)},
        "w13_bias and w2_bias left out",
    ),
    (
        "stale first bias",
        BIASED,
        {"prepare": on("w13_bias", torch.rand_like)},
        "w13_bias, or both biases, have other values",
    ),
    (
        "stale second bias",
        BIASED,
        {"prepare": on("w2_bias", torch.rand_like)},
        "w2_bias has other values, or is left from earlier",
    ),
    (
        "no norm",
        NORMED,
        {"change": lambda c: dataclasses.replace(c, post_expert_norm_eps=None)},
        "the norm behind the experts is left out",
    ),
    (
        "no limit",
        MoEConfig(H, I, E, K, swiglu_limit=1.0),
        {"change": lambda c: dataclasses.replace(c, swiglu_limit=None)},
        "swiglu_limit is left out",
    ),
    (
        "no alpha",
        MoEConfig(H, I, E, K, swiglu_alpha=1.7, swiglu_beta=1.0),
        {"change": lambda c: dataclasses.replace(c, swiglu_alpha=1.0, swiglu_beta=0.0)},
        "swiglu_alpha and swiglu_beta are left out",
    ),
    ("noise", CONFIG, {"prepare": on("w2_weight", torch.rand_like)}, "none of the likely causes explains it"),
    ("NaN", CONFIG, {"prepare": on("w2_weight", lambda t: t * float("nan"))}, "its output is not finite"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("config", "wrong", "cause"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_backend_is_refused_with_its_cause(
    config: MoEConfig, wrong: dict[str, Any], cause: str, reduced: bool, dtype: torch.dtype, use: Callable[..., Backend]
) -> None:
    weights = random_weights(config, dtype)
    use(**wrong, reduced=reduced)
    with pytest.raises(BindError) as caught:
        bind(config, weights)
    text = str(caught.value)
    assert f"backend tested does not compute expert {E - 1} with the weights that it prepared: relative error" in text
    assert f"allowed {'1e-05' if dtype is torch.float32 else '1e-02'}" in text
    assert cause in text
    assert "config.check_layout=False" in text
    assert bind(dataclasses.replace(config, check_layout=False), weights).report.backend == "tested"


def square_of_gate_plus_up(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return torch.tanh(gate).square() + up


GOOD = {
    "plain": CONFIG,
    "biases": BIASED,
    "interleaved": INTERLEAVED,
    "norm": NORMED,
    "norm, scale first": dataclasses.replace(NORMED, post_expert_norm_scale_first=True),
    "weight on the input": MoEConfig(H, I, E, 1, apply_router_weight_on_input=True),
    "zero experts": MoEConfig(H, I, E, K, zero_expert_num=3, zero_expert_type="identity"),
    "scale on the output": MoEConfig(H, I, E, K, routed_scaling_factor=2.5, apply_routed_scale_to_output=True),
    "activation of one's own": MoEConfig(H, I, E, K, custom_activation_function=square_of_gate_plus_up),
    "activation as a function": MoEConfig(H, I, E, K, activation=torch.tanh),
    "relu squared, no gate": MoEConfig(H, I, E, K, gated=False, activation="relu2"),
    "clamped": MoEConfig(H, I, E, K, swiglu_limit=0.5, swiglu_alpha=1.7, swiglu_beta=1.0),
    "local experts": MoEConfig(H, I, E, K, num_local_experts=2),
    "no experts here": MoEConfig(H, I, E, K, num_local_experts=0),
    "one expert": MoEConfig(H, I, 1, 1),
    "as many as there are": MoEConfig(H, I, E, E),
    "latent": MoEConfig(48, I, E, K, moe_latent_size=H),
    "shared experts": MoEConfig(H, I, E, K, shared_intermediate_size=I),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("config", GOOD.values(), ids=GOOD.keys())
def test_a_good_backend_binds(
    config: MoEConfig, reduced: bool, dtype: torch.dtype, use: Callable[..., Backend]
) -> None:
    weights = random_weights(config, dtype)
    backend = use(reduced=reduced, after=Tensor.zero_, mutates_input=True)
    modules = {}
    if config.moe_latent_size:
        modules = {
            "routed_input_transform": lambda x: x[:, :H],
            "routed_output_transform": lambda x: x.repeat(1, 2)[:, :48],
        }
    assert bind(config, weights, **modules).report.backend == "tested"
    assert backend.calls == ([(2, H)] if config.num_held_experts else [])


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_size_of_the_weights_does_not_matter(
    factor: float, dtype: torch.dtype, use: Callable[..., Backend]
) -> None:
    """Small weights would make the activation linear and hide a swap; large ones would overflow float16."""
    weights = random_weights(CONFIG)
    weights = MoEWeights(**{name: (t * factor).to(dtype) for name, t in weights.named_tensors()})
    backend = use()
    bind(CONFIG, weights)
    backend.prepare = on("w13_weight", swapped)
    with pytest.raises(BindError, match="gate and up are swapped"):
        bind(CONFIG, weights)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_weights_that_tell_nothing_bind(value: float, use: Callable[..., Backend]) -> None:
    use()
    weights = random_weights(CONFIG)
    bind(CONFIG, dataclasses.replace(weights, w2_weight=torch.full_like(weights.w2_weight, value)))
    bind(CONFIG, dataclasses.replace(weights, w13_weight=torch.full_like(weights.w13_weight, value)))


def test_weights_that_changed_are_compared_again(use: Callable[..., Backend]) -> None:
    """A backend that keeps what it packed first: found when the layer rebinds after a write."""
    kept: list[MoEWeights] = []

    def cache(weights: MoEWeights) -> MoEWeights:
        if not kept:
            kept.append(MoEWeights(**{name: tensor.clone() for name, tensor in weights.named_tensors()}))
        return kept[0]

    use(cache)
    weights = random_weights(BIASED)
    runner, x = bind(BIASED, weights), torch.randn(3, H)
    with torch.no_grad():
        runner(x)
        weights.w2_bias.add_(1.0)
        with pytest.raises(BindError, match="w2_bias has other values, or is left from earlier weights"):
            runner(x)


def test_a_stage_that_fails_on_the_probe(use: Callable[..., Backend]) -> None:
    def fail(x: Tensor) -> None:
        raise ZeroDivisionError("no such kernel")

    use(after=fail)
    with pytest.raises(
        BindError, match="backend tested failed on two probe tokens for expert 4: ZeroDivisionError"
    ) as caught:
        bind(CONFIG)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_broken_contract_is_left_to_the_call(use: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    use()
    monkeypatch.setattr(plain, "moe_experts", lambda *arguments: None)
    runner = bind(CONFIG)
    with torch.no_grad(), pytest.raises(StageError, match="returned NoneType"):
        runner(torch.randn(1, H))


def test_what_is_not_compared(use: Callable[..., Backend]) -> None:
    """Weights without numbers, results that are zero, weights that were not repacked."""
    backend = use(on("w13_weight", swapped))
    meta = MoEWeights(**{name: tensor.to("meta") for name, tensor in random_weights(CONFIG).named_tensors()})
    bind(CONFIG, meta)
    bind(dataclasses.replace(CONFIG, routed_scaling_factor=0.0, apply_routed_scale_to_output=True))
    backend.prepare = lambda weights: weights
    bind(CONFIG)
    assert backend.calls == []


def test_nothing_else_notices(use: Callable[..., Backend]) -> None:
    """Observers see no call, the random numbers stay, default dtype, autocast and inference mode do not matter."""
    backend = use()
    seen: list[str] = []

    class Observer:
        @hookimpl(wrapper=True)
        def moe_experts(self, plan: Any) -> Any:
            seen.append("experts")
            return (yield)

    register(Observer(), "observer")
    weights = random_weights(CONFIG, torch.bfloat16)
    before = torch.get_rng_state()
    try:
        bind(CONFIG, weights)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            MoERunner(CONFIG, weights)
        torch.set_default_dtype(torch.float64)
        bind(CONFIG, weights)
    finally:
        torch.set_default_dtype(torch.float32)
        unregister("observer")
    assert torch.equal(torch.get_rng_state(), before)
    assert (seen, len(backend.calls)) == ([], 3)


def test_training_is_compared_without_a_graph(use: Callable[..., Backend]) -> None:
    use(supports_backward=True)
    layer = MoELayer(CONFIG)
    x = torch.randn(3, H)
    layer(x).square().sum().backward()
    assert layer.report.backend == "tested"
    assert layer.w13_weight.grad is not None


def rounded(weights: MoEWeights) -> MoEWeights:
    return both(lambda t: t.bfloat16().float())(weights)


def test_float32_in_less_than_float32_is_wrong_unless_the_process_allows_it(use: Callable[..., Backend]) -> None:
    use(rounded)
    with pytest.raises(BindError, match="allowed 1e-05: none of the likely causes"):
        bind(CONFIG)
    torch.set_float32_matmul_precision("high")
    try:
        bind(CONFIG)
    finally:
        torch.set_float32_matmul_precision("highest")


class Expert(nn.Module):
    """One expert as models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, I, bias=False), nn.Linear(H, I, bias=False)
        self.down_proj = nn.Linear(I, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expert", [0, 3])
def test_weights_are_compared_with_a_module(expert: int, dtype: torch.dtype) -> None:
    modules = [Expert().to(dtype) for _ in range(E)]

    def packed(first: str, second: str) -> MoEWeights:
        rows = [torch.cat([getattr(m, first).weight, getattr(m, second).weight]) for m in modules]
        return MoEWeights(w13_weight=torch.stack(rows), w2_weight=torch.stack([m.down_proj.weight for m in modules]))

    check_layout(CONFIG, packed("gate_proj", "up_proj"), modules[expert], expert=expert)
    with pytest.raises(WeightsError, match=f"expert {expert} of these weights .* gate and up are swapped"):
        check_layout(CONFIG, packed("up_proj", "gate_proj"), modules[expert], expert=expert)
    with pytest.raises(WeightsError, match="it computes expert 2, the experts are in another order"):
        check_layout(CONFIG, packed("gate_proj", "up_proj"), modules[2], expert=expert)
