"""docs/parallel.md is true: its figures are those of benchmarks/parallel-h100x2.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"qwen3-30b-a3b": "Qwen3-30B-A3B", "deepseek-v3": "DeepSeek-V3"}


def test_the_table_is_the_record() -> None:
    page = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    cells = json.loads((ROOT / "benchmarks" / "parallel-h100x2.json").read_text(encoding="utf-8"))["cells"]
    ways = re.search(r"^\| layer \| tokens \| one device, us \| (.+) \|$", page, flags=re.MULTILINE)
    assert ways
    shown = re.findall(r"^\| (Qwen3|DeepSeek)(\S+) \| (\d+) \| (.+) \|$", page, flags=re.MULTILINE)
    assert len(shown) == len(cells)
    for (maker, rest, tokens, figures), cell in zip(shown, cells, strict=True):
        assert (maker + rest, int(tokens)) == (LAYERS[cell["shape"]["name"]], cell["tokens"])
        found = {way: cell["ways"].get(way, {}) for way in ways[1].split(" | ")}
        assert set(cell["ways"]) <= set(found)
        speed_ups = [f"{way['speed_up']:.2f}" if way.get("status") == "ok" else "-" for way in found.values()]
        assert figures.split(" | ") == [f"{cell['one']['median'] * 1e6:.0f}", *speed_ups]
