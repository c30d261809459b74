"""docs/ is true: each hook with its arguments, each variable and each state stands in its page, and nothing else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from moe_core import hookspecs
from moe_core.types import TRAIT_DEFAULTS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("moe_") and callable(spec)}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def sources() -> str:
    folders = (ROOT / "moe_core", ROOT / "backends")
    return "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.rglob("*.py")))


def test_hooks_md_has_every_hook_with_its_arguments() -> None:
    shown = dict(re.findall(r"`(moe_\w+)\(([^)`]*)\)`", page("hooks.md")))
    assert shown == {name: ", ".join(inspect.signature(spec).parameters) for name, spec in HOOKS.items()}


def test_hooks_md_has_every_trait_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page("hooks.md"), flags=re.MULTILINE))
    defaults = {
        name: f'`"{value}"`' if isinstance(value, str) else str(value) for name, value in TRAIT_DEFAULTS.items()
    }
    assert rows == defaults


def test_env_md_has_every_variable() -> None:
    shown = set(re.findall(r"^\| `(MOE_CORE_\w+)`", page("env.md"), flags=re.MULTILINE))
    assert shown == set(re.findall(r"MOE_CORE_[A-Z_]+", sources()))


def test_selection_md_has_every_state() -> None:
    shown = set(re.findall(r"^\| `([\w-]+)` \|", page("selection.md"), flags=re.MULTILINE))
    assert shown == {"ok", "unavailable", "unsupported", "other-device", "broken", "incompatible", "disabled"}
    text = sources()
    assert all(f'"{state}"' in text for state in shown)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
