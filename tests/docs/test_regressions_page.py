"""docs/regressions.md names every test that is there, under its number; the other numbers say what they wait for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "regressions.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
TESTS = {
    node.name: ast.get_docstring(node)
    for path in (*(ROOT / "tests" / "regressions").glob("test_*.py"), ROOT / "tests" / "gpu" / "test_regressions.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


def test_all_twenty_five_are_accounted_for() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 26))
    for number, cell in ROWS:
        assert "test_regression_" in cell or cell.startswith("waits for "), number


def test_each_number_has_its_tests_and_each_test_its_number() -> None:
    shown = {name for _, cell in ROWS for name in re.findall(r"test_regression_\w+", cell)}
    assert shown == {name for name in TESTS if name.startswith("test_regression_")}
    for number, cell in ROWS:
        for name in re.findall(r"test_regression_(\d\d)_", cell):
            assert int(name) == int(number)


def test_the_others_exist() -> None:
    assert set(re.findall(r"test_\w+", PAGE)) <= TESTS.keys()


def test_each_test_says_in_a_line_what_the_fault_was() -> None:
    assert [name for name, text in TESTS.items() if not text or "\n" in text] == []
