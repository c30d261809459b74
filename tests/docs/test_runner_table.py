"""docs/runner.md speaks of what exists: every place is importable, every test is there, no row is missing."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "runner.md").read_text(encoding="utf-8")
TABLES = PAGE.partition("\n## Streams")[0].splitlines()  # of rows and of defects
LINES = [line for line in TABLES if line.startswith("| ") and not line.startswith(("| row", "| defect"))]
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in LINES]


def defined_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_and_every_defect_is_there() -> None:
    numbers = [cells[0] for cells in ROWS if len(cells) == 4]
    assert list(dict.fromkeys(numbers)) == [str(number) for number in range(1, 20)]
    assert [cells[0][0] for cells in ROWS if len(cells) == 2] == list("abcdefg")


def test_every_test_exists() -> None:
    for path, name in set(re.findall(r"`(tests/\S+?\.py)::(\w+)`", PAGE)):
        assert name in defined_in(path), f"{path}::{name}"


def test_every_place_can_be_imported() -> None:
    for dotted in set(re.findall(r"`(moe_core\.[\w.]+)`", PAGE)):
        parts = dotted.split(".")
        for split in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:split]))
            except ModuleNotFoundError:
                continue
            break
        for name in parts[split:]:
            found = getattr(found, "__annotations__", {}).get(name) or getattr(found, name)


def test_a_row_has_a_place_and_a_test() -> None:
    for cells in ROWS:
        for cell in cells[2:] if len(cells) == 4 else cells[1:]:
            assert "`" in cell, cells
    for path in set(re.findall(r"`(tests/\S+?\.py)`", PAGE)):
        assert (ROOT / path).exists()
