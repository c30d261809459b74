"""The router kernel against moe_core.routing.route, which is its meaning: ids exactly, weights by the table."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_core import MoEConfig, MoEWeights, Routing
from moe_core.routing import route
from moe_core.testing.cases import ROUTER_FAMILIES, SIZES, random_weights
from moe_core.testing.tolerances import tolerance
from moe_cuda.kernels.router import route_rows

NEEDS_IDS = [name for name, fields in ROUTER_FAMILIES.items() if fields.get("hash_routing")]
SERVED = [name for name, fields in ROUTER_FAMILIES.items() if not fields.get("custom_routing_function")]
CHOOSING = [name for name in SERVED if name not in NEEDS_IDS]
DEEPSEEK = {**ROUTER_FAMILIES["group_top2_bias"], "top_k": 8, "num_expert_group": 8, "topk_group": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "one_expert": {"num_experts": 1, "top_k": 1},
    "all_experts": {"num_experts": 5, "top_k": 5, "renormalize": True},
    "prime": {"num_experts": 67, "top_k": 7, "scoring_func": "sigmoid"},
    "deepseek_v3": {**DEEPSEEK, "num_experts": 256},
    "groups_of_20": {**ROUTER_FAMILIES["group_max"], "num_experts": 160, "top_k": 6, "num_expert_group": 8},
    "groups_of_one": {
        **ROUTER_FAMILIES["group_max"],
        "num_experts": 8,
        "top_k": 3,
        "num_expert_group": 8,
        "topk_group": 3,
    },
    "six_groups": {**ROUTER_FAMILIES["group_top2_bias"], "num_experts": 30, "num_expert_group": 6, "topk_group": 3},
    "many": {"num_experts": 512, "top_k": 10, "renormalize": True},
    "masked_by_number": {**ROUTER_FAMILIES["group_top2_bias"], "group_mask_value": 0.0},
}


def make(fields: Any, **changes: Any) -> tuple[MoEConfig, MoEWeights]:
    config = MoEConfig(**{**SIZES, **fields, **changes})
    return config, random_weights(config)


def moved(weights: MoEWeights, device: torch.device) -> MoEWeights:
    return MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})


def logits_of(config: MoEConfig, tokens: int = 7, seed: int = 1) -> Tensor:
    return 2 * torch.randn(tokens, config.num_router_outputs, generator=torch.Generator().manual_seed(seed))


def check(config: MoEConfig, weights: MoEWeights, logits: Tensor, device: torch.device, **options: Any) -> Routing:
    given = options.get("topk_ids")
    wanted = route(config, weights, logits, **options)
    if given is not None:
        options["topk_ids"] = given.to(device)
    found = route_rows(config, moved(weights, device), logits.to(device), **options)
    assert found.topk_ids.dtype == torch.int32 and found.topk_weights.dtype == torch.float32
    assert torch.equal(found.topk_ids.cpu(), wanted.topk_ids)
    error = (found.topk_weights.cpu() - wanted.topk_weights).norm(dim=1)
    allowed = tolerance(torch.float32, "gate") * wanted.topk_weights.norm(dim=1)
    assert (error <= allowed).all(), f"errors of rows: {error.tolist()}, allowed: {allowed.tolist()}"
    return found


@pytest.mark.parametrize("case", CHOOSING)
def test_families(case: str, device: torch.device) -> None:
    """Every family that chooses by its logits."""
    config, weights = make(ROUTER_FAMILIES[case])
    check(config, weights, logits_of(config), device)


def test_dtypes_and_views(device: torch.device) -> None:
    """Logits may be of any float dtype, and rows of something wider."""
    config, weights = make(ROUTER_FAMILIES["softmax_renorm"])
    for dtype in (torch.bfloat16, torch.float16):
        check(config, weights, logits_of(config).to(dtype), device)
    logits = logits_of(config)
    wide = torch.cat([logits, logits], 1).to(device)[:, : config.num_router_outputs]
    assert torch.equal(route_rows(config, weights, wide).topk_ids.cpu(), route(config, weights, logits).topk_ids)


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str, device: torch.device) -> None:
    """Counts of experts, groups and choices that are no powers of two, and the largest ones."""
    config, weights = make(SHAPES[case])
    check(config, weights, logits_of(config, 6), device)


@pytest.mark.parametrize("case", [*CHOOSING, "masked_by_number"])
def test_ties(case: str, device: torch.device) -> None:
    """Equal scores go to the lowest id, also between groups and against a mask; +0 and -0 are equal."""
    config, weights = make({**ROUTER_FAMILIES, **SHAPES}[case])
    if weights.e_score_correction_bias is not None:
        weights.e_score_correction_bias = weights.e_score_correction_bias.sign() * 0.5
    steps = torch.randint(-1, 2, (7, config.num_router_outputs), generator=torch.Generator().manual_seed(3)).float()
    steps[3:6] = torch.where(steps[3:6] == 1, 0.0, torch.where(steps[3:6] == -1, -0.0, -1.0))
    steps[6] = 0
    check(config, weights, steps, device)


@pytest.mark.parametrize("case", [name for name in CHOOSING if ROUTER_FAMILIES[name].get("scoring_func")])
def test_tiny_and_saturated_scores(case: str, device: torch.device) -> None:
    """Scores near and below what float32 holds keep their weights, and those close to 1 their order."""
    config, weights = make(ROUTER_FAMILIES[case])
    if weights.e_score_correction_bias is not None:
        weights.e_score_correction_bias.zero_()
    shift = torch.tensor([-14.0, -40.0, -60.0, -80.0, -200.0, 9.0, 12.0, 18.0])
    found = check(config, weights, logits_of(config, 8) + shift[:, None], device)
    assert torch.isfinite(found.topk_weights).all()


@pytest.mark.parametrize("policy", ["propagate", "zero"])
@pytest.mark.parametrize(
    "case", ["softmax_renorm", "group_top2_bias", "group_max", "sigmoid", "topk_softmax", "sparsemixer"]
)
def test_bad_logits(case: str, policy: str, device: torch.device) -> None:
    """NaN or infinity in a row: distinct ids in range, weights by the policy, other rows bit for bit as before."""
    config, weights = make(ROUTER_FAMILIES[case], nan_policy=policy)
    placed, logits = moved(weights, device), logits_of(config, 8)
    clean = route_rows(config, placed, logits.to(device))
    bad = logits.clone()
    bad[1, 3], bad[2], bad[4, 5], bad[5], bad[6, ::2] = (
        float("nan"),
        float("nan"),
        float("inf"),
        -float("inf"),
        -float("inf"),
    )
    found, wanted = route_rows(config, placed, bad.to(device)), route(config, weights, bad)
    ids = found.topk_ids.cpu()
    assert ((ids >= 0) & (ids < config.num_experts)).all()
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    torch.testing.assert_close(found.topk_weights.cpu(), wanted.topk_weights, equal_nan=True, rtol=1e-5, atol=1e-7)
    good = [0, 3, 7]
    assert torch.equal(found.topk_weights[good], clean.topk_weights[good])
    assert torch.equal(found.topk_ids[good], clean.topk_ids[good])


@pytest.mark.parametrize("case", SERVED)
def test_settled_ids(case: str, device: torch.device) -> None:
    """Experts that a table or a record chose get the weights of the family's formula; -1 gets none."""
    config, weights = make(ROUTER_FAMILIES[case])
    logits = logits_of(config)
    ids = torch.rand(7, config.num_router_outputs).argsort(1)[:, : config.top_k]
    if config.sparsemixer_jitter is None:
        ids[3, 0], ids[4] = -1, -1
    for dtype in (torch.int32, torch.int64):
        check(config, weights, logits, device, topk_ids=ids.to(dtype))


def test_parts_of_logits(device: torch.device) -> None:
    """Parts from a split product are summed in order, the router's bias on top."""
    config, weights = make(ROUTER_FAMILIES["topk_softmax_gate_bias"])
    parts = torch.randn(5, 7, config.num_router_outputs)
    bias = weights.gate_bias
    assert bias is not None
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    found = route_rows(config, moved(weights, device), parts.to(device), gate_bias=bias.to(device))
    wanted = route(config, weights, total + bias)
    assert torch.equal(found.topk_ids.cpu(), wanted.topk_ids)
    torch.testing.assert_close(found.topk_weights.cpu(), wanted.topk_weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["softmax_renorm", "group_top2_bias"])
def test_rows_do_not_depend_on_their_batch(case: str, device: torch.device) -> None:
    """Bitwise: a row alone, at another place, and among others."""
    config, weights = make(ROUTER_FAMILIES[case])
    placed, logits = moved(weights, device), logits_of(config, 11).to(device)
    whole = route_rows(config, placed, logits)
    for rows in ([7], [10, 3, 0], list(range(10, -1, -1))):
        some = route_rows(config, placed, logits[rows])
        assert torch.equal(some.topk_ids, whole.topk_ids[rows])
        assert torch.equal(some.topk_weights, whole.topk_weights[rows])


def test_no_tokens(device: torch.device) -> None:
    """T = 0 launches nothing."""
    config, weights = make({})
    found = route_rows(config, moved(weights, device), torch.empty(0, 16, device=device))
    assert found.topk_ids.shape == found.topk_weights.shape == (0, 4)


def test_scale_goes_where_the_config_says(device: torch.device) -> None:
    """routed_scaling_factor is in the weights, or left to whoever sums."""
    config, weights = make({"routed_scaling_factor": 2.5})
    check(config, weights, logits_of(config), device)
    check(dataclasses.replace(config, apply_routed_scale_to_output=True), weights, logits_of(config), device)
