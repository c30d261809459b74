"""One Mixture-of-Experts layer, every accelerator, nothing hidden."""

from . import ops as ops  # registers the custom ops
from .api import backends, explain
from .config import MoEConfig, QuantConfig
from .functional import fused_experts
from .hookspecs import hookimpl
from .layer import MoELayer
from .report import SelectionReport
from .runner import MoERunner
from .settings import configure, use_backend
from .types import BackendInfo, Dispatched, ExpertsOut, Pending, Routing, Verdict
from .weights import MoEWeights

__version__ = "0.1.0"
__all__ = [
    "BackendInfo",
    "Dispatched",
    "ExpertsOut",
    "MoEConfig",
    "MoELayer",
    "MoERunner",
    "MoEWeights",
    "Pending",
    "QuantConfig",
    "Routing",
    "SelectionReport",
    "Verdict",
    "backends",
    "configure",
    "explain",
    "fused_experts",
    "hookimpl",
    "use_backend",
]
