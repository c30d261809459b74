"""What the TPU compiler was recorded to say, and the parts of the tool that need no compiler. Nothing ran on a TPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core import MoEConfig
from moe_core.bench.shapes import parse_shape
from moe_tpu import aot
from moe_tpu.kernels.work import work_of
from moe_tpu.spec import spec_of
from moe_tpu.target import compiling_for
from moe_tpu.tuning import choose

RECORDED = Path(__file__).parents[3] / "benchmarks" / "tpu-aot.json"
ROWS: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))["rows"]
FITS = [row for row in ROWS if "error" not in row]
LARGE = [row for row in FITS if row["tokens"] >= 256]


def name_of(row: dict[str, Any]) -> str:
    return f"{row['model']}-{row['chip']}x{row['devices']}-{row['tokens']}-{row['form']}"


def rows(**wanted: Any) -> list[dict[str, Any]]:
    found = [row for row in FITS if all(row[name] == value for name, value in wanted.items())]
    assert found, wanted
    return found


def test_every_model_compiles_on_one_chip_or_a_slice() -> None:
    for model in aot.MODELS:
        for chip in ("v5e", "v6e"):
            for tokens in (16, 256, 2048):
                rows(model=model, chip=chip, tokens=tokens)
    for row in ROWS:
        if "error" in row:
            assert (row["model"], row["chip"], row["devices"]) == ("deepseek-v3", "v5e", 1)
            assert "Ran out of memory" in row["error"]


@pytest.mark.parametrize("row", LARGE, ids=name_of)
def test_products_waste_no_flops(row: dict[str, Any]) -> None:
    """At most 1.05 times the useful ones from 256 tokens on, on one chip and with the experts spread over four."""
    if row["devices"] > 1 and row["form"] == "ragged":
        pytest.skip("of XLA's grouped product every row counts, also those of experts on other chips")
    assert row["flop_waste"] <= 1.05


LARGER_TEMPORARIES = {
    "mixtral-8x7b": "1.28 times: gate and up are both written, each three times as wide as the rows",
    "deepseek-v3": "1.13 times: the rows, and the outputs in two orders",
}
"""Model -> how far XLA's grouped product is from the bar at 2048 tokens; the kernels keep it."""


@pytest.mark.parametrize("row", LARGE, ids=name_of)
def test_temporaries_are_the_activations_in_expert_order(row: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """At most 1.1 times what sorted rows, activated rows and outputs take together, from 256 tokens on."""
    if row["form"] == "ragged" and row["tokens"] == 2048 and row["model"] in LARGER_TEMPORARIES:
        request.applymarker(pytest.mark.xfail(reason=LARGER_TEMPORARIES[row["model"]], strict=True))
    assert row["temporaries_mb"] <= 1.1 * row["expert_order_mb"]


@pytest.mark.parametrize("row", LARGE, ids=name_of)
def test_the_table_takes_the_better_form(row: dict[str, Any]) -> None:
    """What tuning.py chooses is at most 2 % behind the other form in time, and keeps both bars above."""
    config = parse_shape(row["model"]).config("layer")
    spec = choose(spec_of(config), None, row["chip"], row["tokens"], config.top_k, config.hidden_size)
    same = {name: row[name] for name in ("model", "chip", "tokens", "devices")}
    [chosen] = rows(**same, form=spec.form)
    assert chosen["roofline_us"] <= 1.02 * row["roofline_us"]
    assert chosen["temporaries_mb"] <= 1.1 * chosen["expert_order_mb"]
    assert chosen["flop_waste"] <= 1.05


def test_roofline_of_qwen3_on_v6e() -> None:
    """At most 1.3 times the floor, also where activations are only what goes in and what comes out."""
    [row] = rows(model="qwen3-30b-a3b", tokens=2048, chip="v6e", form="gmm")
    assert row["roofline_waste"] <= 1.1
    least = aot.useful(parse_shape("qwen3-30b-a3b").config("layer"), 2048, 2)
    bytes_us = (least.gigabytes - 2e-3 * least.expert_order_mb) / aot.GIGABYTES_PER_SECOND["v6e"] * 1e6
    assert row["roofline_us"] <= 1.3 * max(bytes_us, least.gflop / aot.TERAFLOPS["v6e"] * 1e3)
    assert row["pallas_calls"] == 3


def test_expert_parallel_has_one_all_reduce() -> None:
    for row in rows(devices=4):
        assert row["collectives"] == {"all-reduce": 1}, row


def test_a_figure_that_grew_is_found() -> None:
    old = rows(devices=1)[0]
    assert aot.compare(ROWS, [old]) == []
    assert aot.compare(ROWS, [{**old, "gigabytes": old["gigabytes"] * 1.04}]) == []
    [worse] = aot.compare(ROWS, [{**old, "gigabytes": old["gigabytes"] * 1.06}])
    assert "gigabytes" in worse
    [worse] = aot.compare(ROWS, [{**old, "collectives": {"all-gather": 1}}])
    assert "all-gather" in worse
    key = {name: old[name] for name in ("model", "tokens", "chip", "form", "devices")}
    [worse] = aot.compare(ROWS, [{**key, "error": "Ran out of memory"}])
    assert "Ran out of memory" in worse


def test_useful_work_by_hand() -> None:
    config = MoEConfig(128, 64, 8, 2, shared_intermediate_size=32)
    least = aot.useful(config, 10, 2)
    assert least.gflop * 1e9 == 2 * (20 * 3 * 128 * 64 + 10 * (8 * 128 + 3 * 32 * 128))
    ordered = 20 * (2 * 128 + 64) * 2
    weights = (8 * 3 * 128 * 64 + 3 * 32 * 128 + 8 * 128) * 2
    assert round(least.gigabytes * 1e9) == weights + 2 * 10 * 128 * 2 + 2 * ordered


def test_work_of_a_call_counts_each_visit() -> None:
    """Two groups that meet in a tile: it is multiplied twice and read once, and every weight is read once."""
    tile = 2 * 16 * 128 * 256
    assert work_of(32, 2, 128, 256, 1, 2, [16, 16]).flops == 2 * tile
    met = work_of(32, 2, 128, 256, 1, 2, [10, 22])
    assert met.flops == 3 * tile
    assert met.bytes == 2 * 128 * 256 * 2 + 32 * 128 * 2 + 32 * 256 * 2


@pytest.mark.parametrize(("form", "expected"), [("ragged", b"ragged"), ("gmm", b"tpu_custom_call")])
def test_a_layer_is_traced_without_values(form: str, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a layer that would need 22 GB; lowered for a TPU, which needs no TPU and no libtpu."""
    monkeypatch.setenv("MOE_TPU_FORM", form)
    with compiling_for("v6e"), aot.lowering_for_tpu():
        graph = aot.trace_layer(parse_shape("deepseek-v3").config("layer"), 256, torch.bfloat16)
    assert expected in graph


@pytest.mark.skipif("TPU_LIBRARY_PATH" not in os.environ, reason="no libtpu to compile with: torch_xla found none")
@pytest.mark.parametrize(
    "what",
    [["--config=olmoe"], ["--config=deepseek-v3", "--devices=4", "--form=gmm"]],
    ids=["one chip", "four chips"],
)
def test_the_compiler_still_says_so(what: list[str]) -> None:
    """A layer compiled again, against the record."""
    command = [sys.executable, "-m", "moe_tpu.aot", "--chip=v6e", "--tokens=256", f"--check={RECORDED}", *what]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # those are for XLA's CPU device
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
