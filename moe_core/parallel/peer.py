"""Memory of one host's devices that the others may write into: copies between devices, and signals in stream order.

A copy engine moves the bytes, so nothing is taken from the kernels that run meanwhile; a collective's kernel needs
multiprocessors, and one that keeps a persistent kernel's program waiting delays all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ParallelError, describe
from .comm import Comm, ProcessComm, gather_ints

ROUND = 1 << 20
"""A slot's size is a multiple of this many bytes."""


class PeerMemory:
    """One buffer on each rank of a group, shared by all layers: calls follow each other in stream order.

    It has regions of a slot for each source rank, and a slot's place depends on nothing but the buffer's size: slots of
    two calls that follow each other never overlap, whatever their layers and numbers of rows.

    Args:
        comm: ranks of one host, whose devices reach each other's memory.
        regions: how many there are.
    """

    def __init__(self, comm: ProcessComm, device: torch.device, regions: int) -> None:
        self.comm, self.device = comm, device
        self.slots = [0] * regions
        self._handle: Any = None
        self._peers: list[Tensor] = []
        self._sides: dict[int, torch.Stream] = {}

    def reserve(self, *sizes: int) -> None:
        """Slots of at least so many bytes in each region; all ranks ask for the same, and wait for each other where the
        buffer grows.

        Raises:
            ParallelError: the devices cannot share memory.
        """
        if all(size <= slot for size, slot in zip(sizes, self.slots, strict=True)):
            return
        wanted = [max(slot, -(-size // ROUND) * ROUND) for size, slot in zip(sizes, self.slots, strict=True)]
        size = sum(wanted) * self.comm.size
        try:
            import torch.distributed._symmetric_memory as symmetric

            torch.accelerator.synchronize(self.device)
            self._peers, self._handle = [], None
            self._own = symmetric.empty(size, dtype=torch.uint8, device=self.device)
            self._handle = symmetric.rendezvous(self._own, self.comm.group.group_name)
            self._peers = [self._handle.get_buffer(rank, (size,), torch.uint8) for rank in range(self.comm.size)]
        except (RuntimeError, ImportError, AttributeError) as error:
            raise ParallelError(
                f"the devices of axis {self.comm.axis!r} cannot share {size} bytes of memory: {describe(error)}; use "
                f'Parallel(dispatch="all_gather") or "all_to_all"'
            ) from error
        self.slots = wanted

    def slot(self, rank: int, region: int, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The beginning of what ``source`` writes into a region of ``rank``'s buffer."""
        count = dtype.itemsize
        for length in shape:
            count *= length
        start = sum(self.slots[:region]) * self.comm.size + source * self.slots[region]
        return self._peers[rank][start : start + count].view(dtype).view(shape)

    @contextlib.contextmanager
    def beside(self, tensor: Tensor) -> Iterator[None]:
        """What is queued inside runs beside the current stream, behind what made ``tensor``."""
        main = torch.accelerator.current_stream(tensor.device)
        side = self._sides.get(main.stream_id)
        if side is None:
            side = self._sides.setdefault(main.stream_id, torch.Stream(device=tensor.device))
        side.wait_stream(main)
        with side:
            yield
        tensor.record_stream(side)

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
    """Whether all ranks are on one host, on devices of their own that reach each other's memory; the same on all ranks.

    Every rank has to ask.
    """
    if not isinstance(comm, ProcessComm) or device.type == "cpu":
        return False
    module = torch.get_device_module(device)
    reaches = getattr(module, "can_device_access_peer", None)
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7], "little")
    index = device.index if device.index is not None else module.current_device()
    rows = gather_ints(comm, [host, index], device)
    near = len({row[0] for row in rows}) == 1 and len({row[1] for row in rows}) == comm.size
    mine = near and reaches is not None and all(reaches(index, row[1]) for row in rows if row[1] != index)
    return all(row[0] for row in gather_ints(comm, [int(mine)], device))


_shared: dict[tuple[str, torch.device], PeerMemory] = {}
_lock = threading.Lock()


def shared_memory(comm: ProcessComm, device: torch.device, regions: int) -> PeerMemory:
    """The buffer of a group, made once."""
    with _lock:
        key = (comm.group.group_name, device)
        if key not in _shared:
            _shared[key] = PeerMemory(comm, device, regions)
        return _shared[key]
