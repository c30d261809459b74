"""From MoEWeights back to a checkpoint's names and shapes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import MoEConfig
from ..errors import CheckpointError
from ..weights import MoEWeights, check_weights
from .layout import EXPERT_FIELDS, Entry, Layout, absolute, normalise
from .load import local_experts


def checkpoint_tensors(
    weights: MoEWeights, prefix: str, config: MoEConfig, layout: Layout, *, experts: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The tensors of one layer under the names and in the shapes of a layout; views where nothing has to be moved.

    Args:
        weights: of the layer. prefix: as for :func:`load_weights`. config: what the weights were made for.
        layout: as :func:`detect_layout` found it.
        experts: global ids of the experts that ``weights`` holds, for names with an expert's id; None is all.
    Raises:
        CheckpointError: the layout has no place for a field of the weights, or only a place for all experts together.
        WeightsError: the weights do not fit the config.
    """
    check_weights(config, weights)
    prefix = normalise(prefix)
    ids = local_experts(config, experts)
    tensors: dict[str, Tensor] = {}
    for field, value in weights.named_tensors():
        entry = layout.entry(field)
        if entry is None:
            raise CheckpointError(
                f"the layout has no place for {field}, which would be lost; add an Entry for it to\n{layout}"
            )
        tensors |= _stored(entry, value.detach(), prefix, config, ids)
    return tensors


def save_weights(
    weights: MoEWeights,
    path: str | Path,
    prefix: str,
    config: MoEConfig,
    layout: Layout,
    *,
    experts: Sequence[int] | None = None,
) -> None:
    """Write one layer to a .safetensors file, which is replaced as a whole if it is there.

    Several layers go into one file as ``checkpoint_tensors(...) | checkpoint_tensors(...)`` and safetensors' save_file.

    Args:
        path: of the file; the others are those of :func:`checkpoint_tensors`.
    Raises:
        CheckpointError, WeightsError: as for :func:`checkpoint_tensors`; or the path is no .safetensors file's.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        raise CheckpointError(f"path={str(path)!r}: expected the name of a .safetensors file")
    tensors = checkpoint_tensors(weights, prefix, config, layout, experts=experts)
    # Weights may be maps of the very file that is replaced: writing into it would pull the pages from under them.
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, metadata={"format": "pt"})
        fresh.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()


def _stored(entry: Entry, value: Tensor, prefix: str, config: MoEConfig, ids: list[int]) -> dict[str, Tensor]:
    """The tensors of one field."""
    stacked = entry.field in EXPERT_FIELDS
    if stacked and not entry.per_expert and ids != list(range(config.num_experts)):
        raise CheckpointError(
            f"{entry.field} lies in {prefix}{entry.names[0]} with all {config.num_experts} experts, and the weights "
            f"hold {len(ids)}: gather them first, or use a layout with a tensor for each expert"
        )
    if not stacked:
        value = value[None]
    found: dict[str, Tensor] = {}
    for piece, template in enumerate(entry.names):
        tensor = _piece(entry, value, piece, config.w13_interleaved)
        if entry.transposed:
            tensor = tensor.transpose(1, 2)
        if entry.flat:
            tensor = tensor.flatten(0, 1)
        elif not stacked and not entry.unsqueezed:
            tensor = tensor[0]
        names = [template.replace("{e}", str(e)) for e in ids] if entry.per_expert else [template]
        for i, name in enumerate(names):
            full = absolute(prefix, name)
            if full is None:
                raise CheckpointError(f"{name} lies above prefix {prefix!r}; pass a longer prefix")
            found[full] = tensor[i] if entry.per_expert else tensor
    return found


def _piece(entry: Entry, value: Tensor, piece: int, interleaved: bool) -> Tensor:
    rows = value.shape[1]
    slices = entry.row_slices(piece, rows, interleaved)
    if len(slices) == 1:
        return value[:, slices[0][1]]
    out = torch.empty_like(value)
    for source, target in slices:
        out[:, source] = value[:, target]
    return out
