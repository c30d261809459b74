"""moe-core bench: what a record must hold, how it is written and continued, and what a comparison says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_core.bench import record as records
from moe_core.bench.compare import compare
from moe_core.bench.runner import add_ratios
from moe_core.bench.show import blocks, markdown, print_comparison, print_record
from moe_core.errors import BenchError


def times(median: float, spread: float = 0.1) -> dict[str, Any]:
    return {"median": median, "p10": median - spread, "p90": median + spread, "min": median - spread, "n": 9}


def result(name: str, kind: str, median: float) -> dict[str, Any]:
    found = {"name": name, "kind": kind, "status": "ok", "error": 1e-7, "times": {"host/read": times(median)}}
    return {**found, "worker": "main"}


def make(*results: dict[str, Any]) -> dict[str, Any]:
    rate = {"best": 2e10, "median": 1.9e10, "p10": 1.8e10, "p90": 2e10, "n": 7, "how": "sum"}
    device = {"type": "cpu", "name": "a processor", "driver": "Linux 6", "memory_bytes": 2**34, "cores": 2}
    versions = {"python": "3.11", "torch": "2.13", "moe_core": "0.1.0"}
    record = records.new("moe-core bench", device, versions, {"budget": 0.5}, "abc")
    ceilings = {"date": records.now(), "dtype": "float32", "threads": 1, "load_average": 0.1}
    record["ceilings"].append({**ceilings, "copy": rate, "read": rate, "matmul": rate})
    cell = {
        "shape": {"name": "small", "hidden_size": 1024, "num_experts": 32, "top_k": 4},
        "stage": "experts",
        "tokens": 4,
        "dtype": "float32",
        "threads": 1,
        "date": records.now(),
        "load_average": [0.1, 0.4],
        "other_busy_cores": 0.02,
        "experts_hit": 12.5,
        "bytes": 1e6,
        "flops": 1e6,
        "floor": {"seconds": 2.0, "bound": "memory"},
        "ceilings": 0,
        "results": list(results) or [result("moe_core", "moe_core", 4.0), result("loop", "peer", 5.0)],
    }
    add_ratios(cell)
    record["cells"].append(cell)
    return record


MISSING = [
    "device", "device.driver", "device.name", "versions", "versions.torch", "date", "settings", "ceilings",
    "ceilings.0.read", "ceilings.0.read.p10", "ceilings.0.date", "cells", "cells.0.date", "cells.0.load_average",
    "cells.0.floor", "cells.0.experts_hit", "cells.0.results.0.status", "cells.0.results.0.error",
    "cells.0.results.0.times.host/read.p10", "cells.0.results.0.times.host/read.p90",
    "cells.0.results.0.times.host/read.n",
]  # fmt: skip


@pytest.mark.parametrize("path", MISSING)
def test_a_record_without_it_is_refused(path: str) -> None:
    record = make()
    records.validate(record)
    *parents, last = path.split(".")
    inner: Any = record
    for part in parents:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    del inner[last]
    with pytest.raises(BenchError, match=f"{last} is missing"):
        records.validate(record)


def test_values_of_the_wrong_kind_are_refused() -> None:
    record = make()
    record["date"] = "yesterday"
    with pytest.raises(BenchError, match="'yesterday': expected an ISO date"):
        records.validate(record)
    record = make()
    record["device"]["driver"] = ""
    with pytest.raises(BenchError, match="driver is empty"):
        records.validate(record)
    record = make()
    record["cells"][0]["ceilings"] = 3
    with pytest.raises(BenchError, match="expected an index into record.ceilings"):
        records.validate(record)
    with pytest.raises(BenchError, match="schema=0: expected 1"):
        records.validate({**make(), "schema": 0})


def test_a_wrong_result_with_a_time_is_refused() -> None:
    record = make()
    record["cells"][0]["results"][1]["status"] = "wrong"
    with pytest.raises(BenchError, match="what fails its check is never timed"):
        records.validate(record)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    record, path = make(), tmp_path / "deep" / "out.json"
    records.save(record, path)
    assert records.load(path) == record
    assert not list(path.parent.glob("*.part"))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(BenchError, match="no JSON"):
        records.load(path)
    with pytest.raises(BenchError, match="No such file"):
        records.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("device", "name", "another"), ("versions", "torch", "2.14"), ("settings", "budget", 9)],
)
def test_another_machine_or_setting_does_not_continue_a_record(part: str, name: str, value: Any) -> None:
    old, fresh = make(), make()
    records.check_continues(old, fresh, "out.json")
    fresh[part][name] = value
    with pytest.raises(BenchError, match=rf"out.json was made with another {part}: {name} was .* and is .*--fresh"):
        records.check_continues(old, fresh, "out.json")


def test_ratios() -> None:
    cell = make(result("moe_core", "moe_core", 4.0), result("loop", "peer", 5.0), result("other", "peer", 3.0))[
        "cells"
    ][0]
    assert cell["best_peer"]["host/read"] == {"name": "other", "median": 3.0}
    ours = cell["results"][0]["times"]["host/read"]
    assert ours["floor_fraction"] == 0.5 and ours["over_best_peer"] == 0.75
    assert "over_best_peer" not in cell["results"][1]["times"]["host/read"]


def test_a_comparison_names_only_what_moved_beyond_both_spreads() -> None:
    before = make(result("moe_core", "moe_core", 4.0), result("loop", "peer", 5.0), result("gone", "peer", 1.0))
    after = make(result("moe_core", "moe_core", 3.7), result("loop", "peer", 5.15), result("new", "peer", 1.0))
    found = compare(before, after)
    assert [(change.name, change.moved) for change in found.changes] == [("moe_core", "faster"), ("loop", "")]
    assert [change.name for change in found.moved] == ["moe_core"]
    assert found.moved[0].ratio == pytest.approx(3.7 / 4)
    assert compare(after, before).moved[0].moved == "slower"
    assert "gone" in found.only_before[0] and "new" in found.only_after[0]
    assert not found.warnings


def test_a_comparison_warns_of_another_machine() -> None:
    other = make()
    other["device"]["name"] = "a newer one"
    found = compare(make(), other)
    assert found.warnings == ["device.name: 'a processor', then 'a newer one'"]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(found, console)
    text = console.export_text()
    assert "differs device.name" in text and "0 of 2 times moved" in text
    console.file.close()


def test_tables_show_the_floor_the_ratios_and_every_reason() -> None:
    wrong = {"name": "bad", "kind": "peer", "status": "wrong", "error": 0.3, "allowed": 1e-5}
    reason = {"kind": "not_installed", "reason": "vllm is not installed", "remedy": "pip install vllm"}
    missing = {"name": "vllm", "kind": "peer", "status": "unavailable", "reason": reason}
    record = make(result("moe_core", "moe_core", 4.0), result("loop", "peer", 5.0), wrong, missing)
    records.validate(record)
    (block,) = blocks(record)
    row = dict(zip(block.header, block.rows[0], strict=True))
    assert row["floor/time"] == "0.50" and row["best peer/time"] == "1.25" and row["loop"].endswith("*")
    assert row["bad"] == "WRONG 3e-01" and row["vllm"] == "- not_installed"
    assert any("never timed" in note or "not timed" in note for note in block.notes)
    assert any("pip install vllm" in note for note in block.notes)
    page = markdown(record)
    for fact in ("a processor", "torch 2.13", "load average 0.10 to 0.40", "read 20.0 GB/s", "not complete"):
        assert fact in page
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_record(record, console)
    assert "WRONG" in console.export_text()
    console.file.close()


def test_charts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts are an extra: moe-core[bench]")
    from moe_core.bench.plot import plot

    record = make()
    more = copy.deepcopy(record["cells"][0])
    more["tokens"] = 16
    record["cells"].append(more)
    made = plot(record, tmp_path)
    assert [path.name for path in made] == [
        "experts-float32-1t-host-read-time.svg",
        "experts-float32-1t-host-read-ratio.svg",
    ]
    drawn = [path.read_text() for path in made]
    assert "floor" in drawn[0] and "loop" in drawn[0] and "1.25" in drawn[1]
    plot(record, tmp_path / "again")
    assert (tmp_path / "again" / made[0].name).read_text() == drawn[0]


def test_a_file_has_one_result_a_line() -> None:
    text = records.dumps(make())
    assert json.loads(text)["cells"][0]["results"][1]["name"] == "loop"
    line = next(line for line in text.splitlines() if line.startswith('    {"name": "loop"'))
    assert json.loads(line)["times"]["host/read"]["n"] == 9
