"""The script that takes the stream functions away judges right, and speaks of functions and tests that exist."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from moe_core import streams

GPU = Path(__file__).resolve().parents[2] / "gpu"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prove_streams", GPU / "prove_streams.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutation_has_a_function_and_tests_of_its_own(script) -> None:
    tree = ast.parse((GPU / "test_streams.py").read_text())
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    for name in script.MUTATIONS:
        assert callable(getattr(streams, name))
        assert any(test.startswith(f"test_{name}_") for test in tests), name


@pytest.mark.parametrize(
    ("without", "outcomes", "ok"),
    [
        ("nothing", {"test_fork_a": "passed", "test_join_a": "passed"}, True),
        ("nothing", {"test_fork_a": "passed", "test_join_a": "failed"}, False),
        ("nothing", {"test_fork_a": "skipped"}, False),
        ("nothing", {}, False),
        ("fork", {"test_fork_a": "failed", "test_join_a": "passed"}, True),
        ("fork", {"test_fork_a": "failed", "test_fork_b": "passed"}, False),
        ("fork", {"test_join_a": "failed"}, False),
        ("fork", {}, False),
    ],
)
def test_a_proof_needs_a_failure_of_each_test_that_is_named_after_it(script, without, outcomes, ok: bool) -> None:
    assert script.judge(without, outcomes)[0] is ok
