"""What doctor says of this backend: what is missing, and nothing where nothing is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from moe_core.platform import Platform
from moe_cpu import advice


def platform(**env: str) -> Platform:
    return Platform(torch.device("cpu"), torch.float32, cpu_capability="AVX2", env={**os.environ, **env})


def test_nothing_to_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always [madvise] never")
    monkeypatch.setattr(advice, "PAGES", tmp_path / "enabled")
    monkeypatch.setattr(torch, "get_num_threads", advice.cores)
    found = advice.advice(platform())
    assert not [text for text in found if "compiler" not in text]


@pytest.mark.parametrize("difference", [-1, 1])
def test_threads_that_are_not_the_cores(monkeypatch: pytest.MonkeyPatch, difference: int) -> None:
    monkeypatch.setattr(advice, "cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8 + difference)
    assert any(text.startswith("set OMP_NUM_THREADS=8") for text in advice.advice(platform()))


def test_hardware_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a processor that says nothing of its cores counts for itself."""
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4}, raising=False)
    assert advice.cores(tmp_path) == 3


def test_huge_pages_that_are_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]")
    monkeypatch.setattr(advice, "PAGES", tmp_path / "enabled")
    assert any("huge pages" in text for text in advice.advice(platform()))


def test_a_compiler_that_is_missing() -> None:
    assert any("native kernel" in text for text in advice.advice(platform(CXX="no-such-compiler", PATH="")))
