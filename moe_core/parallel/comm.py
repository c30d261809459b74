"""Ranks along one axis of a mesh, and what they exchange: a thin layer over torch.distributed that cannot hang unnamed.

Every transfer is started and waited for apart, so that work can go on in between. All ranks of an axis must start the
same transfers in the same order, from one stream: that is the caller's part, and the reason why nothing here ever runs
on the side stream of the shared experts.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ParallelError, describe

TIMEOUT = 300.0
"""Seconds that a rank waits for the others if nobody says otherwise."""

GRACE = 15.0
"""Seconds by which a group's watchdog, which ends the process, waits longer than the host, which raises an error."""


class Flight:
    """A transfer that was started; ``wait()`` returns what arrived, and the current stream may read it from then on."""

    __slots__ = ("_take",)

    def __init__(self, take: Callable[[], Tensor]) -> None:
        self._take = take

    def wait(self) -> Tensor:
        """The tensor that arrived.

        Raises:
            ParallelError: a rank is gone, or did not get here in time.
        """
        return self._take()


class Comm(Protocol):
    """The ranks along one axis. Sizes are equal on all of them, or said in advance."""

    axis: str
    rank: int
    size: int

    def start_all_gather(self, tensor: Tensor) -> Flight:
        """[size, *shape] from equal shapes, in the order of the ranks."""

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Flight:
        """[sum(receive), ...] from [sum(send), ...]: ``send[r]`` rows go to rank r, ``receive[r]`` come from it."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks; the tensor that is given may be overwritten."""

    def read(self, tensor: Tensor) -> Any:
        """``tolist()`` of what other ranks had a part in.

        Raises:
            ParallelError: it is not there in time.
        """


class Alone:
    """An axis of one rank: everything is there already."""

    rank, size = 0, 1

    def __init__(self, axis: str) -> None:
        self.axis = axis

    def start_all_gather(self, tensor: Tensor) -> Flight:
        """Its own."""
        return Flight(lambda: tensor[None])

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Flight:
        """Its own."""
        return Flight(lambda: tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Its own."""
        return tensor

    def read(self, tensor: Tensor) -> Any:
        """On the host."""
        return tensor.tolist()


class ProcessComm:
    """A process group of torch.distributed.

    Args:
        group: of this rank along the axis.
        axis: its name, for messages.
        timeout: seconds that the host waits for another rank: on the CPU in every wait, on an accelerator where it has
            to know something (:meth:`read`). Other transfers are left to the group's watchdog, a little later.
    """

    def __init__(self, group: Any, axis: str, timeout: float = TIMEOUT) -> None:
        self.group, self.axis = group, axis
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.seconds = timeout
        self._timeout = datetime.timedelta(seconds=timeout)
        watchdog = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
        if watchdog is not None:
            watchdog(self._timeout + datetime.timedelta(seconds=GRACE), group)

    def start_all_gather(self, tensor: Tensor) -> Flight:
        """[size, *shape]."""
        out = tensor.new_empty((self.size, *tensor.shape))
        if not tensor.numel():
            return Flight(lambda: out)
        given = tensor.contiguous()
        # As bytes: no backend has to know the dtype of what it only moves.
        into, from_ = _bytes(out).view(-1), _bytes(given).view(-1)
        # The same function; torch renamed it in 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = self._try(lambda: gather(into, from_, group=self.group, async_op=True))
        return self._flight("all-gather", work, out, given)

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Flight:
        """Variable splits along the first dimension."""
        out = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        row = _bytes(tensor.new_empty(1, *tensor.shape[1:])).numel()
        given = tensor.contiguous()
        into, from_ = _bytes(out).view(-1), _bytes(given).view(-1)
        work = self._try(
            lambda: dist.all_to_all_single(
                into,
                from_,
                [count * row for count in receive],
                [count * row for count in send],
                group=self.group,
                async_op=True,
            )
        )
        return self._flight("all-to-all", work, out, given)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """In float32 on the CPU, in the tensor's dtype elsewhere."""
        on_host = tensor.device.type == "cpu"
        total = tensor.float().contiguous() if on_host else tensor.contiguous()
        if not total.numel():
            return tensor
        work = self._try(lambda: dist.all_reduce(total, group=self.group, async_op=True))
        return self._flight("all-reduce", work, total).wait().to(tensor.dtype)

    def read(self, tensor: Tensor) -> Any:
        """``tolist()``; where it is not there in time, the group is aborted, so that nothing waits for it any more."""
        if tensor.device.type != "cpu":
            done = torch.Event(device=tensor.device)
            done.record(torch.accelerator.current_stream(tensor.device))
            started = time.monotonic()
            while not done.query():
                waited = time.monotonic() - started
                if waited > self.seconds:
                    self._abort()
                    self._lost("transfer", RuntimeError("timed out; its process group has been aborted"))
                if waited > 1e-3:  # no more than a scheduler's tick is lost on ranks that are late anyway
                    time.sleep(1e-4)
        return tensor.tolist()

    def _abort(self) -> None:
        """End what this group's transfers left on the device; a thread of its own, because that may wait as well."""
        abort = getattr(self.group, "abort", None)
        if abort is not None:
            thread = threading.Thread(target=abort, name="moe_core abort", daemon=True)
            thread.start()
            thread.join(GRACE)

    def _flight(self, what: str, work: Any, out: Tensor, given: Tensor | None = None) -> Flight:
        held = [given]  # what is being sent lives until it has gone

        def take() -> Tensor:
            try:
                if out.device.type == "cpu":
                    work.wait(self._timeout)
                else:
                    work.wait()
            except RuntimeError as error:
                self._lost(what, error)
            held.clear()
            return out

        return Flight(take)

    def _try(self, start: Callable[[], Any]) -> Any:
        try:
            return start()
        except RuntimeError as error:
            self._lost("transfer", error)

    def _lost(self, what: str, error: RuntimeError) -> NoReturn:
        raise ParallelError(
            f"{what} over axis {self.axis!r} of {self.size} ranks failed on rank {self.rank} after at most "
            f"{self.seconds:g} s: {describe(error)}; expected every rank to take part: one has ended, hangs, or made "
            f"another call. Look for the first error among the ranks and start the job again; Parallel(timeout=) sets "
            f"the seconds"
        ) from error


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is not torch.uint8 else tensor


def gather_ints(comm: Comm, values: Sequence[int], device: torch.device) -> list[list[int]]:
    """[size][len(values)] of every rank. Waits for the device."""
    if comm.size == 1:
        return [list(values)]
    found = comm.start_all_gather(torch.tensor(list(values), dtype=torch.int64, device=device)).wait()
    return [list(map(int, row)) for row in comm.read(found)]
