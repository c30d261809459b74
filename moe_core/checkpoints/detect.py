"""From tensor names, and shapes where names are ambiguous, to a layout."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import MoEConfig
from ..errors import CheckpointError
from . import known
from .files import CheckpointFiles
from .known import Group
from .layout import AS_CONFIG, Entry, Layout, absolute, normalise, pattern

Shapes = Mapping[str, Sequence[int]]


def detect_layout(
    tensors: Shapes,
    prefix: str,
    config: MoEConfig | None = None,
    *,
    interleaved: bool | None = None,
    ignore: Sequence[str] = (),
) -> Layout:
    """Find out how the MoE layer below a prefix is stored. Names are compared whole, never by a part of them.

    Args:
        tensors: from the names in the checkpoint to their shapes. :class:`CheckpointFiles` is such a mapping and reads
            a shape only where the name leaves something open.
        prefix: of the layer, such as ``model.layers.0.mlp``.
        config: settles what neither names nor shapes tell, see docs/checkpoints.md.
        interleaved: whether the rows of a fused gate and up alternate, where names do not tell; None: as
            ``config.w13_interleaved``, if that is True.
        ignore: shell patterns of names below the prefix that belong to something else.
    Raises:
        CheckpointError: no layout fits, or more than one, or tensors would be left over, or they are quantised; it
            lists what was found and what is known.
    """
    prefix = normalise(prefix)
    names = below(tensors, prefix, ignore)
    refuse_quantised(names, prefix)
    found = _Names(tensors, names, prefix)
    entries = [*_experts(found), *_choose(found, known.SHARED, "shared experts"), *_single(found)]
    entries += _either_bias(found, entries, config)
    layout = Layout(tuple(_settle(entry, entries, found, config, interleaved) for entry in entries))
    refuse_leftovers(layout, names, prefix)
    return layout


def layer_prefixes(path: str | Path) -> list[str]:
    """The prefixes of all MoE layers in a checkpoint, in the order of their numbers; shapes are read where they matter.

    Raises:
        CheckpointError: as for :class:`CheckpointFiles`.
    """
    found: set[str] = set()
    patterns = []
    for group in known.EXPERTS:
        if len(group) == 2:  # those with biases have the same weights
            name = group[1].names[0]
            patterns.append((name.rpartition("{e}")[2], _behind_a_prefix(name), group))
    with CheckpointFiles(path) as files:
        for name in files:
            for tail, regex, group in patterns:
                match = regex.fullmatch(name) if name.endswith(tail) else None
                if match and _is_layer(group, files, match.group(1) or ""):
                    found.add(match.group(1) or "")
                    break
    return sorted(found, key=lambda prefix: [(int(p), "") if p.isdigit() else (-1, p) for p in prefix.split(".")])


def _behind_a_prefix(template: str) -> re.Pattern[str]:
    return re.compile(rf"(?:(.*)\.)?{pattern(template).pattern}")


def _is_layer(group: Group, files: CheckpointFiles, prefix: str) -> bool:
    """Whether the group's second entry, whose name was found below the prefix, is one of routed experts."""
    w13, w2 = group[:2]
    if w2.per_expert or w2.flat:
        return True
    # Stacked names are those of dense layers and of attention's experts too; shapes tell them apart.
    names = [normalise(prefix) + name for name in (*w2.names, *w13.names)]
    if not all(name in files for name in names) or len(files[names[0]]) != 3:
        return False
    return w13.transposed is not None or _orientation(files[names[1]], files[names[0]]) is not None


class _Names:
    """The names below a prefix, asked for by the templates of entries."""

    def __init__(self, tensors: Shapes, names: list[str], prefix: str) -> None:
        self.below = set(names)
        self.tensors = tensors
        self.prefix = prefix

    def first(self, name: str) -> str | None:
        """The full name of one tensor that fits a template, or None."""
        if "{e}" in name:
            found = next((below for below in self.below if pattern(name).fullmatch(below)), None)
            return None if found is None else self.prefix + found
        if name.startswith("../"):
            full = absolute(self.prefix, name)
            return full if full in self.tensors else None
        return self.prefix + name if name in self.below else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that fits a template."""
        full = self.first(name)
        assert full is not None
        return tuple(self.tensors[full])

    def has(self, group: Group) -> bool:
        """Whether every name of a group is there, stacked ones with the experts' dimension."""
        if any(self.first(name) is None for entry in group for name in entry.names):
            return False
        w2 = group[1]
        if w2.field != "w2_weight" or w2.per_expert or w2.flat:
            return True
        return len(self.shape(w2.names[0])) == 3


def below(tensors: Iterable[str], prefix: str, ignore: Sequence[str] = ()) -> list[str]:
    """The names below a prefix, without it."""
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    return [name for name in names if not any(fnmatch.fnmatchcase(name, ignored) for ignored in ignore)]


def refuse_quantised(names: list[str], prefix: str) -> None:
    """Raises CheckpointError, naming the tensor, where a name is one that only quantised weights have."""
    there = set(names)
    for name in names:
        stem, _, last = name.rpartition(".")
        scale = last == "scale" and f"{stem}.weight" in there
        if scale or last in known.QUANTISED or last.endswith(known.QUANTISED_ENDINGS):
            raise CheckpointError(
                f"{prefix}{name}: the layer is quantised, and without its scales the weights would be wrong: say "
                f"how with config.quant (docs/quantisation.md)"
            )


def refuse_leftovers(layout: Layout, names: list[str], prefix: str) -> None:
    """Raises CheckpointError where a tensor below the prefix is in no entry: it would be lost."""
    rest = set(names)
    for entry in layout.entries:
        for name in entry.names:
            if entry.per_expert:
                rest -= {below for below in rest if pattern(name).fullmatch(below)}
            else:
                rest.discard(name)
    if rest:
        raise CheckpointError(
            f"unexpected tensors below {prefix!r}: {_list(rest)}; they would be lost. The layout found is\n{layout}\n"
            f"pass ignore=[...] with patterns of what belongs to something else, or a Layout that has them"
        )


def _experts(found: _Names) -> Group:
    groups = _choose(found, known.EXPERTS, "experts")
    if not groups:
        layouts = dict.fromkeys(
            ", ".join(name for entry in group[:2] for name in entry.names) for group in known.EXPERTS
        )
        raise CheckpointError(
            f"no known layout of experts below {found.prefix!r}; found: {_list(found.below) or 'nothing'}; known: "
            f"{'; '.join(layouts)}; mend the prefix (layer_prefixes lists them) or pass a Layout of your own"
        )
    return groups


def _choose(found: _Names, groups: Iterable[Group], what: str) -> Group:
    """The one group that is there; the larger one where one's names are among the other's."""
    there = [group for group in groups if found.has(group)]
    names = [{name for entry in group for name in entry.names} for group in there]
    largest = [group for group, own in zip(there, names, strict=True) if not any(own < other for other in names)]
    if len(largest) > 1:
        choices = " or ".join(", ".join(name for entry in group for name in entry.names) for group in largest)
        raise CheckpointError(
            f"more than one layout of {what} fits below {found.prefix!r}: {choices}; pass ignore=[...] or layout="
        )
    return largest[0] if largest else ()


def _single(found: _Names) -> list[Entry]:
    entries = []
    for field, names in known.SINGLE.items():
        there = [name for name in names if found.first(name)]
        if len(there) > 1:
            raise CheckpointError(
                f"more than one tensor below {found.prefix!r} could be {field}: {' or '.join(there)}; pass "
                f"ignore=[...] or layout="
            )
        entries += [Entry(field, (name,), unsqueezed=None) for name in there]
    return entries


def _either_bias(found: _Names, entries: list[Entry], config: MoEConfig | None) -> list[Entry]:
    """A name that may be the router's bias or the correction bias."""
    there = [name for name in known.EITHER_BIAS if found.first(name)]
    if not there:
        return []
    asked = {field: config is not None and getattr(config, field) for field in ("gate_bias", "e_score_correction_bias")}
    taken = {entry.field for entry in entries}
    fields = [field for field, wanted in asked.items() if wanted and field not in taken]
    if len(fields) != 1:
        raise CheckpointError(
            f"{found.prefix}{there[0]} may be the router's bias (added to the logits) or the correction bias "
            f"(selection only), the name does not tell; set config.gate_bias=True, or "
            f"config.e_score_correction_bias=True"
        )
    return [Entry(fields[0], (there[0],), unsqueezed=None)]


def _settle(
    entry: Entry, entries: list[Entry], found: _Names, config: MoEConfig | None, interleaved: bool | None
) -> Entry:
    """Replace what names left open."""
    changes: dict[str, Any] = {}
    if entry.transposed is None:
        changes["transposed"] = _is_transposed(entries, found)
    if entry.unsqueezed is None:
        changes["unsqueezed"] = entry.field in _VECTORS and len(found.shape(entry.names[0])) == 2
    if entry.field in ("w13_weight", "w13_bias") and len(entry.names) == 1 and entry.interleaved != AS_CONFIG:
        order = entry.interleaved if interleaved is None else interleaved
        if order is None and config is not None and config.w13_interleaved:
            order = True
        if order is None:
            raise CheckpointError(
                f"{found.prefix}{entry.names[0]}: its rows may be gate, up, gate, up, or all gate rows first; both are "
                f"in use under this name: pass interleaved=True or interleaved=False"
            )
        changes["interleaved"] = order
    return dataclasses.replace(entry, **changes)


_VECTORS = ("gate_bias", "e_score_correction_bias", "per_expert_scale")


def _is_transposed(entries: list[Entry], found: _Names) -> bool:
    """[in, out] or [out, in]: with gate and up fused, twice I appears on one side of the first matrix only."""
    w13, w2 = (next(e for e in entries if e.field == field) for field in ("w13_weight", "w2_weight"))
    first, last = found.shape(w13.names[0]), found.shape(w2.names[0])
    transposed = _orientation(first, last)
    if transposed is not None:
        return transposed
    raise CheckpointError(
        f"{found.prefix}{w13.names[0]} has shape {first} and {w2.names[0]} {last}: expected [E, 2I, H] and [E, H, I], "
        f"or [E, H, 2I] and [E, I, H]; they are not of one layer, or packed in another way"
    )


def _orientation(first: tuple[int, ...], last: tuple[int, ...]) -> bool | None:
    for transposed in (False, True):
        (rows, columns), (outputs, inner) = (shape[:-3:-1] if transposed else shape[-2:] for shape in (first, last))
        if rows == 2 * inner and columns == outputs:
            return transposed
    return None


def _list(names: Iterable[str]) -> str:
    """A few of them, experts' numbers as {e}."""
    short = sorted({re.sub(r"(?<=\bexperts\.)\d+(?=\.)", "{e}", name) for name in names})
    return ", ".join(short[:12]) + (f" and {len(short) - 12} more" if len(short) > 12 else "")
