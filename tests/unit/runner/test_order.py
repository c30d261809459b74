"""The order of a call as a trace of events, for each order of the shared experts; values do not depend on it."""

from __future__ import annotations

import pytest
import torch
import toys

from moe_core import MoEConfig, MoELayer, MoERunner, Pending, hookimpl, ops, reference, streams
from moe_core.binding import Binding
from moe_core.errors import GradientError, InputError, StageError

ORDERS = ("overlap", "before", "after", "internal")
JOINED = ["join main <- end of side", "keep for main"]
TRACES = {
    "overlap": ["fork main->side", "shared@side", "gate@main", "experts@main", "reduce@main", *JOINED],
    "before": ["shared@main", "gate@main", "experts@main", "reduce@main"],
    "after": ["gate@main", "experts@main", "reduce@main", "shared@main"],
    "internal": ["shared@main", "gate@main", "experts@main", "reduce@main"],
}


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_order_is_fork_gate_experts_reduce_join(bind, trace: list[str], order: str) -> None:
    bind(shared_experts_order=order)(torch.randn(5, 32))
    assert trace == TRACES[order]


@torch.no_grad()
def test_the_gate_comes_after_the_fork_and_before_the_join(bind, trace: list[str]) -> None:
    bind()(torch.randn(5, 32))
    gate = trace.index("gate@main")
    assert trace.index("fork main->side") < trace.index("shared@side") < gate < trace.index(JOINED[0])


@torch.no_grad()
def test_a_trace_tells_a_gate_before_the_fork(bind, trace: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that cost a decode step 6 to 8 %: launching the shared experts only once the gate is through."""
    right = Binding.forward

    def gate_first(self, hidden_states, router_logits, routing, input_ids, inplace=False):
        routing, _ = self._gating(hidden_states, router_logits, routing, input_ids)
        return right(self, hidden_states, None, routing, input_ids, inplace)

    monkeypatch.setattr(Binding, "forward", gate_first)
    bind()(torch.randn(5, 32))
    assert sorted(trace) == sorted(TRACES["overlap"])
    assert trace != TRACES["overlap"]


@torch.no_grad()
def test_overlap_ends_at_the_token_threshold(bind, trace: list[str]) -> None:
    runner = bind(shared_experts_stream_token_threshold=6)
    for tokens, order in ((1, "overlap"), (6, "overlap"), (7, "before")):
        trace.clear()
        runner(torch.randn(tokens, 32))
        assert trace == TRACES[order], tokens
    trace.clear()
    bind(shared_experts_stream_token_threshold=6, max_chunk_tokens=6)(torch.randn(12, 32))
    assert trace == 2 * TRACES["overlap"], "the threshold is about the rows that run at once"


@torch.no_grad()
def test_without_streams_overlap_runs_first(bind) -> None:
    assert not streams.has_streams(torch.device("cpu"))
    assert not streams.has_streams(torch.device("meta"))
    assert bind(shared_experts_order="overlap").bound(needs_grad=False).order == "before"


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_shared_experts_are_separate_where_the_layer_has_any(bind, trace: list[str], order: str) -> None:
    """Of the config or of the caller; without any, nothing is forked and nothing joined."""
    for options, separate in (
        ({}, True),
        ({"shared_intermediate_size": None, "shared_experts": lambda x: x}, True),
        ({"shared_intermediate_size": None}, False),
    ):
        runner = bind(shared_experts_order=order, **options)
        assert runner.bound(needs_grad=False).separate_shared is separate
        trace.clear()
        runner(torch.randn(5, 32))
        assert ("fork main->side" in trace) is (separate and order == "overlap")
    assert trace == ["gate@main", "experts@main", "reduce@main"]


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_a_failure_joins_before_it_leaves(bind, trace: list[str], order: str) -> None:
    """The caller is free to drop the input then, which the side stream may still read."""

    class Failing(toys.Toy):
        name = "failing"

        @hookimpl
        def moe_experts(self, plan, hidden_states, routing, router_logits):
            raise StageError("no")

    with pytest.raises(StageError, match="^no$"):
        bind(Failing(), shared_experts_order=order)(torch.randn(5, 32))
    expected = TRACES[order][: TRACES[order].index("experts@main") + 1]
    assert trace == expected + (JOINED if order == "overlap" else [])


@torch.no_grad()
def test_shared_experts_that_fail_aside_join_too(bind, trace: list[str]) -> None:
    def fail(x):
        raise StageError("no")

    with pytest.raises(StageError, match="^no$"):
        bind(shared_intermediate_size=None, shared_experts=fail)(torch.randn(5, 32))
    assert trace == ["fork main->side", JOINED[0]]
    assert torch.accelerator.current_stream().name == "main"


# Values.


@torch.no_grad()
@pytest.mark.parametrize("entry", ["python", "op"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_all_orders_give_the_same_bits(bind, register, entry: str, tokens: int) -> None:
    layer, x = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)), torch.randn(tokens, 32)
    want = MoERunner(layer.config, layer.weights(), backend="reference")(x)
    register(toys.Toy(entry=entry))
    for order in ORDERS:
        runner = bind("toy", layer=layer, shared_experts_order=order)
        assert runner.report.entry == entry
        assert torch.equal(runner(x), want)


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_shared_experts_never_read_what_the_routed_ones_wrote(bind, trace: list[str], order: str, inplace) -> None:
    """R(x) + S(x), never R(x) + S(R(x)); the input survives unless the caller gave it away."""
    layer, x = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)), torch.randn(5, 32)
    given, want = x.clone(), MoERunner(layer.config, layer.weights(), backend="reference")(x)
    runner = bind(toys.Mutating(), layer=layer, shared_experts_order=order, inplace=inplace)
    assert torch.equal(runner(given), want)
    assert torch.equal(given, torch.full_like(x, toys.MARK) if inplace else x)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 4])
def test_no_tokens_launch_nothing(bind, trace: list[str], chunk) -> None:
    runner = bind(max_chunk_tokens=chunk)
    compiled = torch.compile(lambda x: runner(x), fullgraph=True, backend="eager")
    for shape in ((0, 32), (2, 0, 32)):
        x = torch.empty(shape)
        for call in (runner, compiled, lambda x: ops.call(runner, x, None, None, None, None)):
            assert call(x).shape == shape
    torch._dynamo.reset()
    assert trace == []


class Seen(toys.Toy):
    """Notes where the input of each stage lies."""

    name = "seen"

    def __init__(self, **traits) -> None:
        super().__init__(**traits)
        self.pointers: dict[str, int] = {}

    @hookimpl
    def moe_shared_experts(self, plan, hidden_states):
        self.pointers["shared"] = hidden_states.data_ptr()
        return reference.moe_shared_experts(plan, hidden_states)

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing, router_logits):
        self.pointers["experts"] = hidden_states.data_ptr()
        return reference.moe_experts(plan, hidden_states, routing)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mutates", "inplace", "cloned"),
    [(False, False, set()), (False, True, set()), (True, False, {"experts"}), (True, True, {"shared"})],
)
def test_an_input_is_cloned_only_where_it_would_be_written(bind, mutates, inplace, cloned: set[str]) -> None:
    seen, x = Seen(mutates_input=mutates), torch.randn(5, 32)
    bind(seen, inplace=inplace)(x)
    assert {stage for stage, pointer in seen.pointers.items() if pointer != x.data_ptr()} == cloned


@torch.no_grad()
@pytest.mark.parametrize("transform", [torch.nn.Identity(), lambda x: x.view(-1, 32)])
def test_a_transform_that_returns_its_input_does_not_expose_it(bind, transform) -> None:
    x = torch.randn(5, 32)
    before = x.clone()
    bind(toys.Mutating(), routed_input_transform=transform)(x)
    assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_shared_experts_see_the_rows_of_the_caller(bind, order: str) -> None:
    """Neither the transformed ones nor anything but their own chunk."""
    rows: list[torch.Tensor] = []

    def shared(x):
        rows.append(x.clone())
        return x

    down, up = torch.randn(32, 16) / 6, torch.randn(16, 32) / 4
    runner = bind(
        shared_intermediate_size=None,
        moe_latent_size=16,
        shared_experts=shared,
        routed_input_transform=lambda x: x @ down,
        routed_output_transform=lambda x: x @ up,
        shared_experts_order=order,
        max_chunk_tokens=4,
    )
    x = torch.randn(11, 32)
    runner(x)
    assert [len(part) for part in rows] == [4, 4, 3]
    assert torch.equal(torch.cat(rows), x)


@torch.no_grad()
def test_router_logits_are_optional(bind, trace: list[str]) -> None:
    layer, calls = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)), []
    weight = layer.gate_weight.t()

    def gate(x):
        calls.append(len(x))
        return x @ weight

    x = torch.randn(5, 32)
    runner, with_gate = bind(layer=layer), bind(layer=layer, gate=gate)
    want = runner(x)
    torch.testing.assert_close(with_gate(x), want)
    assert calls == [5]
    torch.testing.assert_close(with_gate(x, x @ weight), want)
    assert calls == [5], "logits that came along are not computed again"
    layer.gate_weight = None
    without = bind(layer=layer)
    torch.testing.assert_close(without(x, x @ weight), want)
    with pytest.raises(InputError, match="router_logits=None"):
        without(x)


# Stages that break the order's contract.


class NeverJoins(toys.Toy):
    name = "never"

    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        return reference.moe_reduce(plan, routing, experts_out, Pending(None))


class JoinsTwice(toys.Toy):
    name = "twice"

    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        shared.result()
        return reference.moe_reduce(plan, routing, experts_out, shared)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("toy", "text"), [(NeverJoins, "without calling shared.result"), (JoinsTwice, "called twice")])
def test_shared_experts_are_added_exactly_once_or_it_is_an_error(bind, trace, toy, text: str, order: str) -> None:
    with pytest.raises(StageError, match=text):
        bind(toy(), shared_experts_order=order)(torch.randn(5, 32))
    assert trace.count("fork main->side") == trace.count(JOINED[0]), "what was forked is joined all the same"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda out: out.double(), "float64"),
        (lambda out: out[:, :31], "[5, 31]"),
        (lambda out: out[0], "[32]"),
    ],
)
@torch.no_grad()
def test_a_result_that_no_graph_would_expect_is_refused(bind, change, text: str) -> None:
    class Odd(toys.Toy):
        name = "odd"

        @hookimpl
        def moe_reduce(self, plan, routing, experts_out, shared):
            return change(reference.moe_reduce(plan, routing, experts_out, shared))

    with pytest.raises(StageError) as caught:
        bind(Odd())(torch.randn(5, 32))
    assert text in str(caught.value)


@torch.no_grad()
def test_a_result_is_contiguous_as_the_op_promises(bind) -> None:
    class Strided(toys.Toy):
        name = "strided"

        @hookimpl
        def moe_reduce(self, plan, routing, experts_out, shared):
            out = reference.moe_reduce(plan, routing, experts_out, shared)
            return out.t().contiguous().t()

    assert bind(Strided())(torch.randn(5, 32)).is_contiguous()


def test_a_forced_backend_without_backward_is_refused_before_anything_runs(bind, trace: list[str]) -> None:
    with pytest.raises(GradientError):
        bind(toys.Toy())(torch.randn(5, 32, requires_grad=True))
    assert trace == []
