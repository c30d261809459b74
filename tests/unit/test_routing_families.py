"""Every family of routers against an oracle of its own: a plain loop over rows and Python floats, from the formula.

Equal sets of experts and weights within 1e-6 on 10,000 tokens; ties to the lowest id; a row alone equals itself in a
batch, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoEWeights
from moe_core.routing import limit_capacity, route
from moe_core.testing import CALL_FAMILIES, ROUTER_FAMILIES, SIZES, random_weights

TOKENS = 10_000
NEAR = 1e-6  # scores closer than this may be ordered either way by float32
VOCABULARY = 64
Row = list[float]
Chosen = tuple[list[int], list[float]]


@dataclasses.dataclass
class Extra:
    """What a router has besides the logits of a row."""

    bias: Row
    scale: Row
    table: list[list[int]]
    token: int = 0
    gap: float = math.inf  # by how much the worst comparison of the row was won

    def best(self, values: Row, k: int) -> list[int]:
        """The k largest, ties to the lowest id."""
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        if k < len(order):
            self.gap = min(self.gap, values[order[k - 1]] - values[order[k]])
        return order[:k]


def softmax(z: Row) -> Row:
    most = max(z)
    e = [math.exp(v - most) for v in z]
    total = sum(e)
    return [v / total for v in e]


def sigmoid(z: Row) -> Row:
    return [1 / (1 + math.exp(-v)) for v in z]


def sqrtsoftplus(z: Row) -> Row:
    return [math.sqrt(math.log1p(math.exp(v))) for v in z]


def plus(a: Row, b: Row) -> Row:
    return [x + y for x, y in zip(a, b, strict=True)]


def normed(w: Row, eps: float = 0.0, factor: float = 1.0) -> Row:
    total = sum(w) + eps
    return [factor * v / total for v in w]


def in_groups(x: Extra, values: Row, rank: Callable[[Row], float], groups: int = 4, kept: int = 2) -> Row:
    """Values with those outside the best groups at minus infinity."""
    size = len(values) // groups
    best = x.best([rank(values[g * size : (g + 1) * size]) for g in range(groups)], kept)
    return [v if i // size in best else -math.inf for i, v in enumerate(values)]


def top2(group: Row) -> float:
    return sum(sorted(group)[-2:])


def softmax_top4(z: Row, x: Extra) -> Chosen:
    p = softmax(z)
    ids = x.best(p, 4)
    return ids, [p[i] for i in ids]


def softmax_renorm(z: Row, x: Extra) -> Chosen:
    ids, w = softmax_top4(z, x)
    return ids, normed(w)


def expert_scale(z: Row, x: Extra) -> Chosen:
    ids, w = softmax_renorm(z, x)
    return ids, [v * x.scale[i] for i, v in zip(ids, w, strict=True)]


def top4_softmax(z: Row, x: Extra) -> Chosen:
    ids = x.best(z, 4)
    return ids, softmax([z[i] for i in ids])


def group_max(z: Row, x: Extra) -> Chosen:
    p = softmax(z)
    ids = x.best(in_groups(x, p, max), 4)
    return ids, [1.5 * p[i] for i in ids]


def group_top2_bias(z: Row, x: Extra) -> Chosen:
    s = sigmoid(z)
    ids = x.best(in_groups(x, plus(s, x.bias), top2), 4)
    return ids, normed([s[i] for i in ids], 1e-20, 2.5)


def group_top2(z: Row, x: Extra) -> Chosen:
    p = softmax(z)
    ids = x.best(in_groups(x, p, top2), 4)
    return ids, normed([p[i] for i in ids], 1e-20)


def sigmoid_bias(z: Row, x: Extra, eps: float = 0.0, factor: float = 1.0) -> Chosen:
    s = sigmoid(z)
    ids = x.best(plus(s, x.bias), 4)
    return ids, normed([s[i] for i in ids], eps, factor)


def top4_of_biased_logits(z: Row, x: Extra) -> Chosen:
    ids = x.best(plus(z, x.bias), 4)
    return ids, normed(sigmoid([z[i] for i in ids]))


def clamped(z: Row, x: Extra) -> Chosen:
    p = softmax(z)
    ids = x.best(plus(p, x.bias), 4)
    total = max(sum(p[i] for i in ids), 0.4)
    return ids, [p[i] / total for i in ids]


def scaled_softmax_bias(z: Row, x: Extra) -> Chosen:
    p = softmax(z)
    ids = x.best(plus(p, x.bias), 4)
    return ids, [2.5 * p[i] for i in ids]


def top4_sigmoid(z: Row, x: Extra) -> Chosen:
    ids = x.best(z, 4)
    return ids, sigmoid([z[i] for i in ids])


def top1_sigmoid(z: Row, x: Extra) -> Chosen:
    ids = x.best(z, 1)
    return ids, sigmoid([z[ids[0]]])


def sqrtsoftplus_bias(z: Row, x: Extra) -> Chosen:
    s = sqrtsoftplus(z)
    ids = x.best(plus(s, x.bias), 4)
    return ids, normed([s[i] for i in ids], 1e-20, 1.5)


def by_token(z: Row, x: Extra) -> Chosen:
    s, ids = sqrtsoftplus(z), x.table[x.token]
    return ids, normed([s[i] for i in ids], 1e-20, 1.5)


def sparsemixer(z: Row, x: Extra) -> Chosen:
    ids: list[int] = []
    weights: Row = []
    for _ in range(2):
        left = [-math.inf if i in ids else v for i, v in enumerate(z)]
        [best] = x.best(left, 1)
        edges = [left[best] - v - 0.2 * max(abs(v), left[best]) for v in z]
        x.gap = min(x.gap, *(abs(edge) for edge in edges))
        band = [i for i in range(len(z)) if i not in ids and edges[i] <= 0]
        weights.append(1 / sum(math.exp(z[i] - z[best]) for i in band))
        ids.append(best)
    return ids, weights


ORACLES: dict[str, Callable[[Row, Extra], Chosen]] = {
    "softmax": softmax_top4,
    "softmax_renorm": softmax_renorm,
    "softmax_renorm_expert_scale": expert_scale,
    "topk_softmax": top4_softmax,
    "topk_softmax_gate_bias": top4_softmax,  # the gate's bias is in the logits already
    "group_max": group_max,
    "group_top2_bias": group_top2_bias,
    "group_top2": group_top2,
    "sigmoid_bias": sigmoid_bias,
    "sigmoid_bias_eps": lambda z, x: sigmoid_bias(z, x, 1e-6, 1.5),
    "sigmoid_bias_softcap": lambda z, x: sigmoid_bias([3 * math.tanh(v / 3) for v in z], x),
    "sigmoid_bias_logit_scale": lambda z, x: sigmoid_bias([0.5 * v for v in z], x),
    "topk_sigmoid_bias": top4_of_biased_logits,
    "softmax_bias_clamp": clamped,
    "softmax_bias_zero_experts": scaled_softmax_bias,
    "sigmoid": top4_sigmoid,
    "sigmoid_renorm": lambda z, x: (x.best(z, 4), normed(sigmoid(sorted(z, reverse=True)[:4]))),
    "topk_sigmoid": top4_sigmoid,
    "sigmoid_on_input": top1_sigmoid,
    "sqrtsoftplus_bias": sqrtsoftplus_bias,
    "sqrtsoftplus_hash": by_token,
    "sparsemixer": sparsemixer,
    "custom": softmax_renorm,
}


def case(name: str, tokens: int, **fields: object) -> tuple[MoEConfig, MoEWeights, Tensor, Tensor]:
    config = MoEConfig(**{**SIZES, **{**ROUTER_FAMILIES, **CALL_FAMILIES}[name], **fields})
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    logits = 2 * torch.randn(tokens, config.num_router_outputs, generator=generator)
    input_ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    return config, random_weights(config, vocabulary=VOCABULARY), logits, input_ids


def by_hand(name: str, config: MoEConfig, weights: MoEWeights, logits: Tensor, input_ids: Tensor):
    """[T] (ids, weights, gap) of the oracle."""
    rows = config.num_router_outputs
    bias, scale, table = weights.e_score_correction_bias, weights.per_expert_scale, weights.tid2eid
    extra = Extra(
        [0.0] * rows if bias is None else bias.tolist(),
        [1.0] * rows if scale is None else scale.tolist(),
        [] if table is None else table.tolist(),
    )
    found = []
    for z, token in zip(logits.tolist(), input_ids.tolist(), strict=True):
        extra.token, extra.gap = token, math.inf
        found.append((*ORACLES[name](z, extra), extra.gap))
    return found


def test_every_family_has_an_oracle() -> None:
    assert ORACLES.keys() == ROUTER_FAMILIES.keys()


@pytest.mark.parametrize("name", ROUTER_FAMILIES)
def test_experts_and_weights_are_those_of_the_formula(name: str) -> None:
    config, weights, logits, input_ids = case(name, TOKENS)
    routing = route(config, weights, logits, input_ids=input_ids)
    assert (routing.topk_weights.dtype, routing.topk_ids.dtype) == (torch.float32, torch.int32)
    near = 0
    ids, topk_weights = routing.topk_ids.tolist(), routing.topk_weights.tolist()
    for row, (wanted_ids, wanted_weights, gap) in enumerate(by_hand(name, config, weights, logits, input_ids)):
        if gap < NEAR:
            near += 1
            continue
        assert set(ids[row]) == set(wanted_ids), row
        wanted = dict(zip(wanted_ids, wanted_weights, strict=True))
        assert all(abs(v - wanted[i]) < 1e-6 for i, v in zip(ids[row], topk_weights[row], strict=True)), row
    assert near <= 10, "the random logits decide nothing"


@pytest.mark.parametrize("name", ROUTER_FAMILIES)
def test_ties_go_to_the_lowest_id_in_descending_order(name: str) -> None:
    config, weights, logits, input_ids = case(name, 500)
    # Beside the integers, where no two different pairs of sigmoids have one sum; only equal numbers shall tie.
    logits = torch.cat([logits.round(), logits.mul(0.5).round().mul(2), torch.zeros(1, logits.shape[1])]) + 0.375
    input_ids = torch.cat([input_ids, input_ids, input_ids[:1]])
    if weights.e_score_correction_bias is not None:
        weights.e_score_correction_bias.mul_(0 if config.has_groups else 4).round_().div_(4)
    routing = route(config, weights, logits, input_ids=input_ids)
    for row, (wanted, _, _) in enumerate(by_hand(name, config, weights, logits, input_ids)):
        assert routing.topk_ids[row].tolist() == wanted, row


@pytest.mark.parametrize("name", ROUTER_FAMILIES)
def test_a_row_alone_is_the_row_in_a_batch(name: str) -> None:
    # Rows of 12 begin at any place of a vector register.
    config, weights, logits, input_ids = case(name, 67, num_experts=12)
    together = route(config, weights, logits, input_ids=input_ids)
    for part in (*(slice(i, i + 1) for i in range(0, 67, 3)), slice(0, 2), slice(1, 8), slice(3, 36), slice(30, 67)):
        alone = route(config, weights, logits[part].clone(), input_ids=input_ids[part])
        assert torch.equal(alone.topk_ids, together.topk_ids[part])
        assert torch.equal(alone.topk_weights, together.topk_weights[part])


@pytest.mark.parametrize("name", ROUTER_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float32(name: str, dtype: torch.dtype) -> None:
    config, weights, logits, input_ids = case(name, 20)
    low = logits.to(dtype)
    found, wanted = (route(config, weights, z, input_ids=input_ids) for z in (low, low.float()))
    assert torch.equal(found.topk_ids, wanted.topk_ids)
    assert torch.equal(found.topk_weights, wanted.topk_weights)


def test_softmax_then_renormalising_equals_softmax_of_the_chosen() -> None:
    """R02 and R03 of FEATURES.md are one router."""
    (a, weights, logits, _), (b, *_) = case("softmax_renorm", TOKENS), case("topk_softmax", 1)
    one, other = route(a, weights, logits), route(b, weights, logits)
    assert torch.equal(one.topk_ids, other.topk_ids)
    assert (one.topk_weights - other.topk_weights).abs().max() < 1e-6


@pytest.mark.parametrize("name", [*ROUTER_FAMILIES, *CALL_FAMILIES])
def test_no_tokens_are_routed_nowhere(name: str) -> None:
    config, weights, logits, input_ids = case(name, 0)
    routing = limit_capacity(route(config, weights, logits, input_ids=input_ids), config.num_experts, 1)
    assert [(tuple(t.shape), t.dtype) for t in routing] == [
        ((0, config.top_k), torch.float32),
        ((0, config.top_k), torch.int32),
    ]


# Routers under which a row depends on its call.


@pytest.mark.parametrize("name", ["capacity_top1", "capacity_top2"])
def test_a_capacity_drops_what_comes_too_late(name: str) -> None:
    config, weights, logits, _ = case(name, 64)
    free = route(config, weights, logits)
    routing = limit_capacity(free, config.num_experts, config.expert_capacity)
    wanted, taken = free.topk_ids.tolist(), [0] * config.num_experts
    for choice in range(config.top_k):
        for row in wanted:
            taken[row[choice]] += 1
            if taken[row[choice]] > config.expert_capacity:
                row[choice] = -1
    assert routing.topk_ids.tolist() == wanted
    assert max(taken) > config.expert_capacity
    dropped = routing.topk_ids < 0
    assert torch.equal(routing.topk_weights, free.topk_weights.masked_fill(dropped, 0.0))
    again = limit_capacity(routing, config.num_experts, config.expert_capacity)
    assert torch.equal(again.topk_ids, routing.topk_ids)


def test_zero_experts_have_no_capacity() -> None:
    config, weights, logits, _ = case("softmax_bias_zero_experts", 64)
    free = route(config, weights, logits)
    routing = limit_capacity(free, config.num_experts, 1)
    zero = free.topk_ids >= config.num_experts
    assert zero.sum() > 4
    assert torch.equal(routing.topk_ids[zero], free.topk_ids[zero])
    assert torch.bincount(routing.topk_ids[~zero & (routing.topk_ids >= 0)]).max() == 1


@pytest.mark.parametrize("fields", [{}, {"zero_expert_num": 4, "zero_expert_type": "identity", "top_k": 18}])
@pytest.mark.parametrize("name", ["simulated_uniform", "simulated_zipf"])
def test_simulated_experts_are_distinct_seeded_and_equal_from_any_batch(name: str, fields: dict) -> None:
    config, weights, logits, _ = case(name, 100, **fields)
    routing = route(config, weights, logits)
    assert routing.topk_weights.unique().tolist() == [pytest.approx(1 / config.top_k)]
    for row in routing.topk_ids.tolist():
        assert len(set(row)) == config.top_k
        assert all(0 <= i < config.num_router_outputs for i in row)
    assert torch.equal(route(config, weights, logits[:7] * 2).topk_ids, routing.topk_ids[:7])
    other = dataclasses.replace(config, simulated_seed=config.simulated_seed + 1)
    assert not torch.equal(route(other, weights, logits).topk_ids, routing.topk_ids)


@pytest.mark.parametrize(("skew", "seed"), [(0.0, 0), (0.0, 7), (1.0, 0), (2.0, -1)])
def test_simulated_popularity_is_what_was_asked_for(skew: float, seed: int) -> None:
    config, weights, logits, _ = case("simulated_zipf", TOKENS, top_k=1, simulated_zipf_skew=skew, simulated_seed=seed)
    share = torch.bincount(route(config, weights, logits).topk_ids.flatten(), minlength=16) / TOKENS
    wanted = torch.arange(1, 17, dtype=torch.float32) ** -skew
    wanted /= wanted.sum()
    assert ((share - wanted).abs() < 5 * torch.sqrt(wanted * (1 - wanted) / TOKENS)).all()
