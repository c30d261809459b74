"""Two records of the same cells: what moved by more than both spreads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .settings import CellKey


@dataclass(frozen=True)
class Change:
    """One time in both records.

    ``moved`` is ``faster``, ``slower`` or empty where the intervals from p10 to p90 overlap.
    """

    cell: CellKey
    name: str
    mode: str
    before: float
    after: float
    moved: str

    @property
    def ratio(self) -> float:
        """after / before."""
        return self.after / self.before


@dataclass(frozen=True)
class Comparison:
    """All changes, what only one record has, and what makes the two hard to compare."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    warnings: list[str]

    @property
    def moved(self) -> list[Change]:
        """Beyond the spread, largest first."""
        return sorted(
            (change for change in self.changes if change.moved),
            key=lambda change: max(change.ratio, 1 / change.ratio),
            reverse=True,
        )


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Match cells, candidates and modes of two valid records."""
    old, new = _times(before), _times(after)
    changes = [
        Change(*key, old[key]["median"], new[key]["median"], _moved(old[key], new[key])) for key in old if key in new
    ]
    return Comparison(
        changes,
        [_named(key) for key in old if key not in new],
        [_named(key) for key in new if key not in old],
        _warnings(before, after),
    )


def _moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if new["p90"] < old["p10"]:
        return "faster"
    return "slower" if new["p10"] > old["p90"] else ""


def _times(record: Mapping[str, Any]) -> dict[tuple[CellKey, str, str], Mapping[str, Any]]:
    return {
        (CellKey.of(cell), result["name"], mode): times
        for cell in record["cells"]
        for result in cell["results"]
        for mode, times in result.get("times", {}).items()
    }


def _named(key: tuple[CellKey, str, str]) -> str:
    return f"{key[0]} {key[1]} {key[2]}"


def _warnings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{part}.{name}: {old.get(name)!r}, then {new.get(name)!r}"
        for part in ("device", "versions", "workers", "settings")
        for old, new in [(before.get(part) or {}, after.get(part) or {})]
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
