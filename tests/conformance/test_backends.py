"""The kit on the reference, on the loopback, and on every built-in backend that is usable here.

A row of ci/matrix.toml also runs it out of the installed package, where its own backend is required.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_core import backends
from moe_core.plugins import OWN_DISTRIBUTION
from moe_core.testing import BackendConformance, Loopback, registered
from moe_core.types import STAGES

USABLE = [status.name for status in backends() if status.status == "ok" and status.origin == OWN_DISTRIBUTION]

for _name in USABLE:
    globals()[f"Test_{_name}"] = type(f"Test_{_name}", (BackendConformance,), {"backend": _name})


@pytest.fixture(scope="class")
def loopback() -> Iterator[Loopback]:
    with registered(Loopback()) as plugin:
        yield plugin
    # The reference would have passed in its place.
    assert set(plugin.calls) == {"prepare", *STAGES}


@pytest.mark.usefixtures("loopback")
class TestLoopback(BackendConformance):
    """The whole kit through registration and dispatch: a fault here is the core's."""

    backend = "loopback"


def test_the_reference_is_among_them() -> None:
    assert "reference" in USABLE
