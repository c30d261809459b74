"""What would make this backend faster here: figures measured elsewhere, from benchmarks/."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from moe_core.platform import Platform

from . import strategies

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TOPOLOGY = Path("/sys/devices/system/cpu")


def advice(platform: Platform) -> list[str]:
    """One text for each thing to set."""
    return [text for text in (_compiler(platform), _threads(), _pages(PAGES)) if text]


def cores(topology: Path = TOPOLOGY) -> int:
    """Processor cores that this process may use; two hardware threads of one count once where Linux tells."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add((topology / f"cpu{cpu}/topology/thread_siblings_list").read_text("ascii"))
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def _compiler(platform: Platform) -> str:
    verdict = strategies.native(platform)
    if verdict.ok:
        return ""
    # benchmarks/cpu-strategies.json: 1 to 256 tokens, both dtypes.
    return f"{verdict.remedy} ({verdict.reason}): other strategies take 1.4 to 5.4 times as long as the native kernel"


def _threads() -> str:
    here, used = cores(), torch.get_num_threads()
    if used < here:
        # benchmarks/cpu-amx.json: geometric mean of 24 cells.
        return (
            f"set OMP_NUM_THREADS={here}: torch has {used} of {here} cores; a second one made layers 1.9 times faster"
        )
    if used > here:
        return f"set OMP_NUM_THREADS={here}: torch uses {used} threads on {here} cores, which then wait for each other"
    return ""


def _pages(setting: Path) -> str:
    try:
        never = "[never]" in setting.read_text("ascii")
    except OSError:
        return ""
    if not never:
        return ""
    # benchmarks/cpu-pages.json: geometric mean of 12 cells.
    return f"write madvise to {setting}: huge pages take 10 % off a call (3 to 28 %, bfloat16 on AMX)"
