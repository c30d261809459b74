"""docs/tpu.md is true: its figures are those of benchmarks/tpu-aot.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "Qwen3-30B-A3B": ("qwen3-30b-a3b", 1),
    "Mixtral-8x7B": ("mixtral-8x7b", 1),
    "DeepSeek-V3, one of 4 chips": ("deepseek-v3", 4),
}


def test_the_table_is_the_record() -> None:
    page = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "benchmarks" / "tpu-aot.json").read_text(encoding="utf-8"))
    assert f"libtpu {record['versions']['libtpu']}" in page
    by_name = {
        (row["model"], row["devices"], row["form"]): row
        for row in record["rows"]
        if row["chip"] == "v6e" and row["tokens"] == 2048 and "error" not in row
    }
    shown = re.findall(r"^\| (\S.*?) \| (ragged|gmm) \| (.+) \|$", page, flags=re.MULTILINE)
    assert len(shown) == 2 * len(MODELS)
    for model, form, figures in shown:
        row = by_name[(*MODELS[model], form)]
        assert figures.split(" | ") == [
            f"{row['flop_waste']:.2f}",
            f"{row['gigabytes']:.2f}",
            f"{row['temporaries_mb']:.0f}",
            f"{row['roofline_us']:.0f}",
            f"{row['floor_us']:.0f}",
        ], row
