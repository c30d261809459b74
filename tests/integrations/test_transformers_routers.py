"""Every architecture's router against moe_core.routing.route, on 10,000 random tokens: the same experts and weights.

A row is left out where rounding decides: where logits that differ in their last bits make moe_core choose as
transformers did. Exact ties are broken arbitrarily by torch.topk; moe_core takes the lowest id.
"""

import dataclasses

import pytest
import torch
import zoo

from moe_core.integrations.transformers import convert_block
from moe_core.integrations.transformers.adapters import ADAPTERS
from moe_core.routing import route, router_logits_of

TOKENS = 10_000
WEIGHTS_TOLERANCE = 1e-6
MOST_LEFT_OUT = 10
FOUND = [found for found in zoo.block_classes() if found.name in ADAPTERS]
CASES = [(found, {}) for found in FOUND]
# As built otherwise, this one looks ids up in a table.
CASES += [(found, {"mlp_layer_types": ["moe", "moe"]}) for found in FOUND if found.name == "DeepseekV4SparseMoeBlock"]
EACH = pytest.mark.parametrize(("found", "overrides"), CASES, ids=lambda v: str(v) if isinstance(v, zoo.Found) else "")


def eager_weights(block, x, input_ids):
    """What transformers' router chose, as weights [T, E] with zeros elsewhere."""
    name, converted = type(block).__name__, convert_block(block)
    found = converted._ask_router(x, input_ids)
    count = converted.config.num_router_outputs
    dense = torch.zeros(x.shape[0], count)
    if name == "DbrxFFN":
        weights, ids = block.route_tokens_to_experts(found)
    elif name == "Llama4TextMoe":
        return found[0]
    elif name == "JetMoeMoE":
        _, tokens, gates, sizes, _ = found
        dense[tokens, torch.arange(count).repeat_interleave(torch.tensor(sizes))] = gates
        return dense
    else:
        _, weights, ids = found
    if name == "OpenAIPrivacyFilterMLP":
        weights = weights * block.num_experts  # the block's own factor
    return dense.scatter(1, ids, weights)


def our_weights(config, weights, router_logits, input_ids):
    found = route(config, weights, router_logits, input_ids=input_ids)
    return torch.zeros_like(router_logits).scatter(1, found.topk_ids.long(), found.topk_weights)


def equal_rows(ours, eager):
    return ((ours != 0) == (eager != 0)).all(1) & ((ours - eager).abs() <= WEIGHTS_TOLERANCE).all(1)


def rows_decided_by_rounding(config, weights, router_logits, input_ids, eager):
    """Which rows choose as ``eager`` under one of a few disturbances of the last bits."""
    decided = torch.zeros(router_logits.shape[0], dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    for _ in range(64):
        noise = torch.randn(router_logits.shape, generator=generator) * 1e-6 * router_logits.abs().clamp(min=1)
        decided |= ((our_weights(config, weights, router_logits + noise, input_ids) != 0) == (eager != 0)).all(1)
    return decided


def built(found, overrides):
    block = zoo.build(found, **overrides)
    converted = convert_block(block)
    x = torch.randn(TOKENS, zoo.H, generator=torch.Generator().manual_seed(4))
    config, weights = converted.runner.config, converted.runner.weights
    if converted.repeats > 1:
        config = dataclasses.replace(config, top_k=converted.repeats, apply_router_weight_on_input=False)
    return block, config, weights, x, torch.arange(TOKENS) % 64


@EACH
@torch.no_grad()
def test_router(found, overrides):
    block, config, weights, x, input_ids = built(found, overrides)
    eager = eager_weights(block, x, input_ids)
    logits = router_logits_of(config, weights, x)
    equal = equal_rows(our_weights(config, weights, logits, input_ids), eager)
    left_out = ~equal
    if left_out.any():
        rows = left_out.nonzero()[:, 0]
        assert len(rows) <= MOST_LEFT_OUT
        assert rows_decided_by_rounding(config, weights, logits[rows], input_ids[rows], eager[rows]).all()


@EACH
@torch.no_grad()
def test_rows_that_are_not_finite_change_no_other_row(found, overrides):
    _, config, weights, x, input_ids = built(found, overrides)
    x, input_ids = x[:500], input_ids[:500]
    bad = x.clone()
    bad[3], bad[5], bad[7], bad[9, 1] = float("nan"), float("inf"), float("-inf"), float("nan")
    broken = torch.zeros(len(x), dtype=torch.bool)
    broken[[3, 5, 7, 9]] = True
    wanted = route(config, weights, router_logits_of(config, weights, x), input_ids=input_ids)
    got = route(config, weights, router_logits_of(config, weights, bad), input_ids=input_ids)
    assert torch.equal(got.topk_ids[~broken], wanted.topk_ids[~broken])
    assert torch.equal(got.topk_weights[~broken], wanted.topk_weights[~broken])
    ids = got.topk_ids[broken]
    assert ((ids >= 0) & (ids < config.num_router_outputs)).all()
    assert all(len(set(row)) == config.top_k for row in ids.tolist())


@EACH
@torch.no_grad()
def test_equal_logits_choose_the_lowest_ids(found, overrides):
    _, config, weights, _, input_ids = built(found, overrides)
    expected = torch.arange(config.top_k, dtype=torch.int32).expand(3, -1)
    if config.hash_routing:
        expected = weights.tid2eid[input_ids[:3]].int()
    if weights.e_score_correction_bias is not None:
        weights = dataclasses.replace(weights, e_score_correction_bias=weights.e_score_correction_bias * 0)
    logits = torch.full((3, config.num_router_outputs), 0.5)
    assert torch.equal(route(config, weights, logits, input_ids=input_ids[:3]).topk_ids, expected)


def test_the_routers_cover_what_they_say(capsys):
    """Prints N of D: the blocks whose router moe_core computes, of all; the rest keep their own."""
    everything = zoo.block_classes()
    with capsys.disabled():
        print(f"\ntransformers routers: {len(FOUND)} of {len(everything)} blocks")  # noqa: T201
    assert len(everything) - len(FOUND) <= 4
