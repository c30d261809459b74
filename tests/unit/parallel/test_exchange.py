"""Dispatch and combine by themselves: what travels, who may replace them, and errors instead of hangs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import BackendInfo, Dispatched, ExpertsOut, MoERunner, Verdict, hookimpl, plugins, reference
from moe_core.errors import ConfigError, GradientError, InputError, ParallelError, StageError, WeightsError
from moe_core.parallel import (
    Parallel,
    Placement,
    SimulatedMesh,
    apply_placement,
    measured_load,
    plan_placement,
    simulate,
    token_counts,
)
from moe_core.types import Plan

sys.path.insert(0, str(Path(__file__).parent))

from layers import SHARED, assert_near, config_of, parts, random_weights, spread, whole


@torch.no_grad()
def test_a_row_travels_once_to_each_rank_that_needs_it() -> None:
    config = config_of(num_experts=8, top_k=2)
    ids = torch.tensor([[0, 1], [0, 7], [4, 5], [-1, -1], [6, 2]]).int()
    given = {"topk_ids": ids, "topk_weights": torch.rand(5, 2)}
    weights, x = random_weights(config), torch.randn(5, 32)

    def rows(mesh: SimulatedMesh) -> list[tuple[int, ...]]:
        runner = MoERunner(config, weights, mesh=Parallel(mesh, dispatch="all_to_all"))
        mesh.world.log[mesh.rank].clear()
        tokens = 5 if mesh.rank == 0 else 0
        runner(x[:tokens], **{name: value[:tokens] for name, value in given.items()})
        return [shape for _, _, shape in mesh.world.log[mesh.rank]]

    counts, routing, hidden, sums = simulate(rows, ep=2)[0]
    # Row 0 to rank 0, row 1 to both, row 2 to rank 1, row 3 to none, row 4 to both.
    assert (counts, routing, hidden, sums) == ((2,), (6, 4), (6, 32), (3, 32))


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 8])
def test_the_way_follows_from_how_many_ranks_a_token_reaches(top_k: int) -> None:
    config = config_of(top_k=top_k)
    names = simulate(lambda mesh: MoERunner(config, random_weights(config), mesh=mesh).parallel.exchange.name, ep=4)
    assert names == ["all_gather" if top_k == 8 else "all_to_all"] * 4


@torch.no_grad()
def test_counts_that_the_caller_knows_are_not_asked_for() -> None:
    config, counts = config_of(**SHARED), [3, 0, 4, 1]
    weights, x = random_weights(config), torch.randn(8, 32)
    each = parts(x, counts)

    def run(mesh: SimulatedMesh) -> tuple[Tensor, int]:
        runner = MoERunner(config, weights, mesh=Parallel(mesh, sequence_parallel=True, dispatch="all_gather"))
        mesh.world.log[mesh.rank].clear()
        with token_counts(counts):
            return runner(each[mesh.rank]), len(mesh.world.log[mesh.rank])

    found = simulate(run, ep=2, tp=2)
    assert_near(torch.cat([out for out, _ in found]), whole(config, weights, x))
    assert {number for _, number in found} == {5}  # rows of tp, rows and routing of ep, two sums

    def wrong(mesh: SimulatedMesh) -> Any:
        with token_counts([1, 1]):
            return MoERunner(config, weights, mesh=Parallel(mesh, dispatch="all_gather"))(x)

    with pytest.raises(StageError, match="token_counts says 1"):
        simulate(wrong, ep=2)
    with pytest.raises(InputError, match="at least 0"), token_counts([-1]):
        pass


class Ring:
    """A backend of its own dispatch: every rank computes its part of all tokens, gathered by its own means."""

    name = "ring"

    @hookimpl
    def moe_backend_info(self) -> BackendInfo:
        return BackendInfo(name="ring", stages=("experts", "dispatch", "combine"), priority=1)

    @hookimpl
    def moe_probe(self) -> Verdict:
        return Verdict.yes()

    @hookimpl
    def moe_experts(self, plan: Plan, hidden_states: Tensor, routing: Any) -> ExpertsOut:
        return reference.moe_experts(plan, hidden_states, routing)

    @hookimpl
    def moe_dispatch(self, plan: Plan, hidden_states: Tensor, routing: Any) -> Any:
        assert plan.parallel.comms["ep"].size == 2
        way = plan.parallel.exchange.dispatch(plan, hidden_states, routing)
        half = way.hidden_states.shape[0] // 2
        for part in (slice(0, half), slice(half, None)):  # in several parts, as a dispatch may
            local = type(routing)(way.routing.topk_weights[part], way.routing.topk_ids[part])
            yield Dispatched(way.hidden_states[part], local, (way, part))

    @hookimpl
    def moe_combine(self, plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> Any:
        way, part = dispatched.handle
        if part.start == 0:
            self.first = experts_out
            return None
        both = ExpertsOut(torch.cat([self.first.value, experts_out.value]), experts_out.reduced)
        return plan.parallel.exchange.combine(plan, both, way)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::moe_core.runner.FallbackWarning")
def test_a_backend_may_dispatch_in_its_own_way() -> None:
    config = config_of(**SHARED)
    weights, x = random_weights(config), torch.randn(7, 32)
    each, rings = parts(x, [5, 2]), [Ring(), Ring()]

    class Both(Ring):
        @hookimpl
        def moe_combine(self, plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> Any:
            return rings[plan.parallel.comms["ep"].rank].moe_combine(plan, experts_out, dispatched)

    plugins.register(Both(), "ring")
    try:
        found = spread(config, weights, lambda mesh: each[mesh.rank], {"ep": 2}, runner={"backend": "ring"})
        stages = simulate(lambda mesh: MoERunner(config, weights, backend="reference", mesh=mesh).report.stages, ep=2)
    finally:
        plugins.unregister("ring")
    assert_near(torch.cat(found), whole(config, weights, x))
    assert stages[0]["dispatch"] == stages[0]["combine"] == "reference"


@torch.no_grad()
def test_ranks_that_bind_different_layers_all_hear_of_it() -> None:
    heard: list[str] = []

    def bind(mesh: SimulatedMesh) -> None:
        config = config_of(top_k=2 if mesh.rank == 3 else 4)
        with pytest.raises(ParallelError, match=r"config.top_k differ") as caught:
            MoERunner(config, random_weights(config), mesh=mesh)
        heard.append(str(caught.value))

    simulate(bind, ep=2, tp=2)
    assert len(heard) == 4 and sum("rank 1 has 2" in text for text in heard) >= 2


@torch.no_grad()
def test_a_rank_that_ends_or_fails_is_an_error_and_no_hang() -> None:
    config = config_of()
    weights = random_weights(config)

    def lose(mesh: SimulatedMesh) -> str:
        runner = MoERunner(config, weights, mesh=Parallel(mesh, dispatch="all_to_all"))
        if mesh.rank == 2:
            return "left"
        with pytest.raises(ParallelError, match="ranks"):
            runner(torch.randn(4, 32))
        return "heard"

    assert sorted(simulate(lose, ep=3)) == ["heard", "heard", "left"]
    with pytest.raises(ParallelError, match="different transfers at once"):
        simulate(
            lambda mesh: (
                mesh.comms["tp"].all_reduce(torch.ones(1))
                if mesh.rank
                else mesh.comms["tp"].start_all_gather(torch.ones(1))
            ),
            tp=2,
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", [{}, {"expert_bias": True}], ids=["plain", "biases"])
def test_a_plan_moves_experts_and_no_output(kind: dict[str, Any]) -> None:
    config = config_of(**SHARED, **kind)
    weights, x = random_weights(config), torch.randn(40, 32)
    each, wanted = parts(x, [11, 0, 20, 9]), whole(config, weights, x)

    def run(mesh: SimulatedMesh) -> list[Tensor]:
        runner = MoERunner(config, weights, mesh=mesh)
        with runner.recording() as record:
            outs = [runner(each[mesh.rank])]
        load = measured_load(runner, record.tokens_per_expert)
        assert sum(load) == 40 * 4
        for plan in (plan_placement(load, 4, redundant=5), Placement.round_robin(16, 4)):
            apply_placement(runner, plan)
            assert runner.bound(False).config.num_local_experts == len(plan.slots[mesh.rank])
            outs.append(runner(each[mesh.rank]))
        return outs

    for outs in zip(*simulate(run, ep=4), strict=True):
        assert_near(torch.cat(outs), wanted)


@torch.no_grad()
def test_a_change_of_the_weights_is_seen() -> None:
    config = config_of()
    weights, x = random_weights(config), torch.randn(6, 32)
    after = random_weights(config, seed=1)

    def run(mesh: SimulatedMesh) -> Tensor:
        mine = random_weights(config)
        runner = MoERunner(config, mine, mesh=mesh)
        runner(x)
        for name, tensor in mine.named_tensors():
            tensor.copy_(getattr(after, name))
        return runner(x)

    for found in simulate(run, ep=2, tp=2):
        assert_near(found, whole(config, after, x))
    assert weights is not after


@pytest.mark.parametrize(
    ("fields", "axes", "options", "error", "text"),
    [
        ({"intermediate_size": 3}, {"tp": 4}, {}, ConfigError, "intermediate_size=3"),
        ({"post_expert_norm_eps": 1e-6}, {"tp": 2}, {}, ConfigError, "post_expert_norm_eps"),
        ({"reduce_results": False}, {"tp": 2}, {"sequence_parallel": True}, ConfigError, "reduce_results=False"),
        ({}, {"ep": 2}, {"placement": Placement.linear(16, 4)}, ConfigError, "16 experts on 2"),
        ({}, {"ep": 2}, {"placement": Placement.linear(8, 2)}, ConfigError, "placement of 8"),
        ({}, {"cp": 2}, {}, InputError, "'cp'"),
        ({}, {"ep": 2}, {"tokens": "some"}, InputError, "tokens='some'"),
        ({}, {"ep": 2}, {"dispatch": "by hand"}, InputError, "dispatch='by hand'"),
        ({}, {"ep": 2}, {"timeout": 0.0}, InputError, "timeout"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_spread_is_refused(fields, axes, options, error, text) -> None:
    config = config_of(**fields)
    weights = random_weights(config)
    with pytest.raises(error, match=text):
        simulate(lambda mesh: MoERunner(config, weights, mesh=Parallel(mesh, **options)), **axes)


def test_a_mesh_needs_names_and_weights_fit_a_part_or_the_whole() -> None:
    config = config_of()
    with pytest.raises(InputError, match="named dimensions"):
        MoERunner(config, random_weights(config), mesh=object())
    weights = random_weights(config)
    weights.w2_weight = weights.w2_weight[:, :, :5]
    with torch.no_grad(), pytest.raises(WeightsError, match="5 columns"):
        simulate(lambda mesh: MoERunner(config, weights, mesh=mesh), tp=2)
    weights.w13_weight = weights.w13_weight[:3]
    with torch.no_grad(), pytest.raises(WeightsError, match="3 experts"):
        simulate(lambda mesh: MoERunner(config, weights, mesh=mesh), ep=2)
    with pytest.raises(InputError, match="at least 1 rank"):
        simulate(lambda mesh: None, ep=0)


def test_gradients_are_refused_and_not_lost() -> None:
    config = config_of()
    weights = random_weights(config)
    weights.w13_weight.requires_grad_()
    with pytest.raises(GradientError, match="no_grad"):
        simulate(lambda mesh: MoERunner(config, weights, mesh=mesh)(torch.randn(3, 32)), ep=2)
