"""Running the shared experts beside the routed ones: fork, join and lifetimes, through torch.accelerator.

The order on the device is fork, gate, experts, join, with the shared experts between fork and join on a second stream.
Streams are read at each call: a caller may change its stream between calls, and a capturing stream is a new one.
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
    return accelerator is not None and accelerator.type == device.type


def run_aside(compute: Callable[[Tensor], Pending], hidden_states: Tensor) -> Pending:
    """Start ``compute(hidden_states)`` on the side stream of the current stream.

    The returned Pending joins: whoever takes its result makes the current stream wait for the side stream first.
    """
    main = torch.accelerator.current_stream(hidden_states.device)
    side = side_stream(main, hidden_states.device)
    fork(main, side)
    with side:
        shared = compute(hidden_states).result()
    done = side.record_event()
    kept: list[Tensor] = [hidden_states]

    def take() -> Tensor | None:
        current = torch.accelerator.current_stream(hidden_states.device)
        join(current, done)
        keep_alive(shared, current)
        # Until the join the side stream may still read the input; its memory must not be handed out before.
        kept.clear()
        return shared

    return Pending(take)


def side_stream(main: torch.Stream, device: torch.device) -> torch.Stream:
    """One side stream for each stream that calls, so that two callers never wait for each other."""
    key = (device, main.stream_id)
    found = _side_streams.get(key)
    if found is None:
        with _lock:
            found = _side_streams.setdefault(key, torch.Stream(device=device))
    return found


def fork(main: torch.Stream, side: torch.Stream) -> None:
    """The side stream starts behind everything that the main stream holds now."""
    side.wait_stream(main)


def join(current: torch.Stream, done: torch.Event) -> None:
    """The current stream goes on when the side stream has reached ``done``."""
    current.wait_event(done)


def keep_alive(tensor: Tensor | None, stream: torch.Stream) -> None:
    """Memory that the side stream allocated is not reused while ``stream`` may still read it."""
    if tensor is not None:
        tensor.record_stream(stream)
