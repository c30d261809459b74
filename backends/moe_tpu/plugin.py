"""The hooks of the TPU backend. It probes honestly; its computations are not written yet, and it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_core import BackendInfo, Verdict, hookimpl

if TYPE_CHECKING:
    from moe_core.platform import Platform


@hookimpl
def moe_backend_info() -> BackendInfo:
    """XLA tensors; the stages follow with the computations."""
    return BackendInfo(name="tpu", device_types=("xla", "tpu"), priority=30, stages=(), extra="tpu")


@hookimpl
def moe_probe(platform: Platform) -> Verdict:
    """torch_xla (device type xla) or torch_tpu (device type tpu), and computations."""
    if platform.version("torch_xla") is None:
        if platform.version("torch_tpu") is not None:
            return Verdict.no(
                "torch_tpu is installed, but there is no adapter for it yet; the one for torch_xla comes first",
                'pip install "moe-core[tpu]" in an environment with torch 2.9',
            )
        return Verdict.no("torch_xla is not installed", 'pip install "moe-core[tpu]" in an environment with torch 2.9')
    return Verdict.no("this version of moe-core has no XLA computations yet", "use MOE_CORE_BACKEND=reference")
