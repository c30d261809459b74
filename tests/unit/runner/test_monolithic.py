"""Experts that route by themselves: no gate is built for them, and the config's routing binds them all the same."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import toys

from moe_core import ExpertsOut, MoEConfig, MoELayer, MoERunner, hookimpl
from moe_core.errors import BindError, InputError

SPECS = {
    "softmax": {},
    "renormalized": {"renormalize": True},
    "chosen first": {"score_before_topk": False},
    "groups": {
        "scoring_func": "sigmoid",
        "num_expert_group": 4,
        "topk_group": 2,
        "group_score": "top2_sum",
        "e_score_correction_bias": True,
        "renormalize": True,
        "routed_scaling_factor": 2.5,
    },
    "clamped": {"renormalize": True, "renorm_clamp_min": 0.7},
    "capped": {"router_logit_softcap": 1.5, "gate_bias": True},
    "scaled": {"router_logit_scale": 0.5, "routed_scaling_factor": 1.7, "apply_routed_scale_to_output": True},
    "on the input": {"top_k": 1, "apply_router_weight_on_input": True, "scoring_func": "sigmoid"},
    "expert scale": {"per_expert_scale": True},
    "zero experts": {"zero_expert_num": 3, "zero_expert_type": "identity"},
}


@torch.no_grad()
def layer_of(**fields) -> MoELayer:
    config = MoEConfig(**{"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 2, **fields})
    layer = MoELayer(config)
    for name, tensor in layer.state_dict().items():
        if name.endswith("_bias") or name == "per_expert_scale":
            tensor.normal_()
    return layer


@torch.no_grad()
def bound(layer: MoELayer, **options) -> MoERunner:
    return MoERunner(layer.config, layer.weights(), backend="owner", **options)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_experts_that_follow_the_config_are_bound(register, spec: dict, dtype: torch.dtype) -> None:
    register(toys.Owner())
    layer = layer_of(**spec).to(dtype)
    x = torch.randn(9, 32, dtype=dtype)
    torch.testing.assert_close(bound(layer)(x), MoERunner(layer.config, layer.weights(), backend="reference")(x))


MISREAD = {
    "scoring_func": ("groups", {"scoring_func": "softmax"}),
    "scoring_func of softmax": ("softmax", {"scoring_func": "sigmoid"}),
    "renormalize": ("renormalized", {"renormalize": False}),
    "renormalize unasked": ("softmax", {"renormalize": True}),
    "score_before_topk": ("chosen first", {"score_before_topk": True}),
    "num_expert_group": ("groups", {"num_expert_group": None, "topk_group": None}),
    "group_score": ("groups", {"group_score": "max"}),
    "routed_scaling_factor": ("groups", {"routed_scaling_factor": 1.0}),
    "routed_scaling_factor twice": ("groups", {"routed_scaling_factor": 2.5**2}),
    "routed_scaling_factor on output": ("scaled", {"routed_scaling_factor": 1.0}),
    "renorm_clamp_min": ("clamped", {"renorm_clamp_min": None}),
    "router_logit_softcap": ("capped", {"router_logit_softcap": None}),
    "router_logit_scale": ("scaled", {"router_logit_scale": 1.0}),
    "apply_router_weight_on_input": ("on the input", {"apply_router_weight_on_input": False}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", MISREAD)
def test_a_field_that_they_disregard_is_named_at_bind(register, case: str) -> None:
    spec, change = MISREAD[case]
    register(toys.Owner(read_as=lambda config: dataclasses.replace(config, **change)))
    field = case.split()[0]
    layer = layer_of(**SPECS[spec])
    with pytest.raises(BindError) as caught:
        bound(layer)
    asked, done = getattr(layer.config, field), change[field]
    assert f"expected {field}={asked!r}, and its result is that of {field}={done!r}" in str(caught.value)
    assert "owner" in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize(
    ("field", "spec"),
    [("e_score_correction_bias", "groups"), ("per_expert_scale", "expert scale"), ("gate_bias", "capped")],
)
def test_a_tensor_that_they_disregard_is_named_at_bind(register, field: str, spec: str) -> None:
    register(toys.Owner(weights_as=lambda weights: dataclasses.replace(weights, **{field: None})))
    with pytest.raises(BindError, match=f"expected {field}=True"):
        bound(layer_of(**SPECS[spec]))


@torch.no_grad()
def test_what_no_field_explains_is_refused_too(register) -> None:
    class Random(toys.Owner):
        @hookimpl
        def moe_experts(self, plan, hidden_states, routing, router_logits):
            return ExpertsOut(torch.randn(hidden_states.shape), True)

    register(Random())
    with pytest.raises(BindError, match="nor of one field"):
        bound(layer_of())


@torch.no_grad()
def test_unsummed_experts_are_refused(register) -> None:
    class Unsummed(toys.Owner):
        @hookimpl
        def moe_experts(self, plan, hidden_states, routing, router_logits):
            return ExpertsOut(torch.randn(len(hidden_states), 2, 32), False)

    register(Unsummed())
    with pytest.raises(BindError, match="reduced=False"):
        bound(layer_of())


@torch.no_grad()
def test_hash_routing_is_refused_because_token_ids_never_reach_them(register) -> None:
    register(toys.Owner())
    layer = layer_of()
    weights = layer.weights()
    weights.tid2eid = torch.zeros(50, 2, dtype=torch.int64)
    with pytest.raises(BindError, match="hash_routing=True"):
        MoERunner(dataclasses.replace(layer.config, hash_routing=True), weights, backend="owner")


@torch.no_grad()
def test_no_gate_is_built_and_none_is_missed(register) -> None:
    register(toys.Owner())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # FallbackWarning would say that the gate runs on the reference
        runner = bound(layer_of(shared_intermediate_size=40))
    assert runner.report.stages["gate"] == "owner"
    assert runner.report.fallbacks == {}
    assert runner.bound(needs_grad=False)._gating.stage is None
    runner(torch.randn(3, 32))


@torch.no_grad()
def test_weights_that_change_are_checked_again(register) -> None:
    """A selection bias of zeros hides a kernel that ignores it; the next bind does not."""

    class Repacking(toys.Owner):
        @hookimpl
        def moe_prepare(self, config, weights):
            return dataclasses.replace(weights)

    register(Repacking(weights_as=lambda weights: dataclasses.replace(weights, e_score_correction_bias=None)))
    layer = layer_of(**SPECS["groups"])
    layer.e_score_correction_bias.zero_()
    runner = bound(layer)
    runner(torch.randn(3, 32))
    layer.e_score_correction_bias.normal_()
    with pytest.raises(BindError, match="e_score_correction_bias"):
        runner(torch.randn(3, 32))


# What such experts get in a call.


@torch.no_grad()
def test_they_get_logits_from_whoever_has_them(register) -> None:
    owner = register(toys.Owner())
    layer, x, logits = layer_of(), torch.randn(5, 32), torch.randn(5, 8)
    plain = MoERunner(layer.config, layer.weights(), backend="reference")
    assert torch.equal(bound(layer)(x, logits), plain(x, logits))
    assert torch.equal(bound(layer, gate=lambda x: logits)(x), plain(x, logits)), "the caller's gate counts"
    bound(layer)(x)
    assert owner.logits[-1] is None, "else they compute them from their own gate weight"


@torch.no_grad()
def test_behind_a_transform_logits_still_come_from_the_layers_input(register) -> None:
    owner = register(toys.Owner())
    layer, x = layer_of(moe_latent_size=16), torch.randn(5, 32)
    down, up = torch.randn(32, 16) / 6, torch.randn(16, 32) / 4
    transforms = {"routed_input_transform": lambda x: x @ down, "routed_output_transform": lambda x: x @ up}
    plain = MoERunner(layer.config, layer.weights(), backend="reference", **transforms)
    torch.testing.assert_close(bound(layer, **transforms)(x), plain(x))
    torch.testing.assert_close(owner.logits[-1], x @ layer.gate_weight.t())


@torch.no_grad()
def test_chosen_experts_cannot_be_forced_on_them(register) -> None:
    register(toys.Owner())
    layer, x = layer_of(), torch.randn(5, 32)
    weights, ids = torch.rand(5, 2), torch.zeros(5, 2, dtype=torch.int32)
    with pytest.raises(InputError, match="route by themselves"):
        bound(layer)(x, topk_weights=weights, topk_ids=ids)
    with pytest.raises(InputError, match="route by themselves"):
        bound(layer, gate=lambda x: (weights, ids))(x)
    with pytest.raises(InputError, match="route by themselves"), bound(layer).replaying([ids]):
        pass


@torch.no_grad()
def test_their_routing_is_recorded_from_the_config_that_they_follow(register) -> None:
    register(toys.Owner())
    layer, x = layer_of(**SPECS["groups"]), torch.randn(40, 32)
    seen = []
    for runner in (bound(layer), MoERunner(layer.config, layer.weights(), backend="reference")):
        with runner.recording(ids=True) as record:
            runner(x)
        seen.append((record.tokens_per_expert, record.routed_experts[0]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
