"""A bound runner belongs to any number of threads, and keeps nothing of a call."""

from __future__ import annotations

import dataclasses
import gc
import random
import resource
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toys

from moe_core import ExpertsOut, MoEConfig, MoELayer, MoERunner, Pending, Routing, backends, hookimpl, ops

USABLE = [status.name for status in backends() if status.status == "ok" and "cpu" in status.device_types]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(i)`` in ``count`` threads that start together; the first failure is raised."""
    barrier, failures = threading.Barrier(count), []

    def run(i: int) -> None:
        try:
            barrier.wait()
            with torch.no_grad():
                work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("options", [{}, {"max_chunk_tokens": 5}], ids=["whole", "chunked"])
def test_eight_threads_get_what_one_gets(bind, backend: str, options: dict) -> None:
    runner = bind(backend, **options)
    inputs = [torch.randn(32, 1 + i % 13).t() for i in range(8 * 12)]
    want = [runner(x) for x in inputs]

    def work(i: int) -> None:
        for x, y in list(zip(inputs, want, strict=True))[i::8]:
            assert torch.equal(runner(x), y)

    in_threads(8, work)


def test_eight_threads_that_find_no_binding_bind_once(register) -> None:
    prepared: list[int] = []

    class Preparing(toys.Toy):
        name = "preparing"

        @hookimpl
        def moe_prepare(self, weights):
            prepared.append(1)
            return dataclasses.replace(weights)

    register(Preparing())
    layer, x = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)), torch.randn(5, 32)
    with torch.no_grad():
        runner = MoERunner(layer.config, layer.weights(), backend="preparing")
        want = runner(x)
        layer.w2_weight.neg_()
        layer.w2_weight.neg_()  # the same values, and a new version: every thread finds the binding stale
    prepared.clear()
    in_threads(8, lambda i: torch.testing.assert_close(runner(x), want))
    assert len(prepared) == 1


@torch.no_grad()
def test_records_of_eight_threads_lose_nothing(bind) -> None:
    runner, x = bind(), torch.randn(5, 32)
    with runner.recording(ids=True) as record:
        in_threads(8, lambda i: [runner(x) for _ in range(20)])
    assert int(record.tokens_per_expert.sum()) == 8 * 20 * 5 * 2
    assert len(record.routed_experts) == 160


def resident() -> int:
    """Bytes of this process in memory now, or at most so far where the system does not say."""
    gc.collect()
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Light(toys.Toy):
    """Allocates what a backend would and computes next to nothing, so that ten thousand calls take a second."""

    name = "light"

    @hookimpl
    def moe_gate(self, plan, hidden_states):
        shape = (len(hidden_states), plan.config.top_k)
        return Routing(hidden_states.new_ones(shape), hidden_states.new_zeros(shape, dtype=torch.int32))

    @hookimpl
    def moe_shared_experts(self, plan, hidden_states):
        return Pending(hidden_states * 2)

    @hookimpl
    def moe_experts(self, plan, hidden_states):
        return ExpertsOut(hidden_states * 3, True)

    @hookimpl
    def moe_reduce(self, plan, experts_out, shared):
        return experts_out.value + shared.result()


@torch.no_grad()
def test_ten_thousand_calls_of_any_size_leak_nothing(register) -> None:
    """Every tenth through the reference's stages, every seventh in chunks, every fifth through the op."""
    register(Light())
    config = MoEConfig(8, 4, 2, 1, shared_intermediate_size=4)
    weights, rng, memory = MoELayer(config).weights(), random.Random(0), torch.randn(512, 8)
    chunking = dataclasses.replace(config, max_chunk_tokens=300)
    light, whole = (MoERunner(config, weights, backend=name) for name in ("light", "reference"))
    chunked = MoERunner(chunking, weights, backend="light")

    def calls(count: int) -> None:
        for i in range(count):
            runner = whole if i % 10 == 0 else chunked if i % 7 == 0 else light
            x = memory[: rng.randint(0, 512)]
            if i % 5 == 0:
                ops.call(runner, x, None, None, None, None)
            else:
                runner(x)

    calls(500)
    before = resident()
    calls(9_000)
    assert resident() - before < 4 * 2**20, "the process grew"
    tracemalloc.start()
    try:
        calls(100)
        grown = []
        for _ in range(3):  # a leak grows every time, what other threads keep for a moment does not
            gc.collect()
            objects = tracemalloc.get_traced_memory()[0]
            calls(400)
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - objects)
        assert min(grown) < 10_000, f"Python objects stay behind: {grown}"
    finally:
        tracemalloc.stop()
