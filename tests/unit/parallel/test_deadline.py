"""A rank that does not come, on an accelerator: the host stops waiting, says so, and ends the group."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from moe_core.errors import ParallelError
from moe_core.parallel import comm as module
from moe_core.parallel.comm import ProcessComm


def pending_comm(monkeypatch: pytest.MonkeyPatch, abort) -> ProcessComm:
    """A group whose transfers never end."""
    event = SimpleNamespace(record=lambda stream: None, query=lambda: False)
    monkeypatch.setattr(torch, "Event", lambda device: event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    comm = object.__new__(ProcessComm)
    comm.axis, comm.rank, comm.size, comm.seconds = "ep", 0, 2, 0.05
    comm.group = SimpleNamespace(abort=abort)
    return comm


def test_the_group_is_aborted_and_the_error_typed(monkeypatch) -> None:
    aborted = []
    comm = pending_comm(monkeypatch, lambda: aborted.append(True))
    with pytest.raises(ParallelError, match=r"axis 'ep' of 2 ranks failed on rank 0 .* aborted"):
        comm.read(torch.empty(2, device="meta"))
    assert aborted


def test_an_abort_that_hangs_does_not_hang_the_caller(monkeypatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.05)
    comm = pending_comm(monkeypatch, lambda: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(ParallelError):
        comm.read(torch.empty(2, device="meta"))
    assert time.monotonic() - started < 2
