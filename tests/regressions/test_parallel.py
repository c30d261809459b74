"""Layers on several ranks: what is exchanged, in which order, and what is summed exactly once; ranks are simulated."""

from __future__ import annotations

import itertools
from typing import Any

import dense
import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoERunner, MoEWeights
from moe_core.parallel import Parallel, Placement, SimulatedMesh, shard_weights, simulate
from moe_core.testing import SIZES, random_weights

SHARED = {"shared_intermediate_size": 40, "shared_expert_gate": True}


def config_of(**fields: object) -> MoEConfig:
    return MoEConfig(**{**SIZES, **fields})


def on_ranks(
    backend: str, config: MoEConfig, weights: MoEWeights, rows: Any, axes: dict[str, int], **options: Any
) -> tuple[list[Tensor], list[list[tuple[str, str]]]]:
    """Each rank's result, and the transfers that it made, in order. ``rows(mesh)`` are a rank's."""
    runner = {key: options.pop(key) for key in list(options) if key.startswith(("shared_experts", "routed_"))}
    dense.bind(backend, config, weights, **runner)  # skips what this backend refuses
    logs: list[Any] = []

    def rank(mesh: SimulatedMesh) -> Tensor:
        bound = MoERunner(config, weights, backend=backend, mesh=Parallel(mesh, **options), **runner)
        if not logs:
            logs.append(mesh.world.log)
        mesh.world.log[mesh.rank].clear()
        return bound(rows(mesh))

    found = simulate(rank, **axes)
    return found, [[(axis, what) for axis, what, _ in log] for log in logs[0]]


@torch.no_grad()
@pytest.mark.parametrize("order", ["overlap", "before", "after", "internal"])
def test_regression_05_collectives_have_one_order_on_all_ranks(backend: str, order: str) -> None:
    """Ranks issued their collectives from two streams, met in different orders, and hung."""
    config = config_of(**SHARED, shared_experts_order=order, max_chunk_tokens=4)
    counts = [5, 0, 7, 1]
    x = torch.randn(sum(counts), 32).split(counts)
    weights = random_weights(config)
    for axes, options in (
        ({"ep": 4}, {"dispatch": "all_to_all"}),
        ({"ep": 4}, {"dispatch": "all_gather"}),
        ({"ep": 2, "tp": 2}, {"sequence_parallel": True}),
    ):
        _, logs = on_ranks(backend, config, weights, lambda mesh: x[mesh.rank], axes, **options)
        assert logs[0] and all(log == logs[0] for log in logs)


@torch.no_grad()
def test_regression_05_shared_experts_of_a_caller_stay_on_its_stream(backend: str) -> None:
    """A module with collectives of its own ran on the side stream, beside those of the layer."""
    config = config_of()
    dense.bind(backend, config)

    def order(mesh: SimulatedMesh) -> str:
        runner = MoERunner(config, random_weights(config), backend=backend, mesh=mesh, shared_experts=lambda x: x)
        return runner.bound(False).order

    assert simulate(order, ep=2) == ["before"] * 2


@torch.no_grad()
@pytest.mark.parametrize("options", [{"dispatch": "all_to_all"}, {"dispatch": "all_gather"}], ids=str)
def test_regression_06_shared_experts_see_the_rows_of_their_own_rank(backend: str, options: dict[str, Any]) -> None:
    """Behind a dispatch, shared experts ran on the rows that had arrived instead of those that belong to the rank."""
    config, counts = config_of(), [5, 0, 7, 1]
    weights, x = random_weights(config), torch.randn(13, 32)
    each = x.split(counts)
    for axes, more in (({"ep": 4}, options), ({"tp": 4}, {"sequence_parallel": True})):
        seen: list[Tensor] = []
        found, _ = on_ranks(
            backend,
            config,
            weights,
            lambda mesh: each[mesh.rank],
            axes,
            shared_experts=lambda rows, seen=seen: seen.append(rows) or 2 * rows,
            **more,
        )
        assert sorted(rows.shape[0] for rows in seen) == sorted(counts)
        assert all(any(torch.equal(rows, own) for own in each) for rows in seen)
        dense.assert_near(torch.cat(found), dense.layer(config, weights, x) + 2 * x.double())


@torch.no_grad()
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_regression_07_ranks_without_tokens_enter_every_collective(backend: str, dispatch: str) -> None:
    """A rank without tokens returned early, and the others waited for it for ever."""
    config = config_of(**SHARED)
    weights = random_weights(config)
    for counts in ([0, 0, 0], [0, 3, 0]):
        x = torch.randn(sum(counts), 32).split(counts)
        found, logs = on_ranks(backend, config, weights, lambda mesh, x=x: x[mesh.rank], {"ep": 3}, dispatch=dispatch)
        assert [out.shape for out in found] == [(count, 32) for count in counts]
        assert logs[0] and all(log == logs[0] for log in logs)
        dense.assert_near(torch.cat(found), dense.layer(config, weights, torch.cat(x)))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 7])
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_regression_08_unequal_counts_make_equal_passes(backend: str, dispatch: str, chunk: int | None) -> None:
    """Each rank cut its own tokens into chunks, so one had more collectives than the others."""
    config = config_of(**SHARED, max_chunk_tokens=chunk)
    weights, counts = random_weights(config), [5, 0, 7]
    x = torch.randn(12, 32)
    each = x.split(counts)
    found, logs = on_ranks(backend, config, weights, lambda mesh: each[mesh.rank], {"ep": 3}, dispatch=dispatch)
    assert all(log == logs[0] for log in logs)
    passes = sum(what == "all_to_all" for _, what in logs[0])
    assert passes == (1 if dispatch == "all_gather" else 4) * (1 if chunk is None else -(-7 // chunk))
    dense.assert_near(torch.cat(found), dense.layer(config, weights, x))


@torch.no_grad()
def test_regression_08_chunks_of_a_tensor_parallel_layer_need_no_agreement(backend: str) -> None:
    """Ranks with the same tokens asked each other how many there are, in every call."""
    config = config_of(**SHARED, max_chunk_tokens=4)
    weights, x = random_weights(config), torch.randn(9, 32)
    found, logs = on_ranks(backend, config, weights, lambda mesh: x, {"tp": 2})
    assert logs == [[("tp", "all_reduce")] * 3] * 2
    for out in found:
        dense.assert_near(out, dense.layer(config, weights, x))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"dispatch": "all_to_all"}, {"dispatch": "all_gather"}, {"tokens": "replicated"}])
def test_regression_21_any_placement_sums_to_the_whole(backend: str, options: dict[str, Any]) -> None:
    """Ids of other ranks' experts read rows that nobody had written; a rank without experts divided by zero."""
    config = config_of(**SHARED, num_experts=16)
    weights, x = random_weights(config), torch.randn(12, 32)
    cold = 3
    weights.gate_weight[cold] = 0.0
    weights.gate_weight[cold, 0] = -1e3
    x[:, 0] = x[:, 0].abs() + 1
    weights.w13_weight[cold] = float("nan")
    wanted = dense.layer(config, weights, x)
    each = x.split([4, 8, 0])
    replicated = options.get("tokens") == "replicated"
    for slots in (
        [range(16), [], []],
        [[], range(0, 16, 2), range(1, 16, 2)],
        [[9, 3, 4], [1, 0, 15, 2, 5, 6, 7, 8], [10, 11, 12, 13, 14]],
        [[9, 3, 4, 0, 1], [1, 0, 15, 2, 5, 6, 7, 8], [0, 10, 11, 12, 13, 14, 9]],
    ):
        placement = Placement(16, tuple(map(tuple, slots)))

        def rows(mesh: SimulatedMesh) -> Tensor:
            return x if replicated else each[mesh.rank]

        found, _ = on_ranks(backend, config, weights, rows, {"ep": 3}, placement=placement, **options)
        for out, own in zip(found, [wanted] * 3 if replicated else wanted.split([4, 8, 0]), strict=True):
            dense.assert_near(out, own)


@torch.no_grad()
@pytest.mark.parametrize("form", ["packed", "interleaved", "not gated"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_regression_24_shards_hold_gate_and_up_rows_of_the_same_columns(backend: str, form: str, ranks: int) -> None:
    """A shard of the packed rows had all of gate and nothing of up; biases were added once a rank."""
    fields = {"packed": {}, "interleaved": {"w13_interleaved": True}, "not gated": {"gated": False}}[form]
    config = config_of(**SHARED, **fields, expert_bias=True, shared_expert_bias=True, intermediate_size=26)
    weights, x = random_weights(config), torch.randn(9, 32)
    wanted = dense.layer(config, weights, x)
    dense.bind(backend, config, weights)

    def both(mesh: SimulatedMesh) -> tuple[Tensor, Tensor]:
        whole = MoERunner(config, weights, backend=backend, mesh=mesh)
        part = shard_weights(config, weights, whole.parallel)
        return whole(x), MoERunner(config, part, backend=backend, mesh=mesh)(x)

    for given_whole, given_part in simulate(both, tp=ranks):
        dense.assert_near(given_whole, wanted)
        assert torch.equal(given_whole, given_part)


LATENT = {"none": {}, "linear": {"moe_latent_size": 16}, "any": {"moe_latent_size": 16}}


@torch.no_grad()
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("latent", LATENT)
def test_regression_25_every_partial_sum_is_reduced_once(backend: str, latent: str, ranks: int) -> None:
    """The routed sum was reduced twice, or not at all: 7.99 times too large on eight ranks."""
    down, up = torch.nn.Linear(32, 16, bias=False), torch.nn.Linear(16, 32, bias=latent == "any")
    transforms: dict[str, Any] = {}
    if latent != "none":
        transforms = {"routed_input_transform": down, "routed_output_transform": up}
    for shared, reduce_results, sequence in itertools.product((None, 40), (True, False), (False, True)):
        if sequence and not reduce_results:
            continue  # refused
        config = config_of(**LATENT[latent], shared_intermediate_size=shared, reduce_results=reduce_results)
        weights, x = random_weights(config), torch.randn(16, 32)
        one = dense.bind(backend, config, weights, **transforms)
        each = x.split(16 // ranks)
        found, logs = on_ranks(
            backend,
            config,
            weights,
            lambda mesh, each=each, x=x, sequence=sequence: each[mesh.rank] if sequence else x,
            {"tp": ranks},
            sequence_parallel=sequence,
            **transforms,
        )
        sums = [what for _, what in logs[0] if what in ("all_reduce", "all_to_all")]
        # A transform that is not linear needs the whole routed sum; what shared experts add is then a sum of its own.
        assert len(sums) <= (2 if shared and latent == "any" else 1)
        wanted = one(x).double()
        if not reduce_results:
            assert len(sums) == (latent == "any")
            if latent != "any" or shared:  # left to the caller: what the ranks hold adds up to the whole
                found = [torch.stack(found).sum(0)]
        for rank, out in enumerate(found):
            dense.assert_near(out, wanted.split(16 // ranks)[rank] if sequence else wanted)


@torch.no_grad()
def test_redundant_experts_count_as_the_expert_that_they_copy(backend: str) -> None:
    """Load was counted by physical expert, so that a copied expert seemed to be used less with every plan."""
    config = config_of()
    weights, x = random_weights(config), torch.randn(12, 32)
    ids = torch.randint(0, 16, (12, 4)).int()
    placement = Placement(16, (tuple(range(10)), (0, 1, *range(8, 16))))
    dense.bind(backend, config, weights)

    def counts(mesh: SimulatedMesh) -> list[int]:
        runner = MoERunner(config, weights, backend=backend, mesh=Parallel(mesh, placement=placement))
        with runner.recording() as record:
            runner(x, topk_weights=torch.rand(12, 4), topk_ids=ids)
        return record.tokens_per_expert.tolist()

    wanted = torch.bincount(ids.flatten().long(), minlength=16).tolist()
    assert simulate(counts, ep=2) == [wanted, wanted]
