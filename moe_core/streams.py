"""Running the shared experts beside the routed ones: fork, join and lifetimes, through torch.accelerator.

The order on the device is fork, gate, experts, join, with the shared experts between fork and join on a second stream.
Streams are read at each call: a caller may change its stream between calls, and a capturing stream is a new one.

``fork``, ``join``, ``keep_alive`` and ``hold`` are one line each so that tests/gpu/prove_streams.py can take them away
one at a time and show that a test fails without each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from .types import Pending

_side_streams: dict[tuple[torch.device, int], torch.Stream] = {}
_lock = threading.Lock()


def has_streams(device: torch.device) -> bool:
    """Whether work on this device can be queued on a second stream."""
    if device.type == "cpu" or not torch.accelerator.is_available():
        return False
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type:
        return False
    try:
        torch.Stream(device=device)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of this device is being captured into a graph."""
    ask = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


def run_aside(compute: Callable[[Tensor], Pending], hidden_states: Tensor) -> Pending:
    """Start ``compute(hidden_states)`` on the side stream of the current stream.

    The returned Pending joins: whoever takes its result makes the current stream wait for the side stream first.
    """
    device = hidden_states.device
    main = torch.accelerator.current_stream(device)
    side = side_stream(main, device)
    fork(main, side)
    held = [hold(hidden_states)]
    try:
        with side:
            shared = compute(hidden_states).result()
    except BaseException:
        # What was launched may still read the input, which the caller is free to drop now.
        join(main, side.record_event())
        raise
    done = side.record_event()

    def take() -> Tensor | None:
        current = torch.accelerator.current_stream(device)
        join(current, done)
        keep_alive(shared, current)
        held.clear()
        return shared

    return Pending(take)


def side_stream(main: torch.Stream, device: torch.device) -> torch.Stream:
    """One side stream for each stream that calls, so that two callers never wait for each other."""
    key = (device, main.stream_id)
    found = _side_streams.get(key)
    if found is None:
        with _lock:
            found = _side_streams.get(key)
            if found is None:
                found = torch.Stream(device=device)
                if found.stream_id == main.stream_id:  # streams come from a pool that the caller's may be of
                    found = torch.Stream(device=device)
                _side_streams[key] = found
    return found


def fork(main: torch.Stream, side: torch.Stream) -> None:
    """The side stream starts behind everything that the main stream holds now."""
    side.wait_stream(main)


def join(current: torch.Stream, done: torch.Event) -> None:
    """The current stream goes on when the side stream has reached ``done``."""
    current.wait_event(done)


def hold(tensor: Tensor) -> Tensor | None:
    """What must live until the join: memory of the main stream that the side stream may still read."""
    return tensor


def keep_alive(tensor: Tensor | None, stream: torch.Stream) -> None:
    """Memory that the side stream allocated is not reused while ``stream`` may still read it."""
    if tensor is not None:
        tensor.record_stream(stream)
