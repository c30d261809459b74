"""Launching kernels for the price of their arguments.

At each launch Triton binds, specialises and hashes every argument, compile-time constants and options among them: some
20 microseconds on the host, while a product for one token takes 15 on the GPU. Here constants are bound once, and the
compiled kernel is found by what the run-time arguments make of it: dtypes, the alignment of pointers, divisibility of
integers. The first launch of each kind, and whatever is out of the ordinary, goes Triton's own way.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import triton
from torch import Tensor

Grid = tuple[int, int, int]


class Kernel:
    """A Triton kernel with its compile-time constants and launch options.

    Args:
        function: the kernel; its run-time parameters come first, then the compile-time constants.
        constants: by name, each exactly once.
        num_warps, pdl: launch options; ``pdl`` launches before the kernel in front has ended, where the GPU can.
    """

    __slots__ = ("_constants", "_direct", "_empty", "_found", "function")

    def __init__(self, function: Any, constants: dict[str, Any], *, num_warps: int = 4, pdl: bool = False) -> None:
        self.function = function
        self._constants = {**constants, "num_warps": num_warps, **({"launch_pdl": True} if pdl else {})}
        self._direct = DIRECT and not function.pre_run_hooks
        self._empty = (None,) * len(constants)
        self._found: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, grid: Grid, *arguments: Any) -> None:
        """Launch on the current stream of the arguments' device.

        Args:
            arguments: tensors (the first is one), TensorDescriptors, integers or None, in the kernel's order.
        """
        device = _device_of(arguments[0])
        if device < 0:  # the interpreter's
            self.function[grid](*arguments, **self._constants)
        elif device == _current_device():
            self._launch(grid, device, arguments)
        else:
            with torch.cuda.device(device):
                self._launch(grid, device, arguments)

    def compile(self, *arguments: Any) -> None:
        """Into Triton's cache, without a launch."""
        self.function.warmup(*arguments, grid=(1,), **self._constants)

    def _launch(self, grid: Grid, device: int, arguments: tuple[Any, ...]) -> None:
        if not self._direct:
            self.function[grid](*arguments, **self._constants)
            return
        # Everything that Triton 3.6 specialises on is in the key; a tensor that lies elsewhere has Triton complain.
        key: list[Any] = [device]
        values: list[Any] = []
        for value in arguments:
            if isinstance(value, Tensor):
                address = value.data_ptr()
                if _device_of(value) != device:
                    break
                key += (value.dtype, address & 15 == 0)
                values.append(address)
                continue
            values.append(value)
            if value is None:
                key.append(None)
            elif type(value) is int:
                key.append((value == 1, value & 15 == 0, value.bit_length() > 31))
            elif hasattr(value, "block_shape") and _device_of(value.base) == device:
                key += (type(value), getattr(value, "layout", None), value.base.dtype, *value.block_shape)
            else:
                break
        else:
            found = self._found.get(tuple(key))
            if found is not None and not _is_watched():
                launch, function, cooperative, pdl, packed = found
                # Scratch memory, and hooks with what they are told of a launch, are left out.
                beside = (cooperative, pdl, None, None, packed, None, None, None)
                launch(*grid, _stream_of(device), function, *beside, *values, *self._empty)
                return
            compiled = self.function[grid](*arguments, **self._constants)
            direct = _direct_launch(compiled)
            if direct is not None:
                self._found[tuple(key)] = direct
            return
        self.function[grid](*arguments, **self._constants)


def why_not_direct() -> str:
    """Why every launch goes Triton's own way; empty where only the first of a kind does."""
    if triton.knobs.runtime.interpret:
        return "Triton interprets kernels"
    if torch.version.hip is not None:
        return "Triton's own launches: the short way is for NVIDIA's driver"
    if not triton.__version__.startswith("3.6."):
        return f"Triton's own launches: the short way was made for triton 3.6, not for {triton.__version__}"
    return ""


def _direct_launch(compiled: Any) -> tuple[Any, ...] | None:
    # A compiled kernel whose launcher is as triton 3.6 has it and that needs no memory of Triton's own.
    launcher = getattr(compiled, "_run", None)
    expected = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if not all(hasattr(launcher, name) for name in expected) or compiled.function is None:
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    return (
        launcher.launch,
        compiled.function,
        launcher.launch_cooperative_grid,
        launcher.launch_pdl,
        compiled.packed_metadata,
    )


class Memo:
    """What was derived from an object, by a key of one's own, as long as the object lives."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Any, dict[Any, Any]]] = {}

    def __call__(self, owner: Any) -> dict[Any, Any]:
        """The dictionary that belongs to ``owner``, an object that can be referred to weakly."""
        number = id(owner)
        found = self._of.get(number)
        if found is None:
            gone = weakref.ref(owner, lambda _: self._of.pop(number, None))
            found = self._of[number] = (gone, {})
        return found[1]


def _is_watched() -> bool:
    # A profiler's hooks, which Triton calls around its own launches, or checks that were asked for meanwhile.
    runtime = triton.knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or runtime.debug
    )


DIRECT = not why_not_direct()
_device_of = Tensor.get_device
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)
