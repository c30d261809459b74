"""What the library never does: run text as code, or read a pickle. What is blocked is never imported: test_blocking."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

PACKAGES = ("moe_core", "moe_cpu", "moe_cuda", "moe_tpu")
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def sources() -> list[Path]:
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        found += sorted(Path(spec.origin).parent.rglob("*.py"))
    return found


def faults(tree: ast.AST) -> list[str]:
    """What is forbidden, with its line. torch.load reads a pickle too; a model's eval() is something else."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load" or called.removeprefix("builtins.") in FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: {called}")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_text_is_run_and_no_pickle_read(path: Path) -> None:
    assert faults(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "exec(code, {})",
        "builtins.exec(code)",
        "torch.load(path)",
        "__import__('os')",
    ],
)
def test_the_scan_sees_it(source: str) -> None:
    assert faults(ast.parse(source))
