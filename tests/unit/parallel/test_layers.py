"""tp, ep, dp and sp of 1, 2, 4 and 8 simulated ranks equal one process."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from moe_core import MoEConfig
from moe_core.errors import ConfigError
from moe_core.parallel import Placement
from moe_core.testing import QUANT_VARIANTS

sys.path.insert(0, str(Path(__file__).parent))

from layers import SHARED, assert_near, config_of, parts, random_weights, spread, whole

KINDS = {
    "plain": {},
    "shared": SHARED,
    "biases": {**SHARED, "expert_bias": True, "shared_expert_bias": True, "gate_bias": True},
    "zero experts": {"zero_expert_num": 3, "zero_expert_type": "identity", "top_k": 6},
    "average, scaled": {
        **SHARED,
        "shared_expert_combination": "average",
        "apply_routed_scale_to_output": True,
        "routed_scaling_factor": 2.5,
    },
    "weight on input": {"top_k": 1, "apply_router_weight_on_input": True},
    "not gated": {"gated": False, "activation": "relu2"},
}


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_tp(kind: str, ranks: int) -> None:
    config = config_of(**KINDS[kind])
    weights, x = random_weights(config), torch.randn(11, 32)
    for found in spread(config, weights, lambda mesh: x, {"tp": ranks}):
        assert_near(found, whole(config, weights, x))


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("kind", KINDS)
def test_ep(kind: str, dispatch: str, ranks: int) -> None:
    config = config_of(**KINDS[kind])
    counts = [5, 0, 7, 1, 3, 2, 0, 4][:ranks]
    weights, x = random_weights(config), torch.randn(sum(counts), 32)
    each = parts(x, counts)
    found = spread(config, weights, lambda mesh: each[mesh.rank], {"ep": ranks}, dispatch=dispatch)
    assert_near(torch.cat(found), whole(config, weights, x))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [{"ep": 2, "tp": 2}, {"tp": 2, "ep": 4}, {"dp": 2, "ep": 2, "tp": 2}], ids=str)
def test_every_axis_together(kind: str, axes: dict[str, int]) -> None:
    config = config_of(**KINDS[kind])
    counts = [[5, 0, 7, 1], [2, 3, 4, 5]]
    weights, x = random_weights(config), torch.randn(sum(map(sum, counts)), 32)
    each = parts(x, counts[0] + counts[1])

    def own(mesh):
        dp = mesh.coordinate("dp") if "dp" in axes else 0
        return each[4 * dp + mesh.coordinate("ep")]

    wanted = whole(config, weights, x).split(counts[0] + counts[1])
    seen = []

    def place(mesh):
        seen.append((mesh.rank, 4 * (mesh.coordinate("dp") if "dp" in axes else 0) + mesh.coordinate("ep")))
        return own(mesh)

    found = spread(config, weights, place, axes)
    for rank, index in seen:
        assert_near(found[rank], wanted[index]) if counts[index // 4][index % 4] else None


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_sp(kind: str, ranks: int) -> None:
    config = config_of(**KINDS[kind])
    counts = [5, 0, 7, 1, 3, 2, 0, 4][:ranks]
    weights, x = random_weights(config), torch.randn(sum(counts), 32)
    each = parts(x, counts)
    found = spread(config, weights, lambda mesh: each[mesh.rank], {"tp": ranks}, sequence_parallel=True)
    assert_near(torch.cat(found), whole(config, weights, x))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [{"ep": 4}, {"ep": 2, "tp": 2}], ids=str)
def test_ep_inside_tp(kind: str, axes: dict[str, int]) -> None:
    config = config_of(**KINDS[kind])
    weights, x = random_weights(config), torch.randn(11, 32)
    for found in spread(config, weights, lambda mesh: x, axes, tokens="replicated"):
        assert_near(found, whole(config, weights, x))


@torch.no_grad()
def test_ep_of_sp() -> None:
    config = config_of(**SHARED)
    counts = [5, 0, 7, 1]
    weights, x = random_weights(config), torch.randn(sum(counts), 32)
    each = parts(x, counts)
    axes = {"ep": 2, "tp": 2}
    found = spread(config, weights, lambda mesh: each[mesh.rank], axes, sequence_parallel=True)
    assert_near(torch.cat(found), whole(config, weights, x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["fp8_block_shared", "int8_w8a8", "int4_zero_64", "mxfp4", "nvfp4"])
def test_quantised_experts_keep_their_scales(name: str) -> None:
    fields = QUANT_VARIANTS[name]
    config = MoEConfig(**fields)
    config = dataclasses.replace(config, quant=dataclasses.replace(config.quant, dtype="float32"))
    weights, x = random_weights(config), torch.randn(9, config.hidden_size)
    for options in ({}, {"placement": Placement.round_robin(config.num_experts, 3)}, {"tokens": "replicated"}):
        each = [x] * 3 if options.get("tokens") else parts(x, [2, 0, 7])
        found = spread(config, weights, lambda mesh, each=each: each[mesh.rank], {"ep": 3}, **options)
        assert_near(found[0] if options.get("tokens") else torch.cat(found), whole(config, weights, x))
    with pytest.raises(ConfigError, match="packed weights"):
        spread(config, weights, lambda mesh: x, {"tp": 2})
