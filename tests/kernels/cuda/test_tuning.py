"""Choices of block sizes: from the table, from the nearest shape, from rules; every number of tokens has one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moe_cuda import quant_tuning, tune, tuning
from moe_cuda.candidates import neighbours
from moe_cuda.tune import changed
from moe_cuda.tuning import Dot, Few, Grouped, Pairs, Shape, Tile

LAYER = Shape(2048, 768, 128, 8)
CHOICES = (
    Few(16, 256, 4, 4, 256, 4, 2),
    Pairs(Dot(32, 128, 4, 3), Dot(64, 64, 4, 4, True)),
    Grouped(64, Tile(128, 64, 8, 3, 1, 16, True), Tile(256, 64, 8, 4, flatten=True)),
)
TALL = Grouped(128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``table(shape=..., tokens={...})`` writes a table of one entry for the device "some GPU"."""

    def write(shape: Shape, tokens: dict[int, Any], capability: str = "") -> None:
        entry = {
            "shape": [shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k],
            "dtype": "bfloat16",
            "quant": None,
            "triton": "3.6.0",
            "tokens": {str(t): {**tuning.to_json(choice), "us": 1.0} for t, choice in tokens.items()},
        }
        (tmp_path / "some_GPU.json").write_text(
            json.dumps({"device": "some GPU", "capability": capability, "entries": [entry]})
        )

    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "own"))
    return write


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: type(choice).__name__)
def test_a_choice_survives_json(choice: Any) -> None:
    assert tuning.from_json(json.loads(json.dumps(tuning.to_json(choice)))) == choice


@pytest.mark.parametrize("shape", [LAYER, Shape(4096, 14336, 8, 2), Shape(64, 24, 3, 1), Shape(7168, 2048, 256, 8)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rules_serve_every_number_of_tokens(shape: Shape, dtype: str) -> None:
    choose = tuning.choices(shape, dtype, "a GPU without a table", interpreted=False)
    assert "no table" in choose.source
    for tokens in (1, 2, 3, 5, 63, 64, 65, 1000, 4097, 2**20, 2**30):
        choice = choose(tokens)
        assert not isinstance(choice, Pairs) or tokens * shape.top_k <= tuning.PAIRS_AT_MOST


def test_a_device_without_a_table_takes_that_of_its_capability(table: Any) -> None:
    table(LAYER, {1: CHOICES[0]}, capability="9.0")
    choose = tuning.choices(LAYER, "bfloat16", "its sister", False, "9.0")
    assert choose(1) == CHOICES[0] and "some GPU" in choose.source and "its sister has no table" in choose.source
    assert "rules of thumb" in tuning.choices(LAYER, "bfloat16", "its sister", False, "8.0").source


def test_the_layers_own_entry(table: Any) -> None:
    table(LAYER, {1: CHOICES[0], 16: CHOICES[1], 1024: CHOICES[2]})
    choose = tuning.choices(LAYER, "float16", "some GPU", interpreted=False)
    assert choose.source == "tuned on some GPU with triton 3.6.0"
    assert [choose(tokens) for tokens in (1, 16, 1024)] == list(CHOICES)
    assert choose(64) == CHOICES[1] and choose(128) == CHOICES[2], "pairs only as far as they reach"
    assert choose(2**20) == CHOICES[2]


def test_the_nearest_shape_is_named_and_scaled_by_rows(table: Any) -> None:
    """Half as many experts: as many rows an expert at half as many tokens."""
    table(LAYER, {1: CHOICES[0], 16: CHOICES[1], 512: CHOICES[2], 2048: TALL})
    choose = tuning.choices(Shape(2048, 1024, 64, 8), "bfloat16", "some GPU", interpreted=False)
    assert "nearest shape (2048, 768, 128, 8), not for (2048, 1024, 64, 8)" in choose.source
    assert choose(1) == CHOICES[0]
    assert choose(256) == CHOICES[2] and choose(1024) == TALL


def test_the_machines_own_table_comes_first(table: Any, tmp_path: Path) -> None:
    table(LAYER, {1024: TALL})
    own = tuning.own_table("some GPU")
    own.parent.mkdir(parents=True)
    own.write_text((tmp_path / "some_GPU.json").read_text().replace('"rows": 128', '"rows": 64'))
    table(LAYER, {1: CHOICES[0], 1024: TALL})
    choose = tuning.choices(LAYER, "bfloat16", "some GPU", interpreted=False)
    assert choose(1024) == dataclasses.replace(TALL, rows=64)
    assert choose(1) == CHOICES[0], "what it has not measured comes from the other table"


def test_a_shape_measured_at_few_tokens_takes_the_rest_from_the_next(table: Any, tmp_path: Path) -> None:
    mine = Shape(2048, 1024, 64, 8)
    table(mine, {1: CHOICES[0]})
    own = tuning.own_table("some GPU")
    own.parent.mkdir(parents=True)
    own.write_text((tmp_path / "some_GPU.json").read_text())
    table(LAYER, {1: CHOICES[2], 1024: TALL})
    choose = tuning.choices(mine, "bfloat16", "some GPU", interpreted=False)
    assert choose(1) == choose(4) == CHOICES[0], "near enough"
    assert choose(512) == TALL, "as many rows an expert"


@pytest.mark.parametrize("changes", [{"rows": 192}, {"rows": 256, "turned": True}])
def test_tiles_that_only_the_loader_has_become_lower_elsewhere(table: Any, changes: dict[str, Any]) -> None:
    table(LAYER, {1: CHOICES[0], 1024: dataclasses.replace(TALL, **changes)})
    choose = tuning.choices(LAYER, "bfloat16", "some GPU", interpreted=False)
    assert choose(1024) == dataclasses.replace(TALL, **changes)
    lower = choose.without_tall_tiles()
    assert (lower(1024).rows, lower(1024).first.n, lower(1024).second.n) == (128, 128, 256) and lower(1) == choose(1)
    assert not lower(1024).turned
    assert lower.source == choose.source


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize(
    "choice",
    [*CHOICES, TALL, dataclasses.replace(TALL, rows=192), dataclasses.replace(TALL, rows=256, turned=True)],
    ids=str,
)
def test_a_search_around_a_choice_has_it_and_stays_in_its_form(choice: Any, loader: bool) -> None:
    starts = neighbours(choice, loader)
    assert starts[0][0] == choice
    found = [changed(start, part, value) for start, axes in starts for part, values in axes.items() for value in values]
    assert choice in found and len(set(found)) > 2
    assert {type(other) for other in found} == {type(choice)}
    heights = {other.rows for other in found if isinstance(other, Grouped)}
    if isinstance(choice, Grouped):
        assert heights <= ({choice.rows, 128, 192} if loader else {choice.rows})


def test_a_choice_of_two_searches_is_timed_once_and_known_to_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second search begins with what the first has timed, and still starts its other part from the faster one."""
    tiles = [Tile(64, 64, 4, stages) for stages in (3, 4)]
    slow, fast = (Grouped(64, tile, tiles[0]) for tile in tiles)
    better = dataclasses.replace(fast, second=tiles[1])
    took = {slow: 9.0, fast: 5.0, better: 4.0}
    timed: list[Any] = []

    class Clock:
        def microseconds(self, call: Any) -> float:
            timed.append(call.args[1])
            return took.get(call.args[1], 99.0)

        def in_turn(self, calls: Any, seconds: float) -> list[float]:
            return [took.get(call.args[1], 99.0) for call in calls]

    monkeypatch.setattr(tune, "draw", lambda *_: (torch.ones(2, 2), None))
    monkeypatch.setattr(tune.experts, "run", lambda plan, choice, x, routing, out: out.copy_(x))
    starts = [(slow, {"first": tiles}), (slow, {"first": tiles, "second": [tiles[1]]})]
    plan: Any = SimpleNamespace(device="cpu")
    clock: Any = Clock()
    found = tune.search(plan, LAYER, 64, clock, set(), starts)
    assert tuning.from_json(found) == better
    assert timed == [slow, fast, better]


def test_tables_that_are_shipped_can_be_read() -> None:
    for path in tuning.shipped():
        record = json.loads(path.read_text())
        assert path.stem == record["device"].replace(" ", "_")
        for entry in record["entries"]:
            choose = tuning.choices(Shape(*entry["shape"]), entry["dtype"], record["device"], interpreted=False)
            assert choose.source.startswith("tuned on")


def test_tables_of_quantised_experts_can_be_read() -> None:
    paths = sorted(tuning.TABLES.glob(f"{tuning.QUANTISED}*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        assert path.stem == tuning.QUANTISED + record["device"].replace(" ", "_")
        for entry in record["entries"]:
            found = quant_tuning.forms(
                Shape(*entry["shape"]), entry["kind"], record["device"], False, None, entry["quant"]
            )
            for tokens, form in entry["tokens"].items():
                assert found(int(tokens)) == quant_tuning.from_json(form)


def test_a_product_of_eight_pairs_serves_no_expert_that_has_many() -> None:
    """Its programs would read the weights again for each further eight pairs."""
    mixtral, wide = Shape(4096, 14336, 8, 2), Shape(7168, 2048, 256, 8)
    device = "NVIDIA H100 80GB HBM3"
    found = [quant_tuning.forms(shape, "words4", device, False, quant="mxfp4") for shape in (mixtral, wide)]
    assert [form(16).rows for form in found] == [quant_tuning.MMA_ROWS] * 2
    assert found[1](64).rows == quant_tuning.MMA_ROWS
    assert found[0](64) == quant_tuning.LED
