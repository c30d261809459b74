"""The plan of sums over ranks: a table, and a proof on simulated ranks that every partial tensor is summed once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, Pending
from moe_core.errors import ConfigError, StageError
from moe_core.reduction import Collective, OneProcess, ParallelFacts, finish, plan_reduction
from moe_core.reference import combine_shared

PLAIN = MoEConfig(8, 8, 8, 2, moe_latent_size=4)
KEEP = MoEConfig(8, 8, 8, 2, moe_latent_size=4, reduce_results=False)
TP, EP = ParallelFacts(tp_size=2), ParallelFacts(ep_size=4)
TP_ALL, EP_ALL = Collective("all_reduce", ("tp",)), Collective("all_reduce", ("ep",))
BOTH_ALL = Collective("all_reduce", ("tp", "ep"))
SPLIT = ParallelFacts(tp_size=2, shared_axes=("tp",))

TABLE = {
    # name: (config, facts, options, the fields of the plan that are not empty)
    "one process": (PLAIN, None, {}, {"shared_joins": "reduce"}),
    "one process, transform": (PLAIN, None, {"output_transform": True}, {"shared_joins": "behind"}),
    "tp, shared split alike: one sum of both": (PLAIN, SPLIT, {}, {"shared_joins": "reduce", "total": TP_ALL}),
    "tp, no shared": (PLAIN, TP, {"separate_shared": False}, {"shared_joins": "reduce", "total": TP_ALL}),
    "tp, shared replicated: routed alone": (PLAIN, TP, {}, {"shared_joins": "behind", "routed_after": TP_ALL}),
    "ep without dispatch": (PLAIN, EP, {"separate_shared": False}, {"shared_joins": "reduce", "total": EP_ALL}),
    "ep, combine sums": (PLAIN, ParallelFacts(ep_size=4, combine_sums=True), {}, {"shared_joins": "reduce"}),
    "ep, combine sums, shared split: shared alone": (
        PLAIN,
        ParallelFacts(ep_size=4, combine_sums=True, shared_axes=("ep",)),
        {},
        {"shared_joins": "behind", "shared": EP_ALL},
    ),
    "tp x ep": (
        PLAIN,
        ParallelFacts(2, 4),
        {"separate_shared": False},
        {"shared_joins": "reduce", "total": BOTH_ALL},
    ),
    "tp x ep, shared split over one": (
        PLAIN,
        ParallelFacts(2, 4, shared_axes=("tp",)),
        {},
        {"shared_joins": "behind", "routed_after": BOTH_ALL, "shared": TP_ALL},
    ),
    "any transform: before it": (
        PLAIN,
        TP,
        {"output_transform": True},
        {"shared_joins": "behind", "routed_before": TP_ALL},
    ),
    "linear transform, no shared: before it, in latent width": (
        PLAIN,
        TP,
        {"output_transform": True, "linear_transform": True, "separate_shared": False},
        {"shared_joins": "behind", "routed_before": TP_ALL},
    ),
    "linear transform, shared split alike: one sum behind it": (
        PLAIN,
        SPLIT,
        {"output_transform": True, "linear_transform": True},
        {"shared_joins": "behind", "total": TP_ALL},
    ),
    "sp: rows go back to their ranks": (
        PLAIN,
        ParallelFacts(tp_size=2, sp_size=2),
        {},
        {"shared_joins": "behind", "routed_after": Collective("reduce_scatter", ("tp",))},
    ),
    "left to the caller": (KEEP, SPLIT, {}, {"shared_joins": "reduce", "open_axes": ("tp",)}),
    "left to the caller, shared replicated: one rank adds it": (
        KEEP,
        TP,
        {},
        {"shared_joins": "behind", "shared_first": ("tp",), "open_axes": ("tp",)},
    ),
    "left to the caller, but not through a transform": (
        KEEP,
        SPLIT,
        {"output_transform": True},
        {"shared_joins": "behind", "routed_before": TP_ALL, "routed_first": ("tp",), "open_axes": ("tp",)},
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_as_a_table(name: str) -> None:
    config, facts, options, expected = TABLE[name]
    plan = plan_reduction(config, facts, **{"separate_shared": True, **options})
    empty = {"expert_width": 4, "routed_before": None, "routed_after": None, "shared": None, "total": None}
    empty |= {"routed_first": (), "shared_first": (), "open_axes": ()}
    assert {field: getattr(plan, field) for field in plan.__dataclass_fields__} == {**empty, **expected}


def test_a_plan_is_a_pure_function_and_cannot_be_changed() -> None:
    first, second = (plan_reduction(PLAIN, TP, separate_shared=True) for _ in range(2))
    assert first == second
    with pytest.raises(AttributeError):
        first.total = None  # type: ignore[misc]


class Ranks:
    """All ranks of a grid at once: tensors are [tp, ep, T, H], a collective is a sum over the leading dimensions."""

    def __init__(self, facts: ParallelFacts) -> None:
        self.facts = facts
        self.seen: list[Collective] = []

    @staticmethod
    def dims(axes: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(("tp", "ep").index(axis) for axis in axes)

    def reduce(self, tensor: Tensor, collective: Collective) -> Tensor:
        self.seen.append(collective)
        total = tensor.sum(self.dims(collective.axes), keepdim=True).expand_as(tensor)
        return self.own_rows(total) if collective.kind == "reduce_scatter" else total

    def own_rows(self, tensor: Tensor) -> Tensor:
        """Each rank's part of the tokens that were gathered over all ranks."""
        tp, ep = self.facts.tp_size, self.facts.ep_size
        parts = tensor.expand(tp, ep, *tensor.shape[2:]).unflatten(2, (tp * ep, -1))
        return torch.stack([torch.stack([parts[t, e, t * ep + e] for e in range(ep)]) for t in range(tp)])

    def keep_first(self, tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
        kept = torch.zeros_like(tensor)
        index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in ("tp", "ep"))
        kept[index] = tensor[index]
        return kept

    def partial(self, whole: Tensor, axes: tuple[str, ...]) -> Tensor:
        """Random parts along ``axes`` that sum up to ``whole``, equal copies along the others."""
        sizes = [self.facts.size(axis) if axis in axes else 1 for axis in ("tp", "ep")]
        parts = torch.randn(*sizes, *whole.shape, dtype=whole.dtype)
        parts[0, 0] += whole - parts.sum((0, 1))
        return parts.expand(self.facts.tp_size, self.facts.ep_size, *whole.shape).clone()


SIZES = [(1, 1), (2, 1), (8, 1), (1, 4), (2, 2)]
SHARED = [None, (), ("tp",), ("ep",), ("tp", "ep")]
TRANSFORMS = [None, "linear", "any"]


@pytest.mark.parametrize("reduce_results", [True, False])
@pytest.mark.parametrize("combination", ["sum", "average"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_partial_tensor_is_summed_exactly_once(sizes, transform, combination, reduce_results) -> None:
    weight = torch.randn(4, 8, dtype=torch.float64)
    apply = {"linear": lambda x: x @ weight, "any": lambda x: torch.tanh(x) @ weight + 1, None: None}[transform]
    width = 4 if transform else 8
    config = MoEConfig(
        8, 8, 8, 2, shared_intermediate_size=8, shared_expert_combination=combination, reduce_results=reduce_results
    )
    for axes, combine_sums in itertools.product(SHARED, (False, True)):
        facts = ParallelFacts(*sizes, combine_sums=combine_sums, shared_axes=axes or ())
        plan = plan_reduction(
            config,
            facts,
            separate_shared=axes is not None,
            output_transform=transform is not None,
            linear_transform=transform == "linear",
        )
        ranks, tokens = Ranks(facts), 6
        routed, shared = torch.randn(tokens, width, dtype=torch.float64), torch.randn(tokens, 8, dtype=torch.float64)
        over = tuple(axis for axis in ("tp", "ep") if not (axis == "ep" and combine_sums))
        out = run(
            plan,
            ranks.partial(routed, over),
            None if axes is None else ranks.partial(shared, axes),
            config,
            apply,
            ranks,
        )
        if plan.open_axes:
            assert not reduce_results
            out = out.sum(Ranks.dims(plan.open_axes), keepdim=True).expand_as(out)
        want = combine_shared(config, apply(routed) if apply else routed, None if axes is None else shared)
        torch.testing.assert_close(out, want.expand_as(out), msg=lambda text: f"{facts}, {plan}: {text}")  # noqa: B023
        assert len(ranks.seen) <= (2 if axes else 1), "never more sums than tensors"


def run(plan, routed: Tensor, shared: Tensor | None, config: MoEConfig, transform, ranks: Ranks) -> Tensor:
    """What a binding does: shared experts join in the reduce stage, or behind it."""

    def combine(left: Tensor, right: Tensor | None) -> Tensor:
        return combine_shared(config, left, right)

    if plan.shared_joins == "behind":
        return finish(plan, routed, Pending(shared), combine, transform, ranks)
    assert transform is None
    out = combine(routed, shared)
    return out if plan.total is None else ranks.reduce(out, plan.total)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("sizes", [(2, 1), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("with_shared", [False, True])
def test_sequence_parallel_rows_return_to_their_ranks(sizes, transform, with_shared: bool) -> None:
    weight = torch.randn(4, 8, dtype=torch.float64)
    apply = {"linear": lambda x: x @ weight, "any": lambda x: torch.tanh(x) @ weight + 1, None: None}[transform]
    facts = ParallelFacts(*sizes, sp_size=sizes[0] * sizes[1])
    config = MoEConfig(8, 8, 8, 2, shared_intermediate_size=8)
    plan = plan_reduction(
        config,
        facts,
        separate_shared=with_shared,
        output_transform=transform is not None,
        linear_transform=transform == "linear",
    )
    ranks, gathered = Ranks(facts), 3 * facts.sp_size
    routed = torch.randn(gathered, 4 if transform else 8, dtype=torch.float64)
    shared = torch.randn(gathered, 8, dtype=torch.float64)
    own = ranks.own_rows(shared.expand(*sizes, *shared.shape)) if with_shared else None
    out = run(plan, ranks.partial(routed, ("tp", "ep")), own, config, apply, ranks)
    want = (apply(routed) if apply else routed) + (shared if with_shared else 0)
    torch.testing.assert_close(out, ranks.own_rows(want.expand(*sizes, *want.shape)))


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (lambda: ParallelFacts(tp_size=0), "tp_size=0"),
        (lambda: ParallelFacts(shared_axes=("dp",)), "'dp'"),
        (lambda: plan_reduction(PLAIN, ParallelFacts(tp_size=2, sp_size=4), separate_shared=True), "sp_size=4"),
        (
            lambda: plan_reduction(PLAIN, ParallelFacts(2, sp_size=2, shared_axes=("tp",)), separate_shared=True),
            "must be replicated",
        ),
        (lambda: plan_reduction(KEEP, ParallelFacts(2, sp_size=2), separate_shared=True), "reduce_results=False"),
    ],
)
def test_what_cannot_be_summed_right_is_refused(facts, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        facts()


@torch.no_grad()
def test_one_process_sums_nothing_and_says_so_if_it_should(bind) -> None:
    for options in ({}, {"shared_intermediate_size": None}):
        plan = bind(**options).bound(needs_grad=False).reduction
        assert plan.shared_joins == "reduce"
        assert (plan.routed_before, plan.routed_after, plan.shared, plan.total, plan.open_axes) == (None,) * 4 + ((),)
    with pytest.raises(StageError, match="no ranks"):
        OneProcess().reduce(torch.zeros(1), TP_ALL)
    with pytest.raises(StageError, match="no ranks"):
        OneProcess().keep_first(torch.zeros(1), ("tp",))
