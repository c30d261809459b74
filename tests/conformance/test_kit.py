"""The kit as its users meet it: a subclass, a command line, expected failures, and an import that needs no pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moe_core
from moe_core.errors import SettingError
from moe_core.testing import BackendConformance

pytest_plugins = ["pytester"]
KIT = ("-p", "moe_core.testing.pytest_plugin", "-p", "no:cacheprovider", "--pyargs", "moe_core.testing")
AUTHOR = """
from moe_core.testing import BackendConformance

class TestToy(BackendConformance):
    backend = "{backend}"
    {attributes}
"""


def author(pytester: pytest.Pytester, backend: str = "reference", attributes: str = "pass") -> None:
    """A third party's test file; nothing else is there."""
    pytester.makepyfile(test_toy=AUTHOR.format(backend=backend, attributes=attributes))


def test_a_subclass_is_all_that_an_author_writes(pytester: pytest.Pytester) -> None:
    author(pytester)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "test_ids or test_same_bits")
    chosen = [check for check in BackendConformance.checks() if check.startswith(("test_ids", "test_same_bits"))]
    result.assert_outcomes(passed=len(chosen), deselected=len(BackendConformance.checks()) - len(chosen))


def test_the_installed_package_tests_a_backend_by_name(pytester: pytest.Pytester) -> None:
    chosen = ("-k", "test_usable or test_experts and silu-", "--moe-backend=reference", "--require-backend")
    result = pytester.runpytest_inprocess(*KIT, *chosen)
    result.assert_outcomes(passed=4, deselected=len(BackendConformance.checks()) - 4)
    result.stdout.fnmatch_lines(["moe_core conformance of reference: 4 passed, 0 skipped, 0 failed"])


def test_a_refusal_is_a_skip_with_the_backends_own_words(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(*KIT, "-k", "test_layer_dtype", "--moe-backend=cpu")
    result.stdout.fnmatch_lines(["* x cpu says no: *: * (*use *)"])


def test_no_backend_named_is_an_error(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(*KIT, "-k", "test_usable")
    result.stdout.fnmatch_lines(["*TestBackend names no backend: set its attribute, or pass --moe-backend=NAME"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_an_unknown_backend_is_an_error(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(*KIT, "--moe-backend=nobody")
    result.stderr.fnmatch_lines(["ERROR: --moe-backend=nobody: known are *reference*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_an_unusable_backend_skips_unless_it_is_required(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_CORE_DISABLE", "cpu")
    result = pytester.runpytest_inprocess(*KIT, "-k", "test_usable or test_same_bits", "--moe-backend=cpu")
    result.assert_outcomes(skipped=2, deselected=len(BackendConformance.checks()) - 2)
    result.stdout.fnmatch_lines(["*cpu cannot be used here: disabled: blocked by MOE_CORE_DISABLE*"])
    result = pytester.runpytest_inprocess(*KIT, "--moe-backend=cpu", "--require-backend")
    result.stderr.fnmatch_lines(["ERROR: --require-backend: cpu is disabled: blocked by MOE_CORE_DISABLE; *"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    author(pytester, "cpu", "require_backend = True")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "test_same_bits", "test_toy.py")
    result.assert_outcomes(failed=1, deselected=len(BackendConformance.checks()) - 1)


def test_a_required_backend_that_refuses_everything_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest
        from moe_core.testing import Loopback, registered

        @pytest.fixture(autouse=True, scope="session")
        def nothing():
            with registered(Loopback("nothing", refuse={"experts": "not today"})):
                yield
        """
    )
    author(pytester, "nothing", "require_backend = True")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "test_usable")
    result.assert_outcomes(failed=1, deselected=len(BackendConformance.checks()) - 1)
    result.stdout.fnmatch_lines(
        ["*nothing cannot be used here: it refuses every layer of the kit: experts: not today*"]
    )


def test_expected_failures_are_strict(pytester: pytest.Pytester) -> None:
    author(pytester, attributes='expected_failures = {"test_same_bits": "atomics"}')
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "test_same_bits")
    result.assert_outcomes(failed=1, deselected=len(BackendConformance.checks()) - 1)
    result.stdout.fnmatch_lines(["*XPASS(strict)*atomics*"])


def test_an_expected_failure_that_fails_is_no_failure(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest, torch
        from moe_core import hookimpl, reference
        from moe_core.testing import Loopback, registered

        class Noisy(Loopback):
            @hookimpl
            def moe_experts(self, plan, hidden_states, routing):
                out = reference.moe_experts(self.unwrap(plan, "experts"), hidden_states, routing)
                return out._replace(value=out.value + torch.rand(1) * 1e-7)

        @pytest.fixture(autouse=True, scope="session")
        def noisy():
            with registered(Noisy("noisy")):
                yield
        """
    )
    author(pytester, "noisy", 'expected_failures = {"test_same_bits": "atomics"}')
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rx", "-k", "test_same_bits")
    result.assert_outcomes(xfailed=1, deselected=len(BackendConformance.checks()) - 1)
    result.stdout.fnmatch_lines(["XFAIL test_toy.py::TestToy::test_same_bits - atomics"])


@pytest.mark.parametrize(
    ("test", "reason", "text"),
    [
        ("test_same_bit", "atomics", "no test 'test_same_bit'; did you mean test_same_bits"),
        ("test_edge[odd_hiden-float32]", "why", "did you mean test_edge[odd_hidden-float32]"),
        ("test_same_bits", " ", "'test_same_bits' needs a reason"),
        ("test_same_bits", None, "'test_same_bits' needs a reason"),
    ],
)
def test_an_expected_failure_names_a_test_and_a_reason(test: str, reason: str | None, text: str) -> None:
    with pytest.raises(SettingError, match="expected_failures of Wrong") as caught:
        type("Wrong", (BackendConformance,), {"backend": "reference", "expected_failures": {test: reason}})
    assert text in str(caught.value)


def test_a_class_may_narrow_dtypes_and_sizes() -> None:
    class Narrow(BackendConformance):
        backend = "reference"
        dtypes = ("float64",)
        sizes = {"hidden_size": 64}  # noqa: RUF012

    assert "test_edge[tile-float64]" in Narrow.checks()
    assert "test_edge[tile-float32]" not in Narrow.checks()
    assert Narrow().config({}).hidden_size == 64


def test_checks_are_what_pytest_collects(pytester: pytest.Pytester) -> None:
    author(pytester)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--collect-only", "-q")
    collected = [line.rpartition("::")[2] for line in result.outlines if "::" in line]
    assert collected == list(BackendConformance.checks()), "same ids in the same order"


FREE = """
import sys
import moe_core
from moe_core.testing import Loopback, registered, tolerance
assert "pytest" not in sys.modules, "importing moe_core.testing imported pytest"
"""


def test_only_the_kit_itself_imports_pytest() -> None:
    root = str(Path(moe_core.__file__).parents[1])
    subprocess.run([sys.executable, "-c", FREE], check=True, timeout=120, cwd=root)
