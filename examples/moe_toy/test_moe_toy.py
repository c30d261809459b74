"""All the tests that a backend needs: moe_core's conformance kit."""

from moe_core.testing import BackendConformance


class TestToy(BackendConformance):
    """What the toy refuses is skipped with its own reason; everything else has to hold."""

    backend = "toy"
