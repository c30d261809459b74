"""A captured graph of the runner, replayed with other inputs, gives what eager calls give, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import toys

from moe_core import MoELayer, reference
from moe_core.types import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
ORDERS = ("overlap", "before", "after", "internal")


def tokens_of(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 32, device="cuda").to(dtype)


def capture(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of ``call`` and the tensor that its replays write."""
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@torch.no_grad()
@pytest.mark.parametrize("entry", ["python", "op"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_replay_with_changed_inputs(make_layer, bind, register, order: str, entry: str, tokens: int) -> None:
    register(toys.Toy(entry=entry))
    runner, x = bind(make_layer(), "toy", shared_experts_order=order), tokens_of(tokens)
    assert runner.report.entry == entry
    graph, out = capture(lambda: runner(x))
    for _ in range(4):
        new = tokens_of(tokens)
        want = runner(new)  # an eager call in between, on memory that the graph must not use
        x.copy_(new)
        graph.replay()
        assert torch.equal(out, want)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_four_layers_in_one_graph(make_layer, dtype: torch.dtype) -> None:
    stack = torch.nn.Sequential(*(make_layer(dtype) for _ in range(4)))
    x = tokens_of(9, dtype)
    graph, out = capture(lambda: stack(x))
    for _ in range(4):
        new = tokens_of(9, dtype)
        x.copy_(new)
        graph.replay()
        assert torch.equal(out, stack(new))


@torch.no_grad()
def test_given_routing_and_logits_are_read_at_each_replay(make_layer, bind) -> None:
    runner, x, logits = bind(make_layer()), tokens_of(5), torch.randn(5, 4, device="cuda")
    weights, ids = torch.rand(5, 2, device="cuda"), torch.randint(0, 4, (5, 2), device="cuda", dtype=torch.int32)
    by_logits, first = capture(lambda: runner(x, logits))
    by_ids, second = capture(lambda: runner(x, topk_weights=weights, topk_ids=ids))
    for _ in range(3):
        logits.normal_()
        weights.uniform_()
        ids.random_(-1, 4)  # -1 among them: nobody's
        by_logits.replay()
        by_ids.replay()
        assert torch.equal(first, runner(x, logits))
        assert torch.equal(second, runner(x, topk_weights=weights, topk_ids=ids))


@torch.no_grad()
@pytest.mark.parametrize("strided", [False, True])
def test_chunks_in_a_graph_own_their_memory(make_layer, bind, strided: bool) -> None:
    runner = bind(make_layer(), max_chunk_tokens=4)
    x = torch.randn(32, 11, device="cuda").t() if strided else tokens_of(11)
    graph, out = capture(lambda: runner(x))
    for _ in range(3):
        new = tokens_of(11)
        x.copy_(new)
        want = runner(torch.randn(32, 11, device="cuda").t().copy_(new))
        graph.replay()
        assert torch.equal(out, want)


@torch.no_grad()
def test_a_graph_follows_weights_that_are_written_in_place(make_layer, bind) -> None:
    layer, x = make_layer(), tokens_of(5)
    runner = bind(layer)
    graph, out = capture(lambda: runner(x))
    for tensor in (layer.w2_weight, layer.shared_w2_weight, layer.gate_weight):
        tensor.mul_(-2)
        graph.replay()
        assert torch.equal(out, runner(x))


@torch.no_grad()
def test_a_recording_counts_replays(make_layer, bind) -> None:
    runner, x = bind(make_layer()), tokens_of(5)
    with runner.recording() as record:
        graph, _ = capture(lambda: runner(x))
    before = int(record.tokens_per_expert.sum())
    for _ in range(3):
        graph.replay()
    assert int(record.tokens_per_expert.sum()) == before + 3 * 5 * 2


@torch.no_grad()
@pytest.mark.parametrize("order", ["overlap", "before"])
def test_a_compiled_model_in_a_graph(make_layer, order: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, x = CompileCounter(), tokens_of(9)
    stack = torch.nn.Sequential(*(make_layer(shared_experts_order=order) for _ in range(4)))
    compiled = torch.compile(stack, fullgraph=True, backend=counter)
    graph, out = capture(lambda: compiled(x))
    for _ in range(3):
        new = tokens_of(9)
        x.copy_(new)
        graph.replay()
        assert torch.equal(out, stack(new))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def kernels_of(call: Callable[[], object]) -> int:
    """How many kernels and copies the device runs for one call."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


@torch.no_grad()
def test_a_captured_runner_is_its_stages_and_nothing_else(make_layer, bind) -> None:
    """So it costs nothing: the same number of kernels as four bare stage functions, eager and replayed."""
    layer, x = make_layer(), tokens_of(5)
    runner = bind(layer, shared_experts_order="before")
    bare = bare_stages(layer, x)
    assert torch.equal(runner(x), bare())
    of_runner, of_bare = kernels_of(lambda: runner(x)), kernels_of(bare)
    if not of_bare:
        pytest.skip("the profiler shows no kernels on this machine")
    assert of_runner == of_bare
    graphs = [capture(lambda: runner(x))[0], capture(bare)[0]]
    assert kernels_of(graphs[0].replay) == kernels_of(graphs[1].replay)


def bare_stages(layer: MoELayer, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The reference's four stage functions, called by hand."""
    plan = Plan(layer.config, layer.weights(), x.device, x.dtype)

    def call() -> torch.Tensor:
        shared = reference.moe_shared_experts(plan, x)
        routing = reference.moe_gate(plan, x, None, None)
        return reference.moe_reduce(plan, routing, reference.moe_experts(plan, x, routing), shared)

    return call
