"""The JSON file of a benchmark: what it must hold, written cell by cell, read back to go on."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import BenchError
from .settings import CellKey

SCHEMA: Final = 1
STATUSES: Final = ("ok", "wrong", "unavailable")
_NUMBER: Final = (int, float)
_TOP: Final[Mapping[str, Any]] = {
    "schema": int,
    "date": str,
    "command": str,
    "complete": bool,
    "device": dict,
    "versions": dict,
    "settings": dict,
    "ceilings": list,
    "notes": list,
    "cells": list,
}
_DEVICE: Final[Mapping[str, Any]] = {"type": str, "name": str, "driver": str, "memory_bytes": int}
_VERSIONS: Final[Mapping[str, Any]] = {"python": str, "torch": str, "moe_core": str}
_RATE: Final[Mapping[str, Any]] = {"best": _NUMBER, "median": _NUMBER, "p10": _NUMBER, "p90": _NUMBER, "n": int}
_CEILINGS: Final[Mapping[str, Any]] = {
    "date": str,
    "dtype": str,
    "threads": int,
    "load_average": _NUMBER,
    "copy": dict,
    "read": dict,
    "matmul": dict,
}
_CELL: Final[Mapping[str, Any]] = {
    "shape": dict,
    "stage": str,
    "tokens": int,
    "dtype": str,
    "threads": int,
    "date": str,
    "load_average": list,
    "experts_hit": _NUMBER,
    "bytes": _NUMBER,
    "flops": _NUMBER,
    "floor": dict,
    "ceilings": int,
    "results": list,
}
_TIME: Final[Mapping[str, Any]] = {"median": _NUMBER, "p10": _NUMBER, "p90": _NUMBER, "min": _NUMBER, "n": int}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def new(
    command: str, device: Mapping[str, Any], versions: Mapping[str, Any], settings: Mapping[str, Any], commit: str
) -> dict[str, Any]:
    """A record without cells."""
    return {
        "schema": SCHEMA,
        "date": now(),
        "command": command,
        "complete": False,
        "commit": commit,
        "device": dict(device),
        "versions": dict(versions),
        "workers": {},
        "settings": dict(settings),
        "ceilings": [],
        "notes": [],
        "cells": [],
        "skipped": {},
    }


def validate(record: Any) -> None:
    """Refuse a record that does not say where, with what, when and how widely spread its times are.

    Raises:
        BenchError: names what is missing or of the wrong kind.
    """
    _fields(record, _TOP, "record")
    if record["schema"] != SCHEMA:
        raise BenchError(f"record.schema={record['schema']!r}: expected {SCHEMA}; measure again with this version")
    _date(record["date"], "record")
    _fields(record["device"], _DEVICE, "record.device")
    _fields(record["versions"], _VERSIONS, "record.versions")
    for index, entry in enumerate(record["ceilings"]):
        where = f"record.ceilings[{index}]"
        _fields(entry, _CEILINGS, where)
        _date(entry["date"], where)
        for name in ("copy", "read", "matmul"):
            _fields(entry[name], _RATE, f"{where}.{name}")
    for index, cell in enumerate(record["cells"]):
        _cell(cell, f"record.cells[{index}]", len(record["ceilings"]))


def _cell(cell: Any, where: str, ceilings: int) -> None:
    _fields(cell, _CELL, where)
    _date(cell["date"], where)
    if "read" in cell:
        _fields(cell["read"], _RATE, f"{where}.read")
    _fields(cell["floor"], {"seconds": _NUMBER, "bound": str}, f"{where}.floor")
    _fields(cell["shape"], {"name": str, "hidden_size": int, "num_experts": int, "top_k": int}, f"{where}.shape")
    if not 0 <= cell["ceilings"] < ceilings:
        raise BenchError(f"{where}.ceilings={cell['ceilings']}: expected an index into record.ceilings")
    for number, result in enumerate(cell["results"]):
        place = f"{where}.results[{number}]"
        _fields(result, {"name": str, "kind": str, "status": str}, place)
        if result["status"] not in STATUSES:
            raise BenchError(f"{place}.status={result['status']!r}: expected one of {', '.join(STATUSES)}")
        if result["status"] == "unavailable":
            _fields(result.get("reason"), {"kind": str, "reason": str}, f"{place}.reason")
        if result["status"] != "ok":
            if result.get("times"):
                raise BenchError(f"{place} is {result['status']} and has times; what fails its check is never timed")
            continue
        _fields(result, {"error": _NUMBER, "times": dict}, place)
        for mode, times in result["times"].items():
            _fields(times, _TIME, f"{place}.times[{mode}]")


def _fields(value: Any, expected: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, Mapping):
        raise BenchError(f"{where} is {type(value).__name__}, expected an object")
    for name, kind in expected.items():
        if name not in value:
            raise BenchError(f"{where}.{name} is missing; a time without it says nothing")
        if not isinstance(value[name], kind) or (isinstance(value[name], bool) and kind is not bool):
            raise BenchError(f"{where}.{name}={value[name]!r}: expected {kind}")
        if value[name] == "" and name != "command":
            raise BenchError(f"{where}.{name} is empty")


def _date(text: str, where: str) -> None:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        raise BenchError(f"{where}.date={text!r}: expected an ISO date") from None


def load(path: Path) -> dict[str, Any]:
    """Read and validate.

    Raises:
        BenchError: no such file, no JSON, or not a record.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise BenchError(f"{path} is no JSON: {error}") from error
    try:
        validate(record)
    except BenchError as error:
        raise BenchError(f"{path}: {error}") from None
    return record


def save(record: dict[str, Any], path: Path) -> None:
    """Validate and write, so that a reader or an interruption never meets half a file."""
    validate(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(dumps(record), encoding="utf-8")
    os.replace(temporary, path)


def dumps(record: dict[str, Any]) -> str:
    """JSON with one cell's result a line: files that go into a repository stay small and their diffs readable."""
    head = {name: value for name, value in record.items() if name not in ("cells", "ceilings")}
    text = json.dumps(head, indent=1)[:-2]
    text += ',\n "ceilings": [' + ",".join("\n  " + json.dumps(_rounded(entry)) for entry in record["ceilings"])
    text += '\n ],\n "cells": [' + ",".join(_dumps_cell(cell) for cell in record["cells"]) + "\n ]\n}\n"
    return text


def _dumps_cell(cell: dict[str, Any]) -> str:
    head = {name: value for name, value in cell.items() if name != "results"}
    lines = ",".join("\n    " + json.dumps(_rounded(result)) for result in cell["results"])
    return "\n  " + json.dumps(_rounded(head))[:-1] + ', "results": [' + lines + "\n  ]}"


def _rounded(value: Any) -> Any:
    """Five digits: more than any spread."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value


def check_continues(record: Mapping[str, Any], fresh: Mapping[str, Any], path: Path) -> None:
    """Whether a run may add its cells to ``record``.

    Raises:
        BenchError: another machine, other versions or other settings; says which.
    """
    for part in ("settings", "device", "versions", "commit"):
        old, new_ = record.get(part), fresh.get(part)
        if old != new_:
            raise BenchError(f"{path} was made with another {part}: {_difference(old, new_)}; --fresh starts it anew")


def _difference(old: Any, new_: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new_, Mapping):
        names = [name for name in {**old, **new_} if old.get(name) != new_.get(name)]
        return ", ".join(f"{name} was {old.get(name)!r} and is {new_.get(name)!r}" for name in names)
    return f"{old!r}, now {new_!r}"


def done(record: Mapping[str, Any]) -> set[CellKey]:
    """The cells that need not be measured again."""
    return {CellKey.of(cell) for cell in record["cells"]}
