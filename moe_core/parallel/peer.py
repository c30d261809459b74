"""Memory of one host's devices that the others may write into: copies between devices, and signals in stream order.

A copy engine moves the bytes, so nothing is taken from the kernels that run meanwhile; a collective's kernel needs
multiprocessors, and one that keeps a persistent kernel's program waiting delays all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import socket
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ParallelError, describe
from .comm import Comm, ProcessComm, gather_ints

ROUND = 1 << 20
"""Room for a slot is a multiple of this many bytes."""
FENCE = 0
"""The channel of signals that this module gives itself."""


class PeerMemory:
    """One buffer on each rank of a group, shared by all layers: calls follow each other in stream order.

    It has regions of a slot for each source rank. Slots of a region lie behind each other without a gap, so that the
    rows of several sources can be read as one tensor; in calls of one size a slot's place is the same.

    Args:
        comm: ranks of one host, whose devices reach each other's memory.
        regions: how many there are.
    """

    def __init__(self, comm: ProcessComm, device: torch.device, regions: int) -> None:
        self.comm, self.device = comm, device
        self._room, self._sizes = [0] * regions, (0,) * regions
        self._handle: Any = None
        self._peers: list[Tensor] = []
        self._sides: dict[tuple[int, int], torch.Stream] = {}
        self._slots: dict[tuple[Any, ...], Tensor] = {}

    def arrange(self, *sizes: int) -> None:
        """Slots of so many bytes in each region, from now on; all ranks ask for the same.

        Where they change, the device waits for all ranks to be done with the last ones; where the buffer grows, so does
        the host.

        Raises:
            ParallelError: the devices cannot share memory.
        """
        if sizes == self._sizes:
            return
        if any(size > room for size, room in zip(sizes, self._room, strict=True)):
            wanted = [max(room, -(-size // ROUND) * ROUND) for size, room in zip(sizes, self._room, strict=True)]
            if self._peers:  # nobody may still read what is given back
                torch.accelerator.synchronize(self.device)
            self._slots.clear()
            self._peers, self._handle = [], None
            with torch.inference_mode(False):
                self._peers, self._handle = self._share(sum(wanted) * self.comm.size)
            self._room = wanted
        self._sizes = sizes
        self._slots.clear()
        others = [rank for rank in range(self.comm.size) if rank != self.comm.rank]
        for rank in others:
            self.signal(rank, FENCE)
        for rank in others:
            self.wait(rank, FENCE)

    def _share(self, size: int) -> tuple[list[Tensor], Any]:
        """Every rank's buffer, and the handle of the signals."""
        try:
            import torch.distributed._symmetric_memory as symmetric

            own = symmetric.empty(size, dtype=torch.uint8, device=self.device)
            handle = symmetric.rendezvous(own, self.comm.group.group_name)
            return [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(self.comm.size)], handle
        except (RuntimeError, ImportError, AttributeError) as error:
            raise ParallelError(
                f"the devices of axis {self.comm.axis!r} cannot share {size} bytes of memory: {describe(error)}; use "
                f'Parallel(dispatch="all_gather") or "all_to_all"'
            ) from error

    def slot(self, rank: int, region: int, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What ``source`` writes into a region of ``rank``'s buffer, and behind it what the next sources do."""
        key = (rank, region, source, shape, dtype)
        found = self._slots.get(key)
        if found is None:
            count = dtype.itemsize * math.prod(shape)
            start = sum(self._room[:region]) * self.comm.size + source * self._sizes[region]
            with torch.inference_mode(False):  # later calls may write into it outside of that mode
                found = self._peers[rank][start : start + count].view(dtype).view(shape)
            self._slots[key] = found
        return found

    @contextlib.contextmanager
    def beside(self, *tensors: Tensor, lane: int = 0) -> Iterator[None]:
        """What is queued inside runs beside the current stream, behind what is there now, and beside other lanes.

        It may use ``tensors`` after the caller has dropped them; others live until :meth:`join`.
        """
        main, side = self._lane(lane)
        side.wait_stream(main)
        with side:
            yield
        for tensor in tensors:
            tensor.record_stream(side)

    def join(self, lane: int = 0) -> None:
        """The current stream goes on when what is beside it in that lane is done."""
        main, side = self._lane(lane)
        main.wait_stream(side)

    def _lane(self, lane: int) -> tuple[torch.Stream, torch.Stream]:
        main = torch.accelerator.current_stream(self.device)
        side = self._sides.get((main.stream_id, lane))
        if side is None:
            # A signal is a kernel, and must not queue behind the programs of those that run meanwhile.
            side = torch.Stream(device=self.device, priority=-1)
            side = self._sides.setdefault((main.stream_id, lane), side)
        return main, side

    def signal(self, rank: int, channel: int) -> None:
        """Tell a rank that everything queued on this stream so far is done."""
        self._handle.put_signal(rank, channel, self._milliseconds)

    def wait(self, rank: int, channel: int) -> None:
        """The current stream goes on when that rank has signalled."""
        self._handle.wait_signal(rank, channel, self._milliseconds)

    @property
    def _milliseconds(self) -> int:
        return int(self.comm.seconds * 1000)


def within_reach(comm: Comm, device: torch.device) -> bool:
    """Whether all ranks are on one host, on devices of their own that share memory; the same on all ranks, found once.

    Every rank has to ask.
    """
    if not isinstance(comm, ProcessComm) or device.type == "cpu" or comm.size == 1:
        return False
    key = (comm.group.group_name, device)
    if key not in _reached or _reached[key][0] is not comm.group:  # names are given again
        _reached[key] = (comm.group, _reaches(comm, device))
    return _reached[key][1]


def _reaches(comm: ProcessComm, device: torch.device) -> bool:
    module = torch.get_device_module(device)
    reaches = getattr(module, "can_device_access_peer", None)
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7], "little")
    index = device.index if device.index is not None else module.current_device()
    rows = gather_ints(comm, [host, index], device)
    near = len({row[0] for row in rows}) == 1 and len({row[1] for row in rows}) == comm.size
    able = near and reaches is not None and all(reaches(index, row[1]) for row in rows if row[1] != index)
    if not _all(comm, able, device):
        return False
    try:  # what a driver says it can do, a container may forbid
        shared_memory(comm, device)
    except ParallelError:
        able = False
    return _all(comm, able, device)


def _all(comm: Comm, value: bool, device: torch.device) -> bool:
    return all(row[0] for row in gather_ints(comm, [int(value)], device))


REGIONS = 4
"""Of the memory that a group shares: rows, ids, weights and sums."""
_shared: dict[tuple[str, torch.device], PeerMemory] = {}
_reached: dict[tuple[str, torch.device], tuple[Any, bool]] = {}
_lock = threading.Lock()


def shared_memory(comm: ProcessComm, device: torch.device) -> PeerMemory:
    """The buffer of a group, made once.

    Raises:
        ParallelError: the devices cannot share memory.
    """
    with _lock:
        key = (comm.group.group_name, device)
        if key not in _shared or _shared[key].comm.group is not comm.group:
            memory = PeerMemory(comm, device, REGIONS)
            memory.arrange(*[ROUND] * REGIONS)
            _shared[key] = memory
        return _shared[key]
