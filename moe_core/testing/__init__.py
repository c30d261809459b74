"""For authors of backends: tolerances now; the conformance kit grows here."""

from .tolerances import TOLERANCES, tolerance

__all__ = ["TOLERANCES", "tolerance"]
