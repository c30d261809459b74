"""Facts about the host, as a value that tests can make up."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform as _host
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


@dataclass(frozen=True)
class Platform:
    """Where a layer is to run: passed to ``moe_probe`` and ``moe_supports``, never patched.

    Args:
        device: the device of the weights.
        dtype: dtype of the weights and activations; None while it is not known.
        torch_version: of the running torch.
        machine: processor architecture, such as x86_64.
        cpu_capability: torch's name for the vector instructions in use (AVX2, AVX512...).
        packages: distribution name -> version, or None where it is known to be missing; a name that is not in it is
            looked up on the host.
        env: the environment variables.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    torch_version: str = ""
    machine: str = ""
    cpu_capability: str = ""
    packages: Mapping[str, str | None] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def detect(cls, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Platform:
        """The facts of this host for ``device``; None is the current accelerator, or the CPU where there is none."""
        return cls(
            device=default_device() if device is None else torch.device(device),
            dtype=dtype,
            torch_version=torch.__version__,
            machine=_host.machine(),
            cpu_capability=_cpu_capability(),
            env=dict(os.environ),
        )

    def version(self, distribution: str) -> str | None:
        """The installed version of a distribution, None where it is missing. Imports nothing."""
        if distribution in self.packages:
            return self.packages[distribution]
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def default_device() -> torch.device:
    """The accelerator that torch sees, or the CPU."""
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        if found is not None and _holds_tensors(found):
            return found
    return torch.device("cpu")


def _holds_tensors(device: torch.device) -> bool:
    """Whether an accelerator is more than a name: a package may register torch's private-use type and no operators."""
    if device.type != torch._C._get_privateuse1_backend_name():
        return True
    try:
        torch.empty(0, device=device)
    except RuntimeError:
        return False
    return True


def device_of(device_types: tuple[str, ...]) -> torch.device:
    """Where a backend's layer can be put here: the default device, or another of its types that exists, or the CPU.

    Some devices are no accelerator to torch, and exist once their package is imported, as a probe does.
    """
    default = default_device()
    if default.type in device_types:
        return default
    for device_type in device_types:
        # Each kind of device has its own error for not being there.
        with contextlib.suppress(RuntimeError, AssertionError, NotImplementedError, ImportError):
            return torch.empty(0, device=device_type).device
    return torch.device("cpu")
