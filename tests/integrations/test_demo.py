"""The demo as a user runs it: from the installed package, in an empty folder, with its figures checked."""

from __future__ import annotations

import json
import subprocess
import sys

from moe_core.demo.show import load_picture


def test_demo_in_an_empty_folder(tmp_path) -> None:
    command = [sys.executable, "-P", "-m", "moe_core", "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    bits = found["bits_per_byte"]
    assert set(bits) == {"ngram3", "transformers", "moe_core"}
    assert abs(bits["transformers"] - bits["moe_core"]) <= 1e-4
    assert bits["moe_core"] < bits["ngram3"]
    assert set(found["tokens_per_second"]) == {"transformers", "moe_core"} and found["seconds"] > 0
    assert found["backend"] == found["report"]["backend"]
    assert len(found["expert_load"]) == len(found["replaced"]) and all(sum(load) for load in found["expert_load"])
    assert found["continuation"].strip()
    assert not list(tmp_path.iterdir())


def test_the_load_is_drawn_from_nothing_to_the_busiest() -> None:
    assert load_picture([0, 1, 4, 8]) == " ▁▄█"
    assert load_picture([0, 0]) == "  "
