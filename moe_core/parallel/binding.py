"""A binding whose experts are spread over ranks: the same stages, with dispatch and combine around the experts.

What a call adds, in order: agree on the number of tokens where that is needed, cut into passes (as many on every rank),
gather the rows of a sequence-parallel group, and behind the stages carry out what the plan of sums left to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..binding import Binding, Modules, plain_function
from ..chunking import chunk_tokens
from ..config import MoEConfig
from ..contract import check_stage, experts_fault, output_fault, stage_failed
from ..errors import ConfigError, GradientError, StageError
from ..platform import Platform
from ..plugins import Registry
from ..report import SelectionReport
from ..statistics import Taps
from ..types import Dispatched, ExpertsOut, Pending, Plan, Routing
from ..weights import MoEWeights
from .comm import gather_ints
from .context import given_counts
from .exchange import Call, current, weighted_sum
from .mesh import Ranks
from .sums import RankGroup, gather_rows


class ParallelBinding(Binding):
    """One selection, bound to this rank's part of the weights.

    Collectives are issued from the caller's stream, in one order on all ranks; one caller at a time may use a mesh.
    """

    def __init__(
        self,
        registry: Registry,
        report: SelectionReport,
        config: MoEConfig,
        weights: MoEWeights,
        platform: Platform,
        modules: Modules,
        *,
        ranks: Ranks,
        given: MoEWeights,
        taps: Taps | None = None,
        layer: int = -1,
    ) -> None:
        if report.purpose == "training":
            raise GradientError(
                "gradients may be needed, and layers that are spread over ranks give none yet; call it under "
                "torch.no_grad(), or without mesh=",
                report,
            )
        transform = modules.routed_output_transform
        super().__init__(
            registry,
            report,
            config,
            weights,
            platform,
            modules,
            taps=taps,
            layer=layer,
            facts=ranks.facts,
            linear_transform=isinstance(transform, nn.Linear) and transform.bias is None,
        )
        if self.owns_routing and ranks.comms["ep"].size > 1:
            raise ConfigError(
                f"the experts of backend {report.backend} route by themselves, so their tokens cannot be sent to other "
                f"ranks; choose another backend, or split them over axis 'tp'"
            )
        self.ranks, self._group = ranks, RankGroup(ranks)
        self.skips_empty = False  # the other ranks may have tokens
        if modules.shared_experts is not None and self.order == "overlap":
            # A function of the caller's may hold collectives of its own, and on a second stream they would meet those
            # of other ranks in another order.
            self.order = "before"
            self._shared_at_once = self.separate_shared
        self._chunk = chunk_tokens(ranks.config, self._experts_plan.dtype)
        self._local_experts, self._local_plan = self._experts, self._experts_plan
        if ranks.dispatches:
            self._local_plan = _without_shared(self._experts_plan)
        self._experts = self._dispatched if ranks.dispatches else self._masked
        if ranks.dispatches:
            for stage in ("dispatch", "combine"):
                function, plan = self.stages[stage]
                self.stages[stage] = (function, dataclasses.replace(plan, parallel=ranks))
            self._dispatch, self._dispatch_plan = self.stages["dispatch"]
            self._combine, self._combine_plan = self.stages["combine"]
            self._default = report.stages["dispatch"] == report.stages["combine"] == "reference"
            self._leaving_plan = dataclasses.replace(self._local_plan, leave_sum=True)
            # No observer sees these calls: they are a part of combine.
            self._plain_reduce = plain_function(registry, report.stages["reduce"], "moe_reduce")
            self._needs_counts = self._default and ranks.exchange.needs_counts
        else:
            self._default = self._needs_counts = False
        # Who left rows of nobody's expert unwritten knows not to look at them.
        self._leaves_sum = self._default and report.stages["experts"] == report.stages["reduce"]
        self._masks = ranks.comms["ep"].size > 1 or bool(config.zero_expert_num and ranks.comms["tp"].size > 1)
        # What was given may have been copied; a change of the original has to be seen.
        self.watched = (*self.watched, *(t for _, t in given.named_tensors() if not t.is_inference()))
        self.repacked = self.repacked or bool(self.watched)
        self.versions = self._versions()

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None,
        routing: Routing | None,
        input_ids: Tensor | None,
        inplace: bool = False,
    ) -> Tensor:
        """One call: [T, H] of this rank to [T, H], whatever T the other ranks have."""
        inputs = (hidden_states, router_logits, routing, input_ids)
        if not (self._needs_counts or self.ranks.sequence_parallel or self._chunk):
            return self._pass(inputs, None, inplace)
        counts = self._counts(hidden_states.shape[0])
        if self._chunk is None or max(map(max, counts)) <= self._chunk:
            return self._pass(inputs, counts, inplace)
        out = hidden_states.new_empty(hidden_states.shape[0], self.config.hidden_size)
        for start in range(0, max(map(max, counts)), self._chunk):
            part = slice(start, start + self._chunk)
            here = [[min(max(n - start, 0), self._chunk) for n in row] for row in counts]
            out[part] = self._pass(tuple(_rows(value, part) for value in inputs), here, inplace)
        return out

    def _counts(self, tokens: int) -> list[list[int]]:
        """Tokens of each rank that has its own: by rank of "ep", then of "tp" under sequence parallelism."""
        ranks = self.ranks
        ep = ranks.comms["ep"].size if ranks.dispatches else 1
        sp = ranks.facts.sp_size
        given = given_counts(ep * sp) if ep * sp > 1 else None
        if given is not None:
            rows = [given[i * sp : (i + 1) * sp] for i in range(ep)]
            at = (ranks.comms["ep"].rank if ep > 1 else 0, ranks.comms["tp"].rank if sp > 1 else 0)
            if rows[at[0]][at[1]] != tokens:
                raise StageError(
                    f"token_counts says {rows[at[0]][at[1]]} tokens for this rank, {tokens} came; it lists the ranks "
                    f"in the order of the mesh, along 'ep' first"
                )
            return rows
        line = [tokens]
        if sp > 1:
            line = [row[0] for row in gather_ints(ranks.comms["tp"], line, ranks.device)]
        return gather_ints(ranks.comms["ep"], line, ranks.device) if ep > 1 else [line]

    def _pass(self, inputs: tuple[Any, ...], counts: list[list[int]] | None, inplace: bool) -> Tensor:
        sum_rows = self._sum_rows if self._leaves_sum else None
        call = Call(None if counts is None else [sum(row) for row in counts], sum_rows=sum_rows)
        token = current.set(call)
        try:
            return (
                self._gathered(inputs, counts, inplace)
                if self.ranks.sequence_parallel
                else self._whole(inputs, inplace)
            )
        finally:
            current.reset(token)
            for flight in call.early.values():  # after an error: what was started must not outlive its memory
                if flight is not None:
                    flight.wait()

    def _gathered(self, inputs: tuple[Any, ...], counts: list[list[int]] | None, inplace: bool) -> Tensor:
        """Under sequence parallelism: the stages see the rows of the whole group, the shared experts this rank's."""
        assert counts is not None
        tp = self.ranks.comms["tp"]
        line = counts[self.ranks.comms["ep"].rank if self.ranks.dispatches else 0]
        rows = tuple(_each(value, lambda tensor: gather_rows(tp, tensor, line)) for value in inputs)
        view = object.__new__(_InSequence)
        view.__dict__.update(self.__dict__)
        view.own, view._group = inputs[0], RankGroup(self.ranks, line)
        view._shared_at_once = False
        view._experts = view._dispatched if self.ranks.dispatches else view._masked
        return view._whole(rows, inplace)

    def _whole(self, inputs: tuple[Any, ...], inplace: bool) -> Tensor:
        hidden_states, router_logits, routing, input_ids = inputs
        call = current.get()
        early = self._default and self.modules.routed_input_transform is None and not self.mutates_input
        if early and call is not None:
            self.ranks.exchange.begin(call, hidden_states)
        out = super().forward(hidden_states, router_logits, routing, input_ids, inplace)
        if self._joins_in_reduce and self.reduction.total is not None:
            out = self._group.reduce(out, self.reduction.total)
        return out

    def _masked(self, plan: Plan, hidden_states: Tensor, routing: Routing | None, router_logits: Tensor | None) -> Any:
        """The experts of this rank on tokens that every rank has: others' experts become -1."""
        if routing is None or not self._masks:
            return self._local_experts(plan, hidden_states, routing, router_logits)
        places, ep = self.ranks.places, self.ranks.comms["ep"]
        ids = places.local(places.of(routing.topk_ids), ep.rank, self.ranks.zero_experts_here())
        local = Routing(routing.topk_weights, ids)
        found = self._local_experts(plan, hidden_states, local, router_logits)
        if not isinstance(found, ExpertsOut) or found.reduced:
            return found
        return ExpertsOut(weighted_sum(self.config, found, local), True)

    def _dispatched(
        self, plan: Plan, hidden_states: Tensor, routing: Routing | None, router_logits: Tensor | None
    ) -> ExpertsOut:
        """Dispatch, the experts of this rank, combine; a dispatch may bring its rows in several parts."""
        assert routing is not None
        try:
            arriving = self._dispatch(self._dispatch_plan, hidden_states, routing)
        except BaseException as error:
            stage_failed("dispatch", self.report.stages, error)
        call = current.get()
        combined: Any = None
        for dispatched in _parts(arriving, self.report.stages):
            tokens = dispatched.hidden_states.shape[0]
            local = self._leaving_plan if call is not None and call.in_pieces else self._local_plan
            try:
                out = self._local_experts(local, dispatched.hidden_states, dispatched.routing, None)
            except BaseException as error:
                stage_failed("experts", self.report.stages, error)
            check_stage("experts", self.report.stages, experts_fault(out, tokens, self.config.top_k, self._width))
            try:
                combined = self._combine(self._combine_plan, out, dispatched)
            except BaseException as error:
                stage_failed("combine", self.report.stages, error)
        if not isinstance(combined, ExpertsOut):
            check_stage("combine", self.report.stages, f"{type(combined).__name__}, expected ExpertsOut")
        found: ExpertsOut = combined
        return found

    def _sum_rows(self, value: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
        """[N, H] from [N, K, H]: the reduce stage on some of the rows, without shared experts."""
        plan = self._reduce_plan
        if dtype is not plan.dtype:
            plan = dataclasses.replace(plan, dtype=dtype)
        try:
            out: Tensor = self._plain_reduce(plan, routing, ExpertsOut(value, False), Pending(None))
        except BaseException as error:
            stage_failed("reduce", self.report.stages, error)
        fault = output_fault(out, value.shape[0], self._width, dtype)
        check_stage("reduce", self.report.stages, fault)
        return out


class _InSequence(ParallelBinding):
    """The binding during one sequence-parallel call: its shared experts see ``own`` rows, its sums return to them."""

    own: Tensor

    def _launch_shared(self, x: Tensor, first: bool) -> Pending:
        return super()._launch_shared(self.own, first)


def _without_shared(plan: Plan) -> Plan:
    """For experts whose sums travel in the layer's dtype, so that they need not be made in another one: nothing but the
    sums of other ranks is added to them, in float32 by the combine."""
    config = plan.config
    if not config.has_shared_experts or config.quant is not None:
        return plan
    config = dataclasses.replace(
        config, shared_intermediate_size=None, shared_expert_gate=False, shared_expert_bias=None
    )
    return dataclasses.replace(plan, config=config)


def _parts(arriving: Any, served_by: Any) -> Iterator[Dispatched]:
    found: Iterable[Any] = (arriving,) if isinstance(arriving, Dispatched) else arriving
    if not isinstance(found, Iterable):
        check_stage("dispatch", served_by, f"{type(arriving).__name__}, expected Dispatched, or several")
    for part in found:
        if not isinstance(part, Dispatched):
            check_stage("dispatch", served_by, f"{type(part).__name__}, expected Dispatched, or several")
        yield part


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, Routing):
        return Routing(change(value.topk_weights), change(value.topk_ids))
    return change(value)


def _rows(value: Any, part: slice) -> Any:
    return _each(value, lambda tensor: tensor[part])
