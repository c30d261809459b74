"""Before the first call: all ranks hold parts of one layer, or all of them say where they differ."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from .. import __name__ as package
from ..errors import ParallelError
from .comm import Comm, gather_ints
from .mesh import Ranks

LENGTH = 128
"""Facts in a digest: a fixed number, so that ranks with other versions can compare at all."""
TEXT = 96
"""Bytes of a differing value that the others are shown."""


def facts_of(ranks: Ranks, dtype: torch.dtype) -> dict[str, str]:
    """What has to be equal on all ranks, by name; functions count by their name."""
    found = {"torch": torch.__version__, "dtype": str(dtype)}
    for field in dataclasses.fields(ranks.config):
        found[f"config.{field.name}"] = _text(getattr(ranks.config, field.name))
    options = ranks.options
    found |= {f"Parallel.{name}": _text(getattr(options, name)) for name in ("tokens", "sequence_parallel", "dispatch")}
    found["Parallel.placement"] = _text(ranks.placement.slots)
    found["mesh"] = ", ".join(f"{axis}={comm.size}" for axis, comm in ranks.comms.items())
    found["shared experts"] = f"{ranks.separate_shared}, over {ranks.facts.shared_axes}"
    return found


def _text(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{getattr(value, '__module__', '')}.{name}" if name and callable(value) else repr(value)


def check_agreement(ranks: Ranks, dtype: torch.dtype) -> None:
    """Compare with every other rank of the mesh.

    Raises:
        ParallelError: on all ranks, naming what differs and who has what; or a rank that does not answer.
    """
    axes = [comm for comm in ranks.comms.values() if comm.size > 1]
    if not axes:
        return
    facts = facts_of(ranks, dtype)
    names = list(facts)
    assert len(names) < LENGTH
    digests = [_number(f"{package} {names}"), *(_number(facts[name]) for name in names)]
    digests += [0] * (LENGTH - len(digests))
    least, most = list(digests), list(digests)
    for comm in axes:  # the least of a line, then of the lines' least: every rank learns those of the whole mesh
        rows = gather_ints(comm, [*least, *most], ranks.device)
        least = [min(values) for values in zip(*(row[:LENGTH] for row in rows), strict=True)]
        most = [max(values) for values in zip(*(row[LENGTH:] for row in rows), strict=True)]
    differing = [i for i in range(LENGTH) if least[i] != most[i]]
    if not differing:
        return
    if differing[0] == 0:
        raise ParallelError("ranks run different versions of moe_core: expected one; install the same on every host")
    shown = names[differing[0] - 1]
    raise ParallelError(
        f"{', '.join(names[i - 1] for i in differing)} differ across ranks, expected the same layer on all: "
        f"{_who_has_what(axes, shown, facts[shown], ranks.device)}; bind it with equal arguments everywhere"
    )


def _who_has_what(axes: list[Comm], name: str, value: str, device: torch.device) -> str:
    own, found = value.encode()[:TEXT].ljust(TEXT), ""
    for comm in axes:  # along all of them, whatever is found: other ranks may find it along another
        rows = gather_ints(comm, list(own), device)
        values = [bytes(row).decode(errors="replace").strip() for row in rows]
        if len(set(values)) > 1 and not found:
            each = ", ".join(f"rank {rank} has {text}" for rank, text in enumerate(values))
            found = f"of {name} along axis {comm.axis!r}, {each}"
    return found or f"of {name} this rank has {value[:TEXT]}"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
