"""What ``pytest --pyargs moe_core.testing`` collects: the kit, on the backend of ``--moe-backend``."""

from __future__ import annotations

from .conformance import BackendConformance


class TestBackend(BackendConformance):
    """The backend that the command line names."""
