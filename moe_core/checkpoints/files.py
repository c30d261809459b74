"""Reading safetensors: one file, or a folder of shards; a file is opened when one of its tensors is asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class CheckpointFiles(Mapping[str, tuple[int, ...]]):
    """The tensors of a checkpoint: a mapping from name to shape, and their data.

    A context manager: it closes the files; the tensors that were read stay.

    Args:
        path: a .safetensors file, or a folder with model.safetensors, or with model.safetensors.index.json and the
            shards that it names.
    Raises:
        CheckpointError: there is no such checkpoint, or its index or one of its files cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}
        self._file_of = self._find()

    def _find(self) -> dict[str, Path]:
        if self.path.is_file():
            return dict.fromkeys(self._handle(self.path).keys(), self.path)
        if (self.path / INDEX).is_file():
            return _read_index(self.path / INDEX)
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._handle(self.path / SINGLE).keys(), self.path / SINGLE)
        found = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        raise CheckpointError(
            f"{self.path}: expected a .safetensors file, or a folder with {SINGLE} or {INDEX}; "
            + (f"it holds {', '.join(found[:8]) or 'nothing'}; " if self.path.is_dir() else "there is nothing; ")
            + "other formats are not read: save it again as safetensors"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._handles.clear()
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; opens its file, reads its header."""
        return tuple(self._slice(name).get_shape())

    def file_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self._file_of[name]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor by safetensors' name, such as ``BF16``."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU; a private map of the file where safetensors makes one."""
        tensor: Tensor = self._read(name, lambda handle: handle.get_tensor(name))
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the first dimension; no other byte of the tensor is read."""
        tensor: Tensor = self._read(name, lambda handle: handle.get_slice(name)[start:stop])
        return tensor

    def _slice(self, name: str) -> Any:
        return self._read(name, lambda handle: handle.get_slice(name))

    def _read(self, name: str, how: Any) -> Any:
        file = self._file_of[name]
        try:
            return how(self._handle(file))
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{name} cannot be read from {file}: {error}; the index and its shards do not fit, or the file is "
                f"damaged: download it again"
            ) from error

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            except FileNotFoundError as error:
                raise CheckpointError(f"{file} is missing, though the index names it; download it again") from error
            except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch could not map it
                raise CheckpointError(f"{file} is no readable safetensors file: {error}; download it again") from error
        return self._handles[file]


def _read_index(index: Path) -> dict[str, Path]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} cannot be read ({type(error).__name__}: {error}); expected JSON with a weight_map of tensor "
            f"names to file names"
        ) from error
    for name, file in found.items():
        # An index comes from elsewhere: it must not lead to files outside the folder.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} says that {name} is in {file!r}; expected the name of a .safetensors file beside the index"
            )
    return {name: index.parent / file for name, file in found.items()}
