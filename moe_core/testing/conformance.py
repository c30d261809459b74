"""The conformance kit: every promise of the hooks, asked of one backend.

A backend's author writes one class, and pytest does the rest::

    from moe_core.testing import BackendConformance

    class TestToy(BackendConformance):
        backend = "toy"

The tests' names and their cases are public: ``expected_failures`` refers to them. They come in the order in which a
backend is best mended: what it says, invariants, single stages, whole layers, edges, memory, determinism, gradients.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest

from ..errors import SettingError
from .contract_checks import ContractChecks


class BackendConformance(ContractChecks):
    """Subclass it under a name that pytest collects.

    What the backend refuses through ``moe_supports`` is skipped with its own reason; everything else has to hold.

    Attributes:
        backend: the name under which it is registered.
        device: where to run; None is the accelerator where the backend serves it, or else the CPU.
        dtypes: to try; those that the backend refuses are skipped.
        sizes: fields of MoEConfig that replace :data:`moe_core.testing.SIZES`, for kernels with a smallest size;
            num_experts a multiple of 4, of at least 8, and top_k at most half of it.
        expected_failures: test id, such as ``"test_edge[odd_hidden-bfloat16]"``, -> why it fails today. Strict: a test
            that passes all the same fails, and so do an id that does not exist and an empty reason.
        require_backend: fail instead of skip where the backend cannot be used at all; also ``--require-backend``.
    """

    expected_failures: ClassVar[Mapping[str, str]] = {}
    pytestmark = pytest.mark.filterwarnings("ignore::moe_core.runner.FallbackWarning")  # one stage is enough to ship

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        known = cls.checks()
        for test, reason in cls.expected_failures.items():
            if test not in known:
                near = ", ".join(difflib.get_close_matches(test, known, 3, 0.5)) or "see pytest --collect-only"
                raise SettingError(f"expected_failures of {cls.__name__}: no test {test!r}; did you mean {near}?")
            if not isinstance(reason, str) or not reason.strip():
                raise SettingError(f"expected_failures of {cls.__name__}: {test!r} needs a reason, got {reason!r}")

    @classmethod
    def checks(cls) -> dict[str, Callable[[Any], None]]:
        """Test id -> the check as a function of an instance; in the kit's order."""
        found: dict[str, Callable[[Any], None]] = {}
        for owner in reversed(cls.__mro__):
            for name, function in vars(owner).items():
                if name.startswith("test_") and issubclass(ContractChecks, owner):
                    for suffix, arguments in cls.arguments_of(function).items():
                        found[f"{name}[{suffix}]" if suffix else name] = _call(name, arguments)
        return found

    @classmethod
    def arguments_of(cls, function: Any) -> dict[str, dict[str, Any]]:
        """Id -> arguments of one check; one empty id for a check without."""
        axes: list[list[tuple[str, str, Any]]] = []
        if getattr(function, "kit_cases", ()):
            axes.append([(case, "case", case) for case in function.kit_cases])
        if getattr(function, "kit_dtypes", False):
            axes.append([(str(dtype).removeprefix("torch."), "dtype", dtype) for dtype in cls.dtypes])
        products = itertools.product(*axes)
        return {"-".join(label for label, _, _ in p): {name: value for _, name, value in p} for p in products}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Cases and dtypes of this class."""
        wanted = self.arguments_of(metafunc.function)
        if "" not in wanted:
            names = list(next(iter(wanted.values())))
            values = [tuple(arguments.values()) for arguments in wanted.values()]
            metafunc.parametrize(names, values, ids=list(wanted))

    @pytest.fixture(autouse=True)
    def _settings(self, request: pytest.FixtureRequest) -> None:
        """Options of the command line, and this test's expected failure."""
        options, test = request.config.option, request.node.name
        chosen = self.backend or getattr(options, "moe_backend", None)
        if not chosen:
            pytest.fail(f"{type(self).__name__} names no backend: set its attribute, or pass --moe-backend=NAME")
        values = {"backend": chosen, "device": self.device or getattr(options, "moe_device", None)}
        values["require_backend"] = self.require_backend or getattr(options, "require_backend", False)
        self.__dict__.update(values)
        if test in self.expected_failures:
            request.applymarker(pytest.mark.xfail(reason=self.expected_failures[test], strict=True))


def _call(name: str, arguments: Mapping[str, Any]) -> Callable[[Any], None]:
    return lambda instance: getattr(instance, name)(**arguments)
