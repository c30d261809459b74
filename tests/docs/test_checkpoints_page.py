"""docs/checkpoints.md: its blocks run, and it names every tensor that detection knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import moe_core.demo
from moe_core.checkpoints import known

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(moe_core.demo.__file__).parent / "data"
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(block.replace('"moe_core/demo/data"', repr(str(data))), scope)
    assert len(blocks) == 2
    assert scope["runner"].weights.w13_weight.shape == (8, 128, 192)
    assert (tmp_path / "layer.safetensors").exists()


def test_every_known_name_is_on_the_page() -> None:
    """By its components: the page writes stems and names apart."""
    groups = [entry for group in (*known.EXPERTS, *known.SHARED) for entry in group if entry.names[0] != entry.field]
    names = [name for entry in groups for name in entry.names]
    names += [name for field, several in known.SINGLE.items() for name in several if name != field]
    words = {*re.findall(r"\w+", PAGE), "weight", "bias", "e", ""}
    parts = {part for name in names for part in re.split(r"[./{}]", name)}
    assert not {part for part in parts if part not in words and part.removesuffix("_bias") not in words}
