"""For authors of backends: the conformance kit, its cases and its tolerances, and a loopback backend.

Only ``BackendConformance`` needs pytest, and imports it when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from .cases import (
    CALL_FAMILIES,
    EXPERT_VARIANTS,
    QUANT_VARIANTS,
    ROUTER_FAMILIES,
    SHARED_VARIANTS,
    SIZES,
    random_weights,
)
from .loopback import Loopback, registered
from .tolerances import TOLERANCES, tolerance

if TYPE_CHECKING:
    from .conformance import BackendConformance

__all__ = [
    "CALL_FAMILIES",
    "EXPERT_VARIANTS",
    "QUANT_VARIANTS",
    "ROUTER_FAMILIES",
    "SHARED_VARIANTS",
    "SIZES",
    "TOLERANCES",
    "BackendConformance",
    "Loopback",
    "random_weights",
    "registered",
    "tolerance",
]


def __getattr__(name: str) -> Any:
    if name == "BackendConformance":
        from .conformance import BackendConformance

        return BackendConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
