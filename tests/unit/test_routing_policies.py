"""What routing does with logits that no formula covers, with groups at their limits, and with a capacity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_core import BackendInfo, MoEConfig, MoERunner, Verdict, explain, hookimpl, plugins
from moe_core.errors import RoutingError
from moe_core.routing import route
from moe_core.testing import ROUTER_FAMILIES, SIZES, random_weights

NAN, INF = math.nan, math.inf
BAD = {
    "all nan": lambda z: z.fill_(NAN),
    "one nan": lambda z: z[3].fill_(NAN),
    "some nan": lambda z: z[1::3].fill_(NAN),
    "one +inf": lambda z: z[5].fill_(INF),
    "two +inf": lambda z: z.index_fill_(0, torch.tensor([2, 9]), INF),
    "all +inf": lambda z: z.fill_(INF),
    "one -inf": lambda z: z[0].fill_(-INF),
    "all but one -inf": lambda z: z[1:].fill_(-INF),
    "all -inf": lambda z: z.fill_(-INF),
    "nan and inf": lambda z: z.index_fill_(0, torch.tensor([4]), NAN).index_fill_(0, torch.tensor([6]), INF),
    "huge": lambda z: z.mul_(1e38),
}
FIXED = {name: fields for name, fields in ROUTER_FAMILIES.items() if not fields.get("hash_routing")}


def config_of(name: str, **fields: object) -> MoEConfig:
    return MoEConfig(**{**SIZES, **ROUTER_FAMILIES[name], **fields})


def with_bad_row(config: MoEConfig, spoil, row: int = 4) -> tuple[Tensor, Tensor]:
    good = torch.randn(9, config.num_router_outputs)
    bad = good.clone()
    spoil(bad[row])
    return good, bad


@pytest.mark.parametrize("name", FIXED)
def test_a_bad_row_keeps_valid_distinct_ids_and_leaves_the_others_alone(name: str) -> None:
    config = config_of(name)
    weights, others = random_weights(config), torch.arange(9) != 4
    for label, spoil in BAD.items():
        good, bad = with_bad_row(config, spoil)
        before, after = route(config, weights, good), route(config, weights, bad)
        ids = after.topk_ids[4].tolist()
        assert len(set(ids)) == config.top_k, label
        assert all(0 <= i < config.num_router_outputs for i in ids), label
        assert torch.equal(after.topk_ids[others], before.topk_ids[others]), label
        assert torch.equal(after.topk_weights[others], before.topk_weights[others]), label


@pytest.mark.parametrize("name", FIXED)
def test_the_policy_decides_about_its_weights(name: str) -> None:
    propagating, zeroing, raising = (config_of(name, nan_policy=policy) for policy in ("propagate", "zero", "raise"))
    weights, decided = random_weights(propagating), 0
    for label, spoil in BAD.items():
        _, bad = with_bad_row(propagating, spoil)
        found, zeroed = route(propagating, weights, bad), route(zeroing, weights, bad)
        assert torch.equal(found.topk_ids, zeroed.topk_ids), label
        if torch.isfinite(found.topk_weights).all():
            assert torch.equal(found.topk_weights, zeroed.topk_weights), label
            assert torch.equal(found.topk_weights, route(raising, weights, bad).topk_weights), label
            continue
        decided += 1
        assert zeroed.topk_weights[4].tolist() == [0.0] * propagating.top_k, label
        with pytest.raises(RoutingError, match="row 4"):
            route(raising, weights, bad)
    assert decided >= 4


@pytest.mark.parametrize("name", FIXED)
def test_finite_logits_never_give_nan(name: str) -> None:
    config = config_of(name)
    weights = random_weights(config)
    for value in (-103.0, -200.0, -1e4, -1e38):
        logits = torch.full((3, config.num_router_outputs), value)
        logits[1, ::2] += 1
        assert torch.isfinite(route(config, weights, logits).topk_weights).all(), value


def test_sigmoids_that_underflow_weigh_nothing_with_any_epsilon() -> None:
    for eps in (0.0, 1e-20, 1e-300):
        config = config_of("sigmoid_renorm", renorm_eps=eps)
        routing = route(config, random_weights(config), torch.full((2, 16), -200.0))
        assert routing.topk_weights.tolist() == [[0.0] * 4] * 2


def test_gradients_of_scores_that_underflow_are_finite() -> None:
    for name in ("sigmoid_renorm", "sqrtsoftplus_bias", "softmax_renorm", "sparsemixer"):
        config = config_of(name)
        logits = torch.full((2, 16), -120.0).index_fill_(1, torch.tensor([3]), -119.0).requires_grad_()
        route(config, random_weights(config), logits).topk_weights.square().sum().backward()
        assert torch.isfinite(logits.grad).all(), name


@pytest.mark.parametrize("jitter", [0.0, 0.5, 100.0])
def test_sparsemixer_bands(jitter: float) -> None:
    """Without jitter only equal logits share a band; with much of it a band is everything that is left."""
    config = config_of("sparsemixer", sparsemixer_jitter=jitter)
    logits = torch.tensor([[-3.0, -2.0, -2.0, -5.0] + [-9.0] * 12])
    routing = route(config, random_weights(config), logits)
    assert routing.topk_ids.tolist() == [[1, 2]]
    if jitter == 0.0:
        assert routing.topk_weights.tolist() == [[0.5, 1.0]]
    if jitter == 100.0:
        wanted = torch.softmax(logits[0], 0)[1], torch.softmax(logits[0, [0, *range(2, 16)]], 0)[1]
        torch.testing.assert_close(routing.topk_weights[0], torch.stack(wanted))


# Groups.

TIED = {"num_expert_group": 4, "topk_group": 2}


@pytest.mark.parametrize("score", ["max", "top2_sum"])
@pytest.mark.parametrize("mask", [0.0, -INF])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_masked_expert_never_wins_a_tie(scoring: str, mask: float, score: str) -> None:
    """Groups 2 and 3 are kept and all their experts but one underflow to 0, the mask value."""
    config = MoEConfig(**SIZES, **TIED, scoring_func=scoring, group_mask_value=mask, group_score=score)
    logits = torch.full((1, 16), -500.0)
    logits[0, [8, 12]] = 5.0
    logits[0, 3] = 1.0
    routing = route(config, random_weights(config), logits)
    assert routing.topk_ids.tolist() == [[8, 12, 9, 10]]


def test_a_finite_mask_is_a_score_where_a_bias_can_go_below_it() -> None:
    """As the models that mask with 0 have it: a kept expert of negative biased score loses to a masked one."""
    fields = {"scoring_func": "sigmoid", "e_score_correction_bias": True}
    logits, bias = torch.zeros(1, 16), torch.full((16,), -3.0)
    bias[[8, 12]] = 1.0
    for mask, wanted in ((0.0, [8, 12, 0, 1]), (-INF, [8, 12, 9, 10])):
        config = MoEConfig(**SIZES, **TIED, **fields, group_mask_value=mask)
        weights = random_weights(config)
        weights.e_score_correction_bias.copy_(bias)
        assert route(config, weights, logits).topk_ids.tolist() == [wanted]


@pytest.mark.parametrize("fields", [{"num_expert_group": 1}, {"num_expert_group": 4, "topk_group": 4}])
def test_keeping_every_group_is_no_grouping(fields: dict) -> None:
    plain, grouped = config_of("sigmoid_bias"), config_of("sigmoid_bias", **fields)
    weights, logits = random_weights(plain), torch.randn(200, 16)
    for found, wanted in zip(route(grouped, weights, logits), route(plain, weights, logits), strict=True):
        assert torch.equal(found, wanted)


def test_groups_of_one_expert_are_a_plain_choice() -> None:
    plain, grouped = config_of("softmax"), config_of("softmax", num_expert_group=16, topk_group=4)
    weights, logits = random_weights(plain), torch.randn(200, 16)
    for found, wanted in zip(route(grouped, weights, logits), route(plain, weights, logits), strict=True):
        assert torch.equal(found, wanted)


# Capacity, in a whole layer.


@torch.no_grad()
def test_the_core_applies_a_capacity_behind_any_gate() -> None:
    """The same tokens are dropped whoever routes; a replay repeats them; ids of the caller are left alone."""
    config = MoEConfig(**{**SIZES, "top_k": 1}, expert_capacity=2)
    weights, x = random_weights(config), torch.randn(40, 32)
    runner, logits = MoERunner(config, weights), x @ weights.gate_weight.t()
    own = MoERunner(config, weights, gate=lambda x: x @ weights.gate_weight.t())
    with runner.recording(ids=True) as record:
        out = runner(x)
    [ids] = record.routed_experts
    assert record.tokens_per_expert.max() == 2
    assert out[ids[:, 0] < 0].abs().sum() == 0
    assert out[ids[:, 0] >= 0].abs().sum(1).min() > 0
    torch.testing.assert_close(runner(x, logits), out)
    torch.testing.assert_close(own(x), out)
    with runner.replaying(record.routed_experts):
        torch.testing.assert_close(runner(x), out)
    free = runner(x, topk_weights=torch.ones(40, 1), topk_ids=torch.zeros(40, 1).int())
    assert free.abs().sum(1).min() > 0


def test_experts_that_route_by_themselves_cannot_have_a_capacity() -> None:
    class Monolithic:
        @hookimpl
        def moe_backend_info(self):
            return BackendInfo(name="monolithic", stages=("experts",))

        @hookimpl
        def moe_probe(self, platform):
            return Verdict.yes()

        @hookimpl
        def moe_supports(self, config, stage, platform):
            return Verdict.yes(owns_routing=True)

        @hookimpl
        def moe_experts(self, plan, hidden_states, routing, router_logits):
            raise AssertionError

    plugins.register(Monolithic(), "monolithic")
    try:
        found = explain(MoEConfig(**SIZES, expert_capacity=2), "cpu").candidate("monolithic")
        assert found.status == "unsupported" and "expert_capacity=2" in found.reason
        assert explain(MoEConfig(**SIZES), "cpu").candidate("monolithic").status == "ok"
    finally:
        plugins.unregister("monolithic")
