"""For authors of backends: tolerances now; the conformance kit grows here."""

from .cases import CALL_FAMILIES, EXPERT_VARIANTS, ROUTER_FAMILIES, SHARED_VARIANTS, SIZES, random_weights
from .tolerances import TOLERANCES, tolerance

__all__ = [
    "CALL_FAMILIES",
    "EXPERT_VARIANTS",
    "ROUTER_FAMILIES",
    "SHARED_VARIANTS",
    "SIZES",
    "TOLERANCES",
    "random_weights",
    "tolerance",
]
