"""The direct way on simulated ranks: calls of all sizes, and sums that leave in pieces as they are made."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core import ExpertsOut, MoERunner, Pending, hookimpl, plugins, reference
from moe_core.errors import ConfigError, StageError
from moe_core.parallel import Parallel, exchange, simulate
from moe_core.parallel.direct import Direct
from moe_core.parallel.mesh import Ranks
from moe_core.runner import FallbackWarning

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from layers import SHARED, assert_near, config_of, parts, random_weights, whole
from memory import directly, in_pieces
from toys import Toy

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": SHARED,
    "shared, averaged, scaled": {
        **SHARED,
        "shared_expert_combination": "average",
        "routed_scaling_factor": 2.5,
        "apply_routed_scale_to_output": True,
    },
    "biases": {"expert_bias": True},
    "weight on input": {"apply_router_weight_on_input": True, "top_k": 1},
    "zero experts": {"zero_expert_num": 3, "zero_expert_type": "identity"},
}
SEVERAL = {"beside_from": 0, "piece": 256}
"""Rows of 128 bytes beside the stream, sums in several pieces."""


@torch.no_grad()
@pytest.mark.parametrize("split_from", [0, 1000], ids=["parts", "together"])
@pytest.mark.parametrize("few", [True, False], ids=["few bytes", "many bytes"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_calls_of_changing_sizes_equal_one_process(kind, ranks, few, split_from, monkeypatch) -> None:
    in_pieces(monkeypatch, split_from=split_from, **({} if few else SEVERAL))
    config = config_of(**KINDS[kind])
    weights = random_weights(config)
    counts = [[5, 0, 7, 1], [2, 2, 2, 2], [3, 3, 3, 3], [0, 9, 0, 3], [0] * 4, [9, 9, 9, 9], [4, 1, 8, 6]]
    calls = [parts(torch.randn(sum(each[:ranks]), 32), each[:ranks]) for each in counts]
    for rows, found in zip(calls, directly(config, weights, calls), strict=True):
        assert_near(torch.cat(found), whole(config, weights, torch.cat(rows)))


class Summing(Toy):
    """Has no result but sums, whatever it is asked for."""

    name = "summing"

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing, router_logits):
        found = reference.moe_experts(plan, hidden_states, routing)
        alone = dataclasses.replace(plan, dtype=torch.float32)
        return ExpertsOut(reference.moe_reduce(alone, routing, found, Pending(None)), True)


class Leaving(Summing):
    """Sums unless it is asked to leave that, and then does not write rows of nobody's expert."""

    name = "leaving"
    asked: list[bool]

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing, router_logits):
        self.asked.append(plan.leave_sum)
        if not plan.leave_sum:
            return Summing.moe_experts(self, plan, hidden_states, routing, router_logits)
        value = reference.moe_experts(plan, hidden_states, routing).value
        return ExpertsOut(value.masked_fill(routing.topk_ids[..., None] < 0, float("nan")), False)

    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        value, reduced = experts_out
        if not reduced:
            value = value.masked_fill(routing.topk_ids[..., None] < 0, 0.0)
        return reference.moe_reduce(plan, routing, ExpertsOut(value, reduced), shared)


class LeavingOnly(Leaving):
    """Brings its experts alone: the reference sums, and does look at every row."""

    name, stages = "leaving_only", ("experts",)
    moe_gate = moe_shared_experts = moe_reduce = None


class Faulty(Leaving):
    """Its reduce cannot serve a part of the rows."""

    name = "faulty"

    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        out = Leaving.moe_reduce(self, plan, routing, experts_out, shared)
        return out if experts_out.reduced else out[:, 1:]


def with_backend(backend: Any, config: Any, weights: Any, calls: Any) -> list[list[torch.Tensor]]:
    backend.asked = []
    plugins.register(backend, backend.name)
    try:
        return directly(config, weights, calls, backend=backend.name)
    finally:
        plugins.unregister(backend.name)


@torch.no_grad()
@pytest.mark.filterwarnings(f"ignore::{FallbackWarning.__module__}.FallbackWarning")
@pytest.mark.parametrize("backend", [Summing, Leaving, LeavingOnly])
def test_only_experts_that_can_leave_the_sum_do(backend, monkeypatch) -> None:
    """And are asked to only where their own backend sums, and there is more than one piece."""
    in_pieces(monkeypatch, **SEVERAL)
    config = config_of(**SHARED)
    weights, toy = random_weights(config), backend()
    calls = [parts(torch.randn(sum(counts), 32), counts) for counts in ([9, 9], [1, 2], [7, 0])]
    for rows, found in zip(calls, with_backend(toy, config, weights, calls), strict=True):
        assert_near(torch.cat(found), whole(config, weights, torch.cat(rows)))
    assert set(toy.asked) == {Summing: set(), Leaving: {True, False}, LeavingOnly: {False}}[backend]


@torch.no_grad()
def test_a_part_of_the_sums_is_looked_at_as_all_of_them_is(monkeypatch) -> None:
    in_pieces(monkeypatch, **SEVERAL)
    config = config_of()
    with pytest.raises(StageError, match=r"stage reduce of backend faulty returned \[\d, 31\]"):
        with_backend(Faulty(), config, random_weights(config), [parts(torch.randn(18, 32), [9, 9])])


def test_it_is_refused_where_memories_are_apart() -> None:
    config = config_of()
    with torch.no_grad(), pytest.raises(ConfigError, match="reach each other"):
        simulate(
            lambda mesh: MoERunner(config, random_weights(config), mesh=Parallel(mesh, dispatch="direct"))(
                torch.randn(2, 32)
            ),
            ep=2,
        )


@pytest.mark.parametrize(
    ("ranks", "reach", "way"), [(2, True, "direct"), (2, False, "all_gather"), (8, True, "all_to_all")]
)
def test_auto_takes_it_where_tokens_reach_most_ranks_and_memories_are_within_reach(
    ranks, reach, way, monkeypatch
) -> None:
    monkeypatch.setattr(exchange, "within_reach", lambda comm, device: reach)
    monkeypatch.setattr(Direct, "__init__", lambda self, ranks: None)
    config = config_of(num_experts=8, top_k=2)
    found = simulate(lambda mesh: Ranks.settle(Parallel(mesh), config).exchange.name, ep=ranks)
    assert found == [way] * ranks
