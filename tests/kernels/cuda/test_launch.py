"""Launches by the short way: when it is taken, and that a GPU's results do not show which it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from moe_cuda import launch
from moe_cuda.kernels.combine import combine_rows, combine_rows_torch


class Kernel:
    """What :class:`launch.Kernel` needs of a compiled one: counts launches of both ways."""

    pre_run_hooks: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.own: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self._run = SimpleNamespace(
            launch=lambda *arguments: self.direct.append(arguments),
            launch_cooperative_grid=False,
            launch_pdl=True,
            global_scratch_size=0,
            profile_scratch_size=0,
        )
        self.function, self.packed_metadata = 77, (4, 1, 0)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Kernel:
            self.own.append(arguments)
            return self

        return run


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Tensors of the CPU count as device 0, those of ``meta`` as device 1."""
    monkeypatch.setattr(launch, "DIRECT", True)
    monkeypatch.setattr(launch, "_device_of", lambda tensor: 1 if tensor.is_meta else 0)
    monkeypatch.setattr(launch, "_current_device", lambda: 0)
    monkeypatch.setattr(launch, "_stream_of", lambda device: 5)
    return Kernel()


def test_the_short_way_is_taken_for_equal_kinds_only(pretended: Kernel) -> None:
    """Whatever Triton would compile another kernel for goes its own way first."""
    kernel = launch.Kernel(pretended, {"A": 1, "B": 2}, num_warps=2, pdl=True)
    x = torch.zeros(64)
    kinds = [
        (x, None, 3),
        (x[1:], None, 3),  # not aligned
        (x.half(), None, 3),
        (x, x, 3),
        (x, None, 1),  # a constant to Triton
        (x, None, 32),  # divisible by 16
        (x, None, 2**31 + 1),  # 64 bits
    ]
    for arguments in kinds:
        kernel((2, 1, 1), *arguments)
    assert len(pretended.own) == len(kinds) and not pretended.direct
    for arguments in kinds:
        kernel((2, 3, 1), *arguments)
    assert len(pretended.own) == len(kinds) and len(pretended.direct) == len(kinds)
    beside = (False, True, None, None, (4, 1, 0), None, None, None)
    assert pretended.direct[0] == (2, 3, 1, 5, 77, *beside, x.data_ptr(), None, 3, None, None)


def test_triton_launches_what_is_out_of_the_ordinary(pretended: Kernel) -> None:
    """A tensor elsewhere, which Triton refuses; a profiler; scratch memory; another kind of value."""
    kernel = launch.Kernel(pretended, {})
    x, elsewhere = torch.zeros(4), torch.zeros(4, device="meta")
    for _ in range(2):
        kernel((1, 1, 1), x, elsewhere)
        kernel((1, 1, 1), x, 1.5)
    hooks, watch = triton.knobs.runtime.launch_enter_hook, print
    kernel((1, 1, 1), x)
    hooks.add(watch)
    kernel((1, 1, 1), x)
    hooks.remove(watch)
    assert len(pretended.own) == 6 and not pretended.direct
    pretended._run.global_scratch_size = 8
    kernel((1, 1, 1), x, x)
    kernel((1, 1, 1), x, x)
    assert len(pretended.own) == 8 and not pretended.direct
    kernel((1, 1, 1), x)
    assert len(pretended.direct) == 1


def test_what_is_derived_from_an_object_goes_with_it() -> None:
    class Owner:
        pass

    memo, owner = launch.Memo(), Owner()
    memo(owner)["key"] = 1
    assert memo(owner) == {"key": 1} and memo(Owner()) == {}
    del owner
    assert not memo._of


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the short way is for a CUDA device")
def test_both_ways_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned and not, in and out of a graph, on a stream of its own, on the last device."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    store = torch.randn(2 * 6 * 64 + 1, device=device)
    for first in (0, 1, 0, 1):
        part = store[first : first + 2 * 6 * 64].view(6, 2, 64)
        weights = torch.rand(6, 2, device=device)
        ids = torch.zeros(6, 2, dtype=torch.int32, device=device)
        out = torch.empty(6, 64, device=device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            combine_rows(part, ids, weights, out)
        stream.synchronize()
        torch.testing.assert_close(out, combine_rows_torch(part, ids, weights, torch.empty_like(out)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        combine_rows(part, ids, weights, out)
    expected = out.clone()
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize(device)
    assert torch.equal(out, expected)
