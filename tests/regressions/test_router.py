"""Routing through a whole layer, on every backend: bad logits, ties, biases, groups, fields that a path ignores."""

from __future__ import annotations

import itertools
import math

import dense
import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoELayer, MoERunner, Routing, hookimpl, plugins
from moe_core.errors import ConfigError
from moe_core.routing import route, router_logits_of
from moe_core.testing import ROUTER_FAMILIES, SIZES, random_weights

NAN, INF = math.nan, math.inf


def config_of(**fields: object) -> MoEConfig:
    return MoEConfig(**{**SIZES, **fields})


class Seen:
    """An observer that keeps the routing and the logits which the experts get."""

    def __init__(self) -> None:
        self.calls: list[tuple[Routing | None, Tensor | None]] = []

    @hookimpl(wrapper=True)
    def moe_experts(self, routing, router_logits):
        self.calls.append((routing, router_logits))
        return (yield)


@pytest.fixture(scope="module")
def seen() -> list[tuple[Routing | None, Tensor | None]]:
    """One for all: plugins are loaded anew whenever one comes or goes."""
    observer = Seen()
    plugins.register(observer, "seen")
    yield observer.calls
    plugins.unregister("seen")


def routing_of(runner: MoERunner, seen: list, *arguments: Tensor, **named: Tensor) -> Routing:
    """What this layer's experts were given; skips where they route by themselves and show it to nobody."""
    seen.clear()
    runner(*arguments, **named)
    [(routing, _)] = seen
    if routing is None:
        pytest.skip("the experts of this backend route by themselves")
    return routing


@torch.no_grad()
@pytest.mark.parametrize("name", ["softmax_renorm", "group_top2_bias", "sigmoid_bias", "topk_softmax", "sparsemixer"])
def test_regression_13_a_bad_row_of_logits(backend: str, name: str, seen: list) -> None:
    """NaN rows, from padding, gave repeated or impossible ids and read outside the weights."""
    fields = ROUTER_FAMILIES[name]
    config = config_of(**fields)
    weights, x, good = random_weights(config), torch.randn(9, 32), torch.randn(9, 16)
    runner = dense.bind(backend, config, weights)
    zeroing = dense.bind(backend, config_of(**fields, nan_policy="zero"), weights)
    wanted, others = runner(x, good), torch.arange(9) != 4
    for fill in ([NAN], [NAN, 1.0], [INF], [INF, 1.0], [-INF], [-INF, 1.0]):
        bad = good.clone()
        bad[4] = torch.tensor(fill).repeat(16)[:16]
        assert torch.equal(runner(x, bad)[others], wanted[others]), fill
        assert torch.isfinite(zeroing(x, bad)).all(), fill
        routing = routing_of(zeroing, seen, x, bad)
        ids = routing.topk_ids[4].tolist()
        assert len(set(ids)) == config.top_k and all(0 <= i < 16 for i in ids), fill
        assert torch.isfinite(routing.topk_weights).all(), fill


@torch.no_grad()
def test_regression_13_a_row_of_nan_tokens(backend: str) -> None:
    """Padding that held NaN spread to the rows beside it."""
    config = config_of(renormalize=True, shared_intermediate_size=40, shared_expert_gate=True)
    weights, x = random_weights(config), torch.randn(9, 32)
    runner = dense.bind(backend, config, weights)
    wanted = runner(x)
    x[4] = NAN
    found, others = runner(x), torch.arange(9) != 4
    assert torch.equal(found[others], wanted[others])
    assert found[4].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("eps", [0.0, 1e-20])
def test_regression_14_scores_that_underflow(backend: str, eps: float, seen: list) -> None:
    """sigmoid(-200) is 0 in float32, and 0 / 0 was NaN."""
    config = config_of(scoring_func="sigmoid", renormalize=True, renorm_eps=eps)
    runner = dense.bind(backend, config)
    routing = routing_of(runner, seen, torch.randn(3, 32), torch.full((3, 16), -200.0))
    assert routing.topk_weights.tolist() == [[0.0] * 4] * 3
    assert runner(torch.randn(3, 32), torch.full((3, 16), -200.0)).abs().sum() == 0


@torch.no_grad()
def test_regression_14_negative_logits_with_a_bias(backend: str, seen: list) -> None:
    """A mask of 0 beat scores that were below it: with z < 0 everywhere the wrong experts were chosen."""
    config = config_of(**ROUTER_FAMILIES["group_top2_bias"])
    weights = random_weights(config)
    weights.e_score_correction_bias.sub_(2.0)
    logits = -5 * torch.rand(200, 16) - 1
    routing = routing_of(dense.bind(backend, config, weights), seen, torch.randn(200, 32), logits)
    biased = torch.sigmoid(logits.double()) + weights.e_score_correction_bias.double()
    groups = biased.view(200, 4, 4).topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
    for row in range(200):
        kept = [i for i in range(16) if i // 4 in groups[row].tolist()]
        best = sorted(kept, key=lambda i: -biased[row, i])[:4]
        assert set(routing.topk_ids[row].tolist()) == set(best)


@torch.no_grad()
@pytest.mark.parametrize("name", ["softmax", "topk_softmax", "sigmoid_renorm", "group_max", "sqrtsoftplus_bias"])
def test_regression_15_ties_go_to_the_lowest_id(backend: str, name: str, seen: list) -> None:
    """Equal logits, which bfloat16 makes often, chose other experts on other devices and in other batches."""
    config = config_of(**ROUTER_FAMILIES[name])
    weights = random_weights(config)
    if weights.e_score_correction_bias is not None:
        weights.e_score_correction_bias.zero_()
    logits = torch.randn(300, 16).mul(2).round().bfloat16()
    logits[0] = 1.0
    runner, x = dense.bind(backend, config, weights), torch.randn(300, 32)
    ids = routing_of(runner, seen, x, logits).topk_ids
    for row in range(300):
        z = logits[row].tolist()
        order = sorted(range(16), key=lambda i: (-z[i], i))
        if config.has_groups:
            groups = sorted(range(4), key=lambda g: (-max(z[4 * g : 4 * g + 4]), g))[:2]
            order = [i for i in order if i // 4 in groups]
        assert ids[row].tolist() == order[:4]
    for tokens in (1, 2, 7, 33):
        assert torch.equal(routing_of(runner, seen, x[:tokens], logits[:tokens]).topk_ids, ids[:tokens])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regression_16_the_selection_bias_is_float32_and_stays_out_of_the_weights(
    backend: str, dtype: torch.dtype, seen: list
) -> None:
    """A bias near 7 in bfloat16 has steps of 0.03, as large as the scores that it should correct."""
    config = config_of(scoring_func="sigmoid", e_score_correction_bias=True, renormalize=True)
    layer = MoELayer(config, backend=backend)
    layer.e_score_correction_bias.copy_(torch.linspace(6.8, 7.06, 16)[torch.randperm(16)])
    bias = layer.e_score_correction_bias.clone()
    layer.to(dtype)
    assert torch.equal(layer.e_score_correction_bias, bias)
    x = torch.randn(300, 32).to(dtype)
    runner = dense.bind(backend, config, layer.weights())
    routing = routing_of(runner, seen, x)
    logits = x.double() @ layer.gate_weight.double().t()
    scores = torch.sigmoid(logits)
    best = (scores + bias.double()).sort(dim=1, descending=True)
    clear = best.values[:, 3] - best.values[:, 4] > 1e-5
    assert clear.sum() > 250
    for row in clear.nonzero()[:, 0].tolist():
        chosen = best.indices[row, :4]
        assert set(routing.topk_ids[row].tolist()) == set(chosen.tolist())
        wanted = scores[row] / scores[row, chosen].sum()
        assert (routing.topk_weights[row] - wanted[routing.topk_ids[row].long()]).abs().max() < 1e-5
    rounded = (scores + bias.bfloat16().double()).topk(4).indices.sort(1).values
    assert (rounded != best.indices[:, :4].sort(1).values).any(1).sum() > 30, "this bias tells the dtypes apart"


def group_settings() -> list[dict[str, object]]:
    """Every count of groups, kept groups and chosen experts of 8 experts, possible or not."""
    numbers = (1, 2, 3, 4, 8)
    return [
        {"num_expert_group": groups, "topk_group": kept, "top_k": k, "group_score": score, "group_mask_value": mask}
        for groups, kept, k in itertools.product(numbers, numbers, numbers)
        for score, mask in (("max", 0.0), ("top2_sum", -INF), ("top2_sum", 0.0))
    ]


@torch.no_grad()
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_regression_17_degenerate_groups(scoring: str) -> None:
    """Impossible groupings routed all the same: to -inf, to NaN, or to experts outside the kept groups."""
    made, logits = 0, 3 * torch.randn(40, 8)
    for fields in group_settings():
        groups, kept, k = (int(fields[name]) for name in ("num_expert_group", "topk_group", "top_k"))
        size = 8 // groups
        possible = 8 % groups == 0 and kept <= groups and k <= (8 if groups == 1 else kept * size)
        possible &= groups == 1 or size > 1 or fields["group_score"] == "max"
        if not possible:
            with pytest.raises(ConfigError, match="expected"):
                MoEConfig(32, 24, 8, scoring_func=scoring, renormalize=True, **fields)
            continue
        made += 1
        config = MoEConfig(32, 24, 8, scoring_func=scoring, renormalize=True, **fields)
        routing = route(config, random_weights(config), logits)
        assert torch.isfinite(routing.topk_weights).all()
        assert len({*(tuple(sorted(set(row))) for row in routing.topk_ids.tolist())}) >= 1
        for row in routing.topk_ids.tolist():
            assert len(set(row)) == k
            assert len({i // size for i in row}) <= kept or groups == 1
    assert made > 50


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"num_expert_group": 1, "topk_group": 1},
        {"num_expert_group": 16, "topk_group": 4},
        {"num_expert_group": 2, "topk_group": 1, "group_score": "top2_sum", "top_k": 8},
        {"num_expert_group": 8, "topk_group": 2, "group_score": "top2_sum", "group_mask_value": 0.0},
    ],
    ids=str,
)
def test_regression_17_groups_at_their_limits(backend: str, fields: dict, seen: list) -> None:
    """One group, groups of one, and as many experts as the kept groups hold: all of them, never others."""
    config = config_of(**fields, renormalize=True)
    weights, logits = random_weights(config), 3 * torch.randn(40, 16)
    routing = routing_of(dense.bind(backend, config, weights), seen, torch.randn(40, 32), logits)
    size = 16 // config.num_expert_group
    for row in routing.topk_ids.tolist():
        assert len(set(row)) == config.top_k
        assert not config.has_groups or len({i // size for i in row}) <= config.topk_group
    torch.testing.assert_close(routing.topk_weights.sum(1), torch.ones(40))


@torch.no_grad()
@pytest.mark.parametrize("name", ROUTER_FAMILIES)
def test_regression_18_no_path_ignores_a_field_of_the_router(backend: str, name: str, seen: list) -> None:
    """One backend dropped the bias, another read sigmoid as softmax, a third lost the groups."""
    config = config_of(**ROUTER_FAMILIES[name])
    weights, x = random_weights(config), torch.randn(50, 32)
    input_ids = torch.randint(0, 64, (50,))
    runner = dense.bind(backend, config, weights)
    dense.assert_near(runner(x, input_ids=input_ids), dense.layer(config, weights, x, input_ids))
    logits = 2 * torch.randn(50, config.num_router_outputs)
    found = routing_of(runner, seen, x, logits, input_ids=input_ids)
    wanted = route(config, weights, logits, hidden_states=x, input_ids=input_ids)
    assert torch.equal(found.topk_ids, wanted.topk_ids)
    torch.testing.assert_close(found.topk_weights, wanted.topk_weights, rtol=0, atol=1e-6)


@torch.no_grad()
def test_regression_18_a_bias_moves_the_choice(backend: str, seen: list) -> None:
    """A bias of 10 on expert 5 had no effect on ungrouped softmax routing."""
    config = config_of(e_score_correction_bias=True)
    weights, x = random_weights(config), torch.randn(50, 32)
    for value, chosen in ((10.0, True), (-10.0, False)):
        weights.e_score_correction_bias.zero_()[5] = value
        ids = routing_of(dense.bind(backend, config, weights), seen, x).topk_ids
        assert torch.equal((ids == 5).any(1), torch.full((50,), chosen))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
def test_regression_20_a_weight_on_the_input_is_not_applied_again(backend: str, activation: str, bias: bool) -> None:
    """It was applied to the output too, or instead: with a non-linear expert neither is the same."""
    config = config_of(**{**ROUTER_FAMILIES["sigmoid_on_input"], "activation": activation, "expert_bias": bias})
    weights, x = random_weights(config), torch.randn(30, 32)
    routing = route(config, weights, router_logits_of(config, weights, x))
    found = dense.bind(backend, config, weights)(x)
    weighted = routing.topk_weights.double() * x.double()
    rows = [dense.expert(config, weights, int(routing.topk_ids[t, 0]), weighted[t : t + 1]) for t in range(x.shape[0])]
    dense.assert_near(found, torch.cat(rows))
    other = dense.bind(backend, config_of(**{**ROUTER_FAMILIES["topk_sigmoid"], "top_k": 1}), None)(x)
    assert not torch.allclose(found, other, rtol=1e-2)


def test_regression_20_more_than_one_weight_on_the_input_is_refused() -> None:
    """For k > 1 a weight on the input is another layer than the one that was trained."""
    with pytest.raises(ConfigError, match="top_k=4: expected 1"):
        config_of(apply_router_weight_on_input=True)


@torch.no_grad()
def test_repeated_experts_of_a_hash_table(backend: str) -> None:
    """A buffer with room for each token once an expert overflowed when a table repeated it."""
    config = config_of(**ROUTER_FAMILIES["sqrtsoftplus_hash"])
    weights, x = random_weights(config), torch.randn(300, 32)
    weights.tid2eid = torch.zeros(5, 4, dtype=torch.int32)
    weights.tid2eid[3:] = torch.tensor([7, 7, 2, 7])
    ids = torch.randint(0, 5, (300,))
    dense.assert_near(dense.bind(backend, config, weights)(x, input_ids=ids), dense.layer(config, weights, x, ids))
