"""Placement from load: balance beside the published algorithm's, its limits, and its time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from moe_core.errors import ConfigError
from moe_core.parallel import Placement, imbalance, plan_placement

sys.path.insert(0, str(Path(__file__).parent))

from published import published_imbalance


def zipf(skew: float = 1.0, seed: int = 0, experts: int = 256) -> list[float]:
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    return (1e6 / torch.arange(1, experts + 1).double() ** skew)[order].tolist()


@pytest.mark.parametrize("ranks", [8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("skew", [0.6, 1.0])
def test_the_busiest_rank_is_near_the_mean(ranks: int, skew: float) -> None:
    for seed in range(3):
        load = zipf(skew, seed)
        plan = plan_placement(load, ranks, redundant=26)
        assert plan.num_redundant_experts == 26
        assert max(map(len, plan.slots)) <= -(-282 // ranks)
        assert imbalance(plan, load) <= 1.05


@pytest.mark.parametrize("ranks", [8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("skew", [0.6, 1.0, 1.2])
def test_no_worse_than_the_published_algorithm(ranks: int, skew: float) -> None:
    physical = -(-282 // ranks) * ranks  # it needs as many on each rank
    for seed in range(3):
        load = zipf(skew, seed)
        mine = imbalance(plan_placement(load, ranks, redundant=physical - 256), load)
        assert mine <= 1.02 * published_imbalance(load, physical, ranks)


@pytest.mark.parametrize("ranks", [8, 16, 32])
def test_groups_stay_on_a_host(ranks: int) -> None:
    load, hosts, groups = zipf(0.8), ranks // 4, 16
    plan = plan_placement(load, ranks, redundant=64, hosts=hosts, groups=groups)
    for group in range(groups):
        members = range(group * 16, (group + 1) * 16)
        at = {rank // 4 for rank, held in enumerate(plan.slots) if set(held) & set(members)}
        assert len(at) == 1
    assert imbalance(plan, load) <= 1.02 * published_imbalance(load, 320, ranks, hosts, groups)


def test_it_is_quick() -> None:
    for ranks in (8, 64):
        best = []
        for seed in range(5):
            load, started = zipf(seed=seed), time.process_time()
            plan_placement(load, ranks, redundant=26)
            best.append(time.process_time() - started)
        assert min(best) < 0.05


def test_the_same_load_gives_the_same_plan_whatever_holds_it() -> None:
    load = [3, 1, 4, 1, 5, 9, 2, 6]
    assert plan_placement(load, 4, redundant=3) == plan_placement(torch.tensor(load), 4, redundant=3)


@pytest.mark.parametrize(
    ("load", "ranks", "redundant"),
    [([0.0] * 8, 4, 4), ([1.0] * 7, 3, 0), ([5.0], 4, 3), ([1, 0, 0, 0], 4, 2), ([1e9, 1, 1, 1, 1], 5, 20)],
)
def test_loads_at_the_edge(load: list[float], ranks: int, redundant: int) -> None:
    plan = plan_placement(load, ranks, redundant=redundant)
    assert plan.num_redundant_experts == redundant
    assert imbalance(plan, load) >= 1.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1.0, -1.0], 2), "at least 0"),
        (([1.0, float("nan")], 2), "at least 0"),
        (([], 2), "no experts"),
        (([1.0, 1.0], 0), "ranks=0"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: tuple[list[float], int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        plan_placement(*arguments)
    with pytest.raises(ConfigError, match="redundant=9"):
        plan_placement([1.0] * 4, 2, redundant=9)
    with pytest.raises(ConfigError, match="groups=3"):
        plan_placement([1.0] * 4, 2, groups=3)


def test_placements() -> None:
    assert Placement.linear(7, 3).slots == ((0, 1, 2), (3, 4), (5, 6))
    assert Placement.round_robin(7, 3).slots == ((0, 3, 6), (1, 4), (2, 5))
    assert Placement.round_robin(4, 2).expert_map(1).tolist() == [-1, 0, -1, 1]
    for slots, text in ((((0, 1), (1,)), "no rank holds expert 2"), (((0, 0), (1, 2)), "twice"), (((3,), ()), "0 to")):
        with pytest.raises(ConfigError, match=text):
            Placement(3, slots)
