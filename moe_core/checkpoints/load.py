"""From a checkpoint to MoEWeights, holding no more than the local experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import MoEConfig
from ..errors import CheckpointError
from ..quant.layout import matrix_of
from ..weights import MoEWeights, canonical_shapes, check_weights, required_fields, resolve_config
from .detect import below, detect_layout, refuse_leftovers, refuse_quantised
from .files import CheckpointFiles
from .layout import EXPERT_FIELDS, Entry, Layout, absolute, normalise, pattern
from .quantised import QuantisedReader
from .stored import PlainNames

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INTEGERS = {"I32": torch.int32, "I64": torch.int64}

Piece = tuple[int, int, Tensor]
"""Index of the piece, local id of its first expert, [experts, rows of the piece, ...]."""


def load_weights(
    path: str | Path,
    prefix: str,
    config: MoEConfig,
    *,
    experts: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: Layout | None = None,
    interleaved: bool | None = None,
    ignore: Sequence[str] = (),
) -> MoEWeights:
    """Read one MoE layer.

    Args:
        path: a .safetensors file, or a folder as :class:`CheckpointFiles` takes it.
        prefix: of the layer, such as ``model.layers.0.mlp``.
        config: what the layer computes, and how it is quantised; gate and up come in the order of
            ``config.w13_interleaved``.
        experts: global ids of the experts to hold, in the order of their local ids; a range reads in one piece. None
            is all of them. ``config.num_local_experts`` says how many.
        device: None is the CPU.
        dtype: None keeps what the file has, as quantised matrices do whatever it is. e_score_correction_bias is float32
            in any case.
        layout: None finds out, see :func:`detect_layout`, which takes ``interleaved`` and ``ignore``.
    Returns:
        MoEWeights of the config. On the CPU a tensor that needs no change is a private map of the file, so a
        checkpoint must not be overwritten in place while its weights are in use (:func:`save_weights` replaces files).
    Raises:
        CheckpointError: a tensor is missing, unexpected, quantised in another way than the config says, or of another
            shape; it names the tensor, what was found and what was expected.
        WeightsError: the config denies a bias that the checkpoint has, or asks for one that it lacks.
    """
    prefix = normalise(prefix)
    ids = local_experts(config, experts)
    with CheckpointFiles(path) as files:
        tensors: CheckpointFiles | PlainNames = files if config.quant is None else PlainNames(files, config.quant)
        names = below(tensors, prefix, ignore)
        if layout is None:
            layout = detect_layout(tensors, prefix, config, interleaved=interleaved, ignore=ignore)
        else:
            refuse_quantised([name for name in names if not _has(layout, name)], prefix)
            refuse_leftovers(layout, names, prefix)
        # What lies beside the layer, not in it, is its own only where the config says so.
        outside = not config.has_shared_experts
        entries = [e for e in layout.entries if not (outside and e.field.startswith("shared") and e.names[0][0] == ".")]
        _check_fields(entries, config, prefix, files)
        _check_count(entries, names, config, prefix)
        where = torch.device(device or "cpu")
        reader = _Reader(files, prefix, config, ids, where, dtype)
        fields: dict[str, Tensor] = {}
        for entry in entries:
            if isinstance(tensors, PlainNames) and matrix_of(config, entry.field) is not None:
                fields |= QuantisedReader(tensors, prefix, config, ids, where).fields(entry)
            else:
                fields[entry.field] = reader.field(entry)
        weights = MoEWeights(**fields)
    check_weights(config, weights)
    resolve_config(config, weights)
    return weights


def _check_count(entries: list[Entry], names: list[str], config: MoEConfig, prefix: str) -> None:
    """Experts beyond the config's would be lost; those of zero experts are not read, whatever their tensors hold."""
    for template in (name for entry in entries if entry.per_expert for name in entry.names):
        for name in names:
            found = pattern(template).fullmatch(name)
            if found and int(found.group(1)) >= config.num_router_outputs:
                raise CheckpointError(
                    f"unexpected tensor {prefix}{name}: config.num_experts={config.num_experts}; mend the config"
                )


def local_experts(config: MoEConfig, experts: Sequence[int] | None) -> list[int]:
    """The global ids of the experts held here, checked.

    Raises:
        CheckpointError: not as many as the config holds, out of range, or one of them twice.
    """
    held, count = config.num_held_experts, config.num_experts
    if experts is None:
        if held != count:
            raise CheckpointError(
                f"config.num_local_experts={held} of num_experts={count}: which? Pass experts=, their global ids, such "
                f"as range({held})"
            )
        return list(range(count))
    ids = list(experts)
    if len(ids) != held:
        raise CheckpointError(
            f"experts={experts!r} has {len(ids)} ids, expected {held} as the config holds; pass "
            f"dataclasses.replace(config, num_local_experts={len(ids)})"
        )
    bad = [e for e in ids if not isinstance(e, int) or not 0 <= e < count]
    if bad or len(set(ids)) < len(ids):
        raise CheckpointError(f"experts={experts!r}: expected distinct ids from 0 to num_experts - 1 = {count - 1}")
    return ids


def _has(layout: Layout, name: str) -> bool:
    return any(pattern(template).fullmatch(name) for entry in layout.entries for template in entry.names)


def _check_fields(entries: list[Entry], config: MoEConfig, prefix: str, files: CheckpointFiles) -> None:
    there = {entry.field: entry for entry in entries}
    wanted = required_fields(config)
    wanted += [
        field
        for field, asked in (
            ("gate_bias", config.gate_bias),
            ("e_score_correction_bias", config.e_score_correction_bias),
            ("w13_bias", config.expert_bias),
            ("w2_bias", config.expert_bias),
            ("shared_w13_bias", config.shared_expert_bias),
            ("shared_w2_bias", config.shared_expert_bias),
        )
        if asked
    ]
    missing = [field for field in wanted if field not in there]
    if missing:
        raise CheckpointError(
            f"{files.path} has no tensor below {prefix!r} for {', '.join(missing)}, which the config asks for; it has "
            f"{', '.join(name for entry in entries for name in entry.names)}"
        )
    for flag, field in (
        ("shared_intermediate_size", "shared_w13_weight"),
        ("shared_expert_gate", "shared_gate_weight"),
    ):
        if field in there and not getattr(config, flag):
            raise CheckpointError(
                f"{prefix}{there[field].names[0]} is there, but config.{flag}={getattr(config, flag)!r}: it would be "
                f"lost; set config.{flag}, or pass ignore=[{there[field].names[0]!r}, ...]"
            )


class _Reader:
    """Reads entries of one layer into the canonical layout."""

    def __init__(
        self,
        files: CheckpointFiles,
        prefix: str,
        config: MoEConfig,
        ids: list[int],
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self.files, self.prefix, self.config, self.ids = files, prefix, config, ids
        self.device, self.dtype = device, dtype
        every = dataclasses.replace(config, num_local_experts=None)
        self.shapes = canonical_shapes(every)

    def field(self, entry: Entry) -> Tensor:
        """One field of MoEWeights."""
        if entry.field == "tid2eid":
            return self._table(entry)
        shape = self.shapes[entry.field]
        names = [self._names(name) for name in entry.names]
        stored = {self._check(name, entry.stored_shape(shape)) for piece in names for name in piece}
        if len(stored) > 1:
            raise CheckpointError(
                f"{names[0][0]} and the other tensors of {entry.field} have dtypes "
                f"{', '.join(sorted(map(str, stored)))}; expected one: save them again in one dtype"
            )
        dtype = self.dtype or stored.pop()
        if entry.field == "e_score_correction_bias":
            dtype = torch.float32
        if entry.field not in EXPERT_FIELDS:
            return self._join(entry, 1, shape, dtype, self._whole(entry, names))[0]
        return self._join(entry, len(self.ids), shape[1:], dtype, self._experts(entry, names, shape[0]))

    def _join(
        self, entry: Entry, count: int, shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterator[Piece]
    ) -> Tensor:
        """[count, *shape] from pieces; the piece itself where it is all there is and nothing has to be moved."""
        rows = shape[0]
        out = None
        for piece, start, tensor in pieces:
            slices = entry.row_slices(piece, rows, self.config.w13_interleaved)
            if tensor.shape == (count, *shape) and slices == [(slice(0, rows), slice(0, rows))]:
                return tensor.to(device=self.device, dtype=dtype)
            if out is None:
                out = torch.empty(count, *shape, device=self.device, dtype=dtype)
            for source, target in slices:
                out[start : start + tensor.shape[0], target].copy_(tensor[:, source])
        return torch.empty(count, *shape, device=self.device, dtype=dtype) if out is None else out

    def _whole(self, entry: Entry, names: list[list[str]]) -> Iterator[Piece]:
        """Tensors without experts, as if of one."""
        for piece, (name,) in enumerate(names):
            tensor = self.files.read(name)
            yield piece, 0, _canonical(entry, tensor if entry.unsqueezed else tensor[None])

    def _experts(self, entry: Entry, names: list[list[str]], experts: int) -> Iterator[Piece]:
        """Of each piece the local experts, those that lie together at once."""
        for piece, each in enumerate(names):
            if entry.per_expert:
                for local, name in enumerate(each[: len(self.ids)]):
                    yield piece, local, _canonical(entry, self.files.read(name)[None])
                continue
            (name,) = each
            rows = self.files[name][0] // experts
            for local, start, stop in _runs(self.ids):
                tensor = self.files.read_rows(name, start * rows, stop * rows)
                if entry.flat:
                    tensor = tensor.view(stop - start, rows, *tensor.shape[1:])
                yield piece, local, _canonical(entry, tensor)

    def _names(self, name: str) -> list[str]:
        """The tensors of a template: those of the local experts; without any, the first, whose dtype is the field's."""
        each = [name.replace("{e}", str(e)) for e in self.ids or [0]] if "{e}" in name else [name]
        return [absolute(self.prefix, one) or one for one in each]

    def _check(self, name: str, expected: tuple[int, ...]) -> torch.dtype:
        found = self._shape(name)
        if found != expected:
            c = self.config
            raise CheckpointError(
                f"{name} in {self.files.file_of(name)} has shape {found}, expected {expected} from MoEConfig("
                f"hidden_size={c.hidden_size}, intermediate_size={c.intermediate_size}, num_experts={c.num_experts}, "
                f"shared_intermediate_size={c.shared_intermediate_size}, gated={c.gated}); mend one or the other"
            )
        kind = self.files.dtype(name)
        if kind not in FLOATS:
            raise CheckpointError(
                f"{name} in {self.files.file_of(name)} has dtype {kind}, expected one of {', '.join(FLOATS)}; "
                f"describe quantised weights with config.quant"
            )
        return FLOATS[kind]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.files:
            raise CheckpointError(
                f"{name} is missing in {self.files.path}; expected the tensors of experts 0 to "
                f"{self.config.num_experts - 1} and of the layout's other fields: mend config.num_experts or the layout"
            )
        return self.files[name]

    def _table(self, entry: Entry) -> Tensor:
        (name,) = self._names(entry.names[0])
        shape, kind = self._shape(name), self.files.dtype(name)
        if len(shape) != 2 or shape[1] != self.config.top_k or kind not in INTEGERS:
            raise CheckpointError(
                f"{name} in {self.files.file_of(name)} has shape {shape} and dtype {kind}, expected [vocabulary, "
                f"{self.config.top_k}] and one of {', '.join(INTEGERS)}"
            )
        return self.files.read(name).to(self.device)


def _canonical(entry: Entry, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2) if entry.transposed else tensor


def _runs(ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """(local id of the first, first, last + 1) of each run of consecutive ids."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield start, ids[start], ids[i - 1] + 1
            start = i
