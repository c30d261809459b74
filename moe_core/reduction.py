"""What is summed over ranks, where, and exactly once: a pure function from facts to a plan.

A tensor is partial over an axis where its true value is the sum of what the ranks along that axis hold. The routed
experts are partial over "tp" (each rank has a part of every expert) and over "ep" (each rank has some of the experts),
unless the combine stage has summed already; the shared experts are partial over the axes that split them. Summing a
partial tensor twice, or a complete one once, is off by the number of ranks; so is adding a complete tensor to one that
the caller will still sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from .config import MoEConfig
from .errors import ConfigError, StageError
from .types import Pending

AXES = ("tp", "ep")


class Collective(NamedTuple):
    """One sum over all ranks along ``axes``; ``reduce_scatter`` leaves each rank the rows of its own tokens."""

    kind: Literal["all_reduce", "reduce_scatter"]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class ParallelFacts:
    """How one layer is spread over ranks; the defaults are one process.

    Args:
        tp_size: ranks that split the intermediate size of every routed expert among them.
        ep_size: ranks that hold different experts.
        sp_size: ranks that split the tokens of a sequence among them and gather them before the experts.
        combine_sums: the combine stage brings complete rows back over "ep", as an all-to-all does.
        shared_axes: axes that split the intermediate size of the shared experts; none where they are replicated.

    Raises:
        ConfigError: a size below 1, or an axis that does not exist.
    """

    tp_size: int = 1
    ep_size: int = 1
    sp_size: int = 1
    combine_sums: bool = False
    shared_axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("tp_size", "ep_size", "sp_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: expected at least 1; 1 is no parallelism")
        unknown = [axis for axis in self.shared_axes if axis not in AXES]
        if unknown:
            raise ConfigError(f"shared_axes={self.shared_axes!r}: unknown {unknown[0]!r}; known: {', '.join(AXES)}")

    def size(self, axis: str) -> int:
        """Ranks along one axis."""
        return self.tp_size if axis == "tp" else self.ep_size


@dataclass(frozen=True)
class ReductionPlan:
    """Where each tensor of one layer is summed; None is nowhere.

    Args:
        expert_width: width of the routed experts' output; a kernel's padding behind it is cut off.
        shared_joins: ``reduce`` where the reduce stage adds the shared experts, ``behind`` where something has to
            happen to the routed sum first (a transform, a collective of its own).
        routed_before: of the routed sum, before the output transform.
        routed_after: of the routed sum, behind the output transform (or where there is none).
        shared: of the shared experts alone.
        total: of the routed and shared sum together.
        routed_first, shared_first: axes along which only the first rank contributes, because the caller sums over
            them and the tensor is complete there.
        open_axes: what the caller still has to sum over (``reduce_results=False``).
    """

    expert_width: int
    shared_joins: Literal["reduce", "behind"]
    routed_before: Collective | None = None
    routed_after: Collective | None = None
    shared: Collective | None = None
    total: Collective | None = None
    routed_first: tuple[str, ...] = ()
    shared_first: tuple[str, ...] = ()
    open_axes: tuple[str, ...] = ()


class Group(Protocol):
    """The ranks, as :func:`finish` needs them."""

    def reduce(self, tensor: Tensor, collective: Collective) -> Tensor:
        """The sum over all ranks along the collective's axes."""

    def keep_first(self, tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
        """The tensor on the first rank along each of ``axes``, zeros on the others."""


class OneProcess:
    """No ranks: a plan for :class:`ParallelFacts` of one process never gets here."""

    def reduce(self, tensor: Tensor, collective: Collective) -> Tensor:
        """Nothing to sum over."""
        raise StageError(f"{collective}: one process has no ranks to sum over; plan it with ParallelFacts()")

    def keep_first(self, tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
        """Nothing to be first among."""
        raise StageError(f"axes {axes}: one process has no ranks; plan it with ParallelFacts()")


def plan_reduction(
    config: MoEConfig,
    facts: ParallelFacts | None = None,
    *,
    separate_shared: bool,
    output_transform: bool = False,
    linear_transform: bool = False,
) -> ReductionPlan:
    """Decide for one layer.

    Args:
        facts: None is one process.
        separate_shared: shared experts are computed beside the routed ones; False where there are none, or where the
            experts stage computes them as routed slots of its own.
        output_transform: something is applied to the routed sum before the shared experts are added.
        linear_transform: it commutes with a sum over ranks: a product without bias.
    Raises:
        ConfigError: combinations in which no tensor is what the plan would need.
    """
    facts = facts or ParallelFacts()
    split = [axis for axis in AXES if facts.size(axis) > 1]
    routed = tuple(axis for axis in split if not (axis == "ep" and facts.combine_sums))
    shared = tuple(axis for axis in split if axis in facts.shared_axes) if separate_shared else ()
    kind: Literal["all_reduce", "reduce_scatter"] = "all_reduce"
    if facts.sp_size > 1:
        kind = "reduce_scatter"
        _check_sequence_parallel(config, facts, routed, shared, separate_shared)

    def collective(axes: tuple[str, ...]) -> Collective | None:
        return Collective(kind, axes) if axes else None

    before: tuple[str, ...] = ()
    if output_transform and routed:
        # A transform that is not linear needs the full sum, whatever the caller asked. A linear one could come first;
        # latent rows are shorter to sum, unless one sum would then serve the shared experts too.
        saves_one = separate_shared and routed == shared
        if not linear_transform or (config.reduce_results and not saves_one):
            before, routed = routed, ()
    if not config.reduce_results:
        open_axes = tuple(axis for axis in AXES if axis in routed or axis in shared)
        routed_first = tuple(axis for axis in open_axes if axis not in routed)
        shared_first = tuple(axis for axis in open_axes if axis not in shared) if separate_shared else ()
        behind = output_transform or bool(routed_first or shared_first)
        return ReductionPlan(
            config.expert_hidden_size,
            "behind" if behind else "reduce",
            routed_before=collective(before),
            routed_first=routed_first,
            shared_first=shared_first,
            open_axes=open_axes,
        )
    if routed == shared or not separate_shared:
        return ReductionPlan(
            config.expert_hidden_size,
            "behind" if output_transform else "reduce",
            routed_before=collective(before),
            total=collective(routed),
        )
    return ReductionPlan(
        config.expert_hidden_size,
        "behind",
        routed_before=collective(before),
        routed_after=collective(routed),
        shared=collective(shared),
    )


def _check_sequence_parallel(
    config: MoEConfig,
    facts: ParallelFacts,
    routed: tuple[str, ...],
    shared: tuple[str, ...],
    separate_shared: bool,
) -> None:
    ranks = 1
    for axis in routed:
        ranks *= facts.size(axis)
    if routed and ranks != facts.sp_size:
        raise ConfigError(
            f"sp_size={facts.sp_size}: expected {ranks}, the ranks over which the routed experts are partial "
            f"({' x '.join(routed)}); tokens are scattered back to the ranks that they were gathered from"
        )
    if shared:
        raise ConfigError(
            f"shared_axes={facts.shared_axes!r}: expected () with sp_size={facts.sp_size}: each rank runs the shared "
            f"experts on its own tokens, so they must be replicated"
        )
    if routed and separate_shared and not config.reduce_results:
        raise ConfigError(
            f"reduce_results=False: expected True with sp_size={facts.sp_size} and shared experts: the routed sum has "
            f"the rows of all ranks and the shared experts those of one"
        )


def finish(
    plan: ReductionPlan,
    routed: Tensor,
    shared: Pending,
    combine: Callable[[Tensor, Tensor | None], Tensor],
    transform: Callable[[Tensor], Tensor] | None,
    group: Group,
) -> Tensor:
    """Carry out a plan whose shared experts join ``behind``.

    Args:
        routed: the reduce stage's sum without the shared experts.
        combine: adds the shared experts, or None.
        transform: the output transform.
    Returns:
        what ``combine`` returned, summed as planned.
    """
    if plan.routed_before is not None:
        routed = group.reduce(routed, plan.routed_before)
    if transform is not None:
        routed = transform(routed)
    if plan.routed_after is not None:
        routed = group.reduce(routed, plan.routed_after)
    if plan.routed_first:
        routed = group.keep_first(routed, plan.routed_first)
    beside = shared.result()
    if beside is not None:
        if plan.shared is not None:
            beside = group.reduce(beside, plan.shared)
        if plan.shared_first:
            beside = group.keep_first(beside, plan.shared_first)
    out = combine(routed, beside)
    return out if plan.total is None else group.reduce(out, plan.total)
