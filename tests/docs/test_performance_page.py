"""docs/performance.md is true: its commands parse, and it names every shape, peer, reason and option that matters."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moe_core.bench import record as records
from moe_core.bench import registry
from moe_core.bench.cli import parser
from moe_core.bench.shapes import SHAPES, STAGES, parse_shape

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:moe-core bench|python -m moe_core\.bench) (.*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(command: str) -> None:
    options = parser().parse_args(shlex.split(command))
    for text in options.shapes.split(","):
        assert text == "all" or parse_shape(text)


def test_it_names_every_shape_stage_peer_and_reason() -> None:
    peers = {*registry.names("cpu"), *registry.names("cuda")}
    for name in (*SHAPES, *STAGES, *peers, *registry.REASONS):
        assert f"`{name}`" in PAGE, name


def test_it_names_no_option_that_is_not_there() -> None:
    known = {option for action in parser()._actions for option in action.option_strings}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE)) | set(re.findall(r" (--[a-z-]+)", " ".join(COMMANDS)))
    assert named <= known, named - known


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("cpu-*.json")), ids=lambda path: path.name)
def test_committed_records_are_valid_complete_and_small(path: Path) -> None:
    record = records.load(path)
    assert record["complete"] and record["command"].startswith("moe-core bench ")
    assert path.stat().st_size < 200_000
    parser().parse_args(shlex.split(record["command"])[2:])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("cpu-*.json")), ids=lambda path: path.name)
def test_committed_records_hold_no_wrong_moe_core(path: Path) -> None:
    for cell in records.load(path)["cells"]:
        for result in cell["results"]:
            assert result["kind"] == "peer" or result["status"] == "ok"
