"""Real process groups: one torchrun for all cases of two ranks, one for four; each case is a test."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
MORE = ["moved_experts", "local_experts", "mismatch"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``results(world)``: case -> what it found; started once for each number of ranks."""

    @functools.cache
    def run(world: int) -> dict[str, dict[str, Any]]:
        out = tmp_path_factory.mktemp("ranks") / f"{world}.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += [ranks.__file__, "--out", str(out), *(["--die"] if world == 2 else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=environment)
        assert out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return {row["case"]: row for row in rows}

    return run


CASES = [(world, name) for world in (2, 4) for name in [*ranks.cases(world, "cpu"), *MORE]] + [(2, "bury")]


@pytest.mark.parametrize(("world", "name"), CASES, ids=lambda value: str(value))
@pytest.mark.timeout(200)
def test_ranks_equal_one_process(results: Any, world: int, name: str) -> None:
    found = results(world)
    assert name in found, f"the ranks did not get there; they finished {list(found)}"
    assert found[name]["ok"], found[name]
