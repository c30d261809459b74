"""The README is true: its example runs, its report is what moe_core prints, its commands are those that CI runs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import torch

from moe_core import MoEConfig
from moe_core.platform import Platform
from moe_core.plugins import registry
from moe_core.select import select
from moe_core.settings import Request

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    """The indented blocks."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip() for block in found if block.strip()]


def block(beginning: str) -> str:
    return next(found for found in blocks() if found.startswith(beginning))


def test_the_example_runs(capsys) -> None:
    scope: dict[str, object] = {}
    exec(compile(block("import torch"), "README.md", "exec"), scope)
    assert scope["y"].shape == (8, 256)
    assert capsys.readouterr().out.startswith("backend: ")


def test_the_report_is_what_moe_core_prints(tmp_path: Path) -> None:
    """On a machine made up of what decides: no accelerator, AVX2, a compiler on PATH."""
    (tmp_path / "c++").touch(mode=0o755)
    bare = {"triton": None, "torch_xla": None, "torch_tpu": None}
    env = {"PATH": str(tmp_path)}
    platform = Platform(torch.device("cpu"), torch.float32, cpu_capability="AVX2", packages=bare, env=env)
    report = select(registry(), Request(), MoEConfig(2048, 768, 128, 8), platform)
    shown = block("backend: ").splitlines()
    printed = [line.rstrip() for line in str(report).splitlines()]
    squeeze = [re.sub(r"\s+", " ", line).strip() for line in printed]
    assert [re.sub(r"\s+", " ", line).strip() for line in shown] == squeeze


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    command = next(line.strip() for line in README.splitlines() if line.startswith("    python3.11 -m venv .venv-test"))
    assert f"test_command='{command}'" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_path_that_it_names_exists() -> None:
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`|\]\(((?!http)[^)]+)\)", README):
        named = path[0] or path[1]
        assert (ROOT / named).exists(), named
