"""docs/routing.md is true: its table is the one that the tests run, each row routes, its example runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import torch

from moe_core import MoEConfig, MoERunner
from moe_core.testing import CALL_FAMILIES, ROUTER_FAMILIES, SIZES, cases, random_weights

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (\w+) \| ([^|]+) \|([^|]*)\| ([^|]+) \|$", PAGE, flags=re.MULTILINE)


def fields_of(cell: str) -> dict[str, object]:
    """The keyword arguments as they are written."""
    return eval(f"dict({cell.strip().strip('`')})", vars(cases))


def test_the_table_is_the_one_that_the_tests_run() -> None:
    shown = {name: fields_of(cell) for _, name, _, cell, _ in ROWS}
    assert shown == {name: dict(fields) for name, fields in {**ROUTER_FAMILIES, **CALL_FAMILIES}.items()}
    assert {int(number) for number, *_ in ROWS} == set(range(1, 16)), "all families; 16 has a section of its own"
    assert len({formula for _, _, formula, _, _ in ROWS}) > 15


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_each_row_is_a_layer(row: tuple[str, ...]) -> None:
    config = MoEConfig(**{**SIZES, **fields_of(row[3])})
    runner = MoERunner(config, random_weights(config))
    out = runner(torch.randn(9, 32), input_ids=torch.arange(9))
    assert torch.isfinite(out).all() and out.abs().sum() > 0


def test_the_models_are_those_of_transformers() -> None:
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        pytest.skip("transformers is not installed in this row")
    version = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
    if version < (5, 23):
        pytest.skip("the page names models that this transformers does not have yet")
    [location] = found.submodule_search_locations
    there = {path.name for path in (Path(location) / "models").iterdir()}
    for _, name, _, _, models in ROWS:
        if not models.startswith("none"):
            words = re.split(r"[,;] | and | with .*?(?=;|$)|, see.*|, first.*", models)
            named = [word.strip() for word in words if word and re.fullmatch(r"[a-z0-9_]+", word.strip())]
            assert named and set(named) <= there, (name, set(named) - there)


def test_the_example_runs() -> None:
    [example] = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, flags=re.MULTILINE)
    scope: dict[str, object] = {}
    exec(compile(textwrap.dedent(example), "docs/routing.md", "exec"), scope)
    assert scope["y"].shape == (8, 32)
