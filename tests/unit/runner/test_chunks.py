"""Chunking as a memory bound: buffers are there from the bind on, and each row is computed and written once."""

from __future__ import annotations

import threading

import pytest
import torch
import toys

from moe_core import MoEConfig, MoELayer, hookimpl, reference
from moe_core.chunking import Staging
from moe_core.errors import StageError

TAILS = [0, 1, 3, 4, 5, 8, 9, 37]  # around one and two chunks of four


@torch.no_grad()
def test_buffers_are_allocated_at_bind_and_counted(bind) -> None:
    runner = bind(max_chunk_tokens=4)
    assert runner.chunk_tokens == 4
    assert runner.report.workspace_bytes["staging"] == 4 * 32 * 4
    held = [buffer for free in runner._staging._free.values() for buffer in free]
    assert [(buffer.shape, buffer.dtype, buffer.device.type) for buffer in held] == [((4, 32), torch.float32, "cpu")]
    runner(torch.randn(32, 9).t())
    again = [buffer for free in runner._staging._free.values() for buffer in free]
    assert [buffer.data_ptr() for buffer in again] == [buffer.data_ptr() for buffer in held], "leased and given back"


@torch.no_grad()
def test_without_a_budget_nothing_is_chunked_or_allocated(bind) -> None:
    runner = bind()
    assert runner.chunk_tokens is None
    assert runner.report.workspace_bytes["staging"] == 0
    assert runner._staging is None


@torch.no_grad()
def test_buffers_are_given_back_after_a_failure(bind) -> None:
    class Failing(toys.Toy):
        name = "failing"

        @hookimpl
        def moe_experts(self, plan, hidden_states, routing, router_logits):
            raise toys_error

    toys_error = ValueError("no")
    runner = bind(Failing(), max_chunk_tokens=4)
    with pytest.raises(StageError, match="ValueError: no"):
        runner(torch.randn(32, 9).t())
    assert sum(map(len, runner._staging._free.values())) == 1


def test_two_callers_at_once_never_share_a_buffer() -> None:
    staging = Staging(4, 8, torch.float32, torch.device("cpu"))
    first, second = staging.lease(), staging.lease()
    assert first.data_ptr() != second.data_ptr()
    staging.give_back(first)
    staging.give_back(second)
    assert {staging.lease().data_ptr(), staging.lease().data_ptr()} == {first.data_ptr(), second.data_ptr()}


@torch.no_grad()
@pytest.mark.parametrize("tokens", TAILS)
@pytest.mark.parametrize("strided", [False, True])
def test_each_row_is_computed_once_in_order_and_equals_the_whole(bind, tokens: int, strided: bool) -> None:
    rows: list[torch.Tensor] = []

    class Noting(toys.Toy):
        name = "noting"

        @hookimpl
        def moe_experts(self, plan, hidden_states, routing, router_logits):
            rows.append(hidden_states.clone())
            return reference.moe_experts(plan, hidden_states, routing)

    layer = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40))
    x = torch.randn(32, tokens).t() if strided else torch.randn(tokens, 32)
    want = bind(layer=layer)(x)
    out = bind(Noting(), layer=layer, max_chunk_tokens=4)(x)
    assert torch.equal(out, want)
    assert all(0 < len(part) <= 4 for part in rows)
    assert torch.equal(torch.cat([*rows, x[:0]]), x)


@torch.no_grad()
def test_a_row_of_the_result_is_written_once(bind) -> None:
    runner, x = bind(max_chunk_tokens=4), torch.randn(9, 32)
    out = runner(x)
    writes: list[tuple[int, int]] = []

    class Spy(torch.Tensor):
        """Makes results that note where they are written."""

        def new_empty(self, *shape):
            return torch.empty(*shape).as_subclass(Spy)

        def __setitem__(self, key, value):
            writes.append((key.start, key.stop))
            super().__setitem__(key, value)

    assert torch.equal(runner(x.as_subclass(Spy)), out)
    assert writes == [(0, 4), (4, 8), (8, 9)]


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
def test_chunks_may_be_written_only_where_the_caller_allows_it(bind, inplace: bool) -> None:
    layer, x = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)), torch.randn(9, 32)
    given, want = x.clone(), bind(layer=layer)(x)
    assert torch.equal(bind(toys.Mutating(), layer=layer, inplace=inplace, max_chunk_tokens=4)(given), want)
    assert torch.equal(given, torch.full_like(x, toys.MARK) if inplace else x)


@torch.no_grad()
def test_chunking_needs_no_agreement_between_callers(bind) -> None:
    """No lock step: each call cuts its own tokens, one of none cuts nothing, and they may run at once."""
    layer = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40))
    runner, whole = bind(layer=layer, max_chunk_tokens=4), bind(layer=layer)
    inputs = [torch.randn(32, tokens).t() for tokens in (5, 0, 7)]
    results: list[torch.Tensor | None] = [None] * 3

    def call(rank: int) -> None:
        with torch.no_grad():
            results[rank] = runner(inputs[rank])

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, out in zip(inputs, results, strict=True):
        assert torch.equal(out, whole(x))
