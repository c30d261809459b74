"""Fork, join and lifetimes, with one stream made slow on purpose.

Each test fails without what it is about; prove_streams.py takes fork, join, keep_alive and hold away one at a time and
shows it.
"""

from __future__ import annotations

import pytest
import torch
import toys

from moe_core import Pending, hookimpl, reference, streams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
T, H = 8, 32


@pytest.fixture
def silent(make_layer):
    """A layer without shared experts of its own, whose routed experts add nothing."""
    layer = make_layer(shared_intermediate_size=None)
    with torch.no_grad():
        layer.w2_weight.zero_()
    return layer


def side_of(x: torch.Tensor) -> torch.Stream:
    """The side stream of the stream that is current now."""
    return streams.side_stream(torch.accelerator.current_stream(x.device), x.device)


def warm_up(runner, x: torch.Tensor) -> None:
    """So that no allocation of the call that counts waits for the device."""
    for _ in range(3):
        runner(x)
    torch.cuda.synchronize()


@torch.no_grad()
def test_fork_shared_experts_wait_for_the_input(make_layer, bind, delay, still_busy) -> None:
    """The main stream is slow to write the input; the side stream, which has nothing to do, must not read it before."""
    layer, old, new = make_layer(), torch.randn(T, H, device="cuda"), torch.randn(T, H, device="cuda")
    runner, want = bind(layer), bind(layer, shared_experts_order="before")(new)
    x = old.clone()
    warm_up(runner, x)
    delay()
    x.copy_(new)
    out = runner(x)
    still_busy()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


@torch.no_grad()
def test_join_reduce_waits_for_shared_experts(silent, bind, delay, still_busy) -> None:
    """The side stream is slow; reduce must not read what the shared experts have not written yet."""

    def slow(x: torch.Tensor) -> torch.Tensor:
        delay()
        return x * 2

    x = torch.randn(T, H, device="cuda")
    runner = bind(silent, shared_experts=slow)
    warm_up(runner, -x)  # whoever reads too early finds these results
    out = runner(x)
    still_busy(side_of(x))
    torch.cuda.synchronize()
    assert torch.equal(out, x * 2)


@torch.no_grad()
def test_join_comes_before_an_error_leaves(delay, still_busy) -> None:
    """Shared experts that fail after a launch: the caller may overwrite the input as soon as it has the error."""
    values, results = torch.randn(T, H, device="cuda"), []

    def fail(x: torch.Tensor) -> Pending:
        delay()
        results.append(x * 1)
        raise ValueError("no")

    for attempt in ("warm-up", "counts"):
        x = values.clone()
        with pytest.raises(ValueError, match="^no$"):
            streams.run_aside(fail, x)
        x.fill_(toys.MARK)
        if attempt == "counts":
            still_busy(side_of(x))
        torch.cuda.synchronize()
    assert torch.equal(results[-1], values)


@torch.no_grad()
def test_keep_alive_the_result_is_not_recycled_before_it_is_read(silent, bind, delay, still_busy) -> None:
    """The main stream is slow to read what the side stream computed, while its memory is free for new work there."""
    pointers: list[int] = []

    def shared(x: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(x, 17.0)
        pointers.append(out.data_ptr())
        return out

    logits = torch.randn(T, 4, device="cuda")

    def slow_gate(x: torch.Tensor) -> torch.Tensor:
        delay()  # on the main stream, behind the fork
        return logits

    x = torch.randn(T, H, device="cuda")
    runner = bind(silent, shared_experts=shared, gate=slow_gate)
    warm_up(runner, x)
    out = runner(x)
    side = side_of(x)
    with side:
        others = [torch.full_like(x, toys.MARK) for _ in range(4)]
    side.synchronize()
    still_busy()
    torch.cuda.synchronize()
    assert (out == 17.0).all(), f"read {out.unique().tolist()}"
    assert pointers[-1] not in {other.data_ptr() for other in others}


class Scribbling(toys.Mutating):
    """Writes into its input, and over whatever memory of that size is free on its stream."""

    name = "scribbling"

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing, router_logits):
        self.others = [torch.full_like(hidden_states, toys.MARK) for _ in range(8)]
        out = reference.moe_experts(plan, hidden_states, routing)
        hidden_states.fill_(toys.MARK)
        return out


@torch.no_grad()
def test_hold_the_copy_that_shared_experts_read_lives_until_the_join(silent, bind, register, delay, still_busy) -> None:
    """In place: the routed experts overwrite the caller's tensor while the slow side stream reads a copy of it."""
    register(Scribbling())

    def slow(x: torch.Tensor) -> torch.Tensor:
        delay()
        return x * 1

    x = torch.randn(T, H, device="cuda")
    want = x.clone()
    runner = bind(silent, "scribbling", shared_experts=slow, inplace=True)
    warm_up(runner, torch.zeros_like(x))
    out = runner(x)
    still_busy()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
    assert (x == toys.MARK).all()


@torch.no_grad()
def test_hold_an_input_that_nobody_else_keeps(delay, still_busy) -> None:
    """The same one level below: only the pending result may know the input, whose memory others ask for."""
    values = torch.randn(T, H, device="cuda")

    def slow(x: torch.Tensor) -> Pending:
        delay()
        return Pending(x * 1)

    for attempt in ("warm-up", "counts"):
        pending = streams.run_aside(slow, values.clone())
        others = [torch.full_like(values, toys.MARK) for _ in range(8)]
        if attempt == "counts":
            still_busy(side_of(values))
        result = pending.result()
        torch.cuda.synchronize()
        del others
    assert torch.equal(result, values)


@torch.no_grad()
def test_the_side_stream_is_one_and_never_the_callers_own() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for main in [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(40))]:
        with torch.cuda.stream(main):
            current = torch.accelerator.current_stream(device)
            side = streams.side_stream(current, device)
            assert side.stream_id != current.stream_id
            assert streams.side_stream(current, device) is side
