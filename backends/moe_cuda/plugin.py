"""The hooks of the CUDA backend. It probes honestly; its kernels are not written yet, and it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_core import BackendInfo, Verdict, hookimpl

if TYPE_CHECKING:
    from moe_core.platform import Platform


@hookimpl
def moe_backend_info() -> BackendInfo:
    """CUDA tensors; the stages follow with the kernels."""
    return BackendInfo(name="cuda", device_types=("cuda",), priority=30, stages=(), extra="cuda")


@hookimpl
def moe_probe(platform: Platform) -> Verdict:
    """triton, a device (or Triton's interpreter), and kernels."""
    import torch

    if platform.version("triton") is None:
        return Verdict.no("triton is not installed", 'pip install "moe-core[cuda]"')
    interpreted = platform.env.get("TRITON_INTERPRET", "0") == "1"
    if not interpreted and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built is None:
            return Verdict.no(
                f"torch {torch.__version__} is a build without CUDA",
                "install a CUDA build of torch, on a machine with a GPU",
            )
        return Verdict.no(
            "torch sees no CUDA device", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or set TRITON_INTERPRET=1 to test"
        )
    return Verdict.no("this version of moe-core has no CUDA kernels yet", "use MOE_CORE_BACKEND=reference on the GPU")
