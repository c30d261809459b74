"""What the machine can do at best, measured beside the layers: copy, read, and dense products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .timing import summary, synchronize

# (bytes of the buffer read, side of the square product) by device type; quick runs use the second pair.
_SIZES = {"cpu": ((2**29, 2048), (2**25, 256)), "cuda": ((2**31, 8192), (2**26, 1024))}
_REPEATS = {"cpu": (7, 4), "cuda": (20, 10)}
_PAUSE = 0.1  # seconds before each series, so that it is measured in a burst


def measure(device: torch.device, dtype: torch.dtype, quick: bool = False, codes: bool = False) -> dict[str, Any]:
    """Ceilings of ``device`` for ``dtype``.

    Returns:
        ``copy`` (bytes read plus written), ``read`` and ``matmul``, each in bytes or operations per second: the
        ``best`` of the repeats, their median and spread, and how it was reached. A floor uses the best. ``read`` takes
        the best of several ways, the copy among them. ``matmul`` takes the best dtype at least as wide: values may
        always be widened. Where ``codes`` asks for it and the device has it, ``matmul_codes`` is the product of e4m3.
    """
    size, side = _SIZES.get(device.type, _SIZES["cpu"])[quick]
    read_repeats, product_repeats = _REPEATS.get(device.type, _REPEATS["cpu"])
    with torch.no_grad():
        reads = _reads(size, device, read_repeats)
        products = [_product(side, kind, device, product_repeats) for kind in _at_least_as_wide(dtype)]
        eight = _product_of_codes(side, device, product_repeats) if codes else None
    return {
        "copy": reads[0],
        "read": max(reads, key=_best),
        "matmul": max(products, key=_best),
        "read_ways": {str(way["how"]): way["best"] for way in reads},
        **({} if eight is None else {"matmul_codes": eight}),
    }


def read(device: torch.device, flush: Callable[[], None], quick: bool = False) -> dict[str, Any]:
    """``read`` alone, each behind a ``flush`` and without a pause in front, as calls are timed."""
    size, _ = _SIZES.get(device.type, _SIZES["cpu"])[quick]

    def seconds(way: Callable[[], Tensor]) -> float:
        flush()
        return _seconds(way, device)

    found = []
    for name, way in _ways(torch.ones(size // 4, dtype=torch.float32, device=device)).items():
        way()
        found.append(_rate(summary([seconds(way) for _ in range(3)]), size, name))
    return max(found, key=_best)


def _reads(size: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The copy, and several ways to read a buffer."""
    a = torch.ones(size // 4, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    matrix, vector = a.view(-1, 4096), a[:4096]
    ways = {**_ways(a), "matrix-vector product": lambda: matrix @ vector}
    copy = _measured(lambda: b.copy_(a), 2 * size, device, repeats, "copy")
    return [copy, *(_measured(way, size, device, repeats, name) for name, way in ways.items())]


def _ways(a: Tensor) -> dict[str, Callable[[], Tensor]]:
    out = torch.empty((), device=a.device)
    return {
        "sum": lambda: torch.sum(a, dim=0, out=out),
        "dot": lambda: torch.dot(a, a),
        "max": lambda: torch.amax(a),
    }


def _best(rate: dict[str, Any]) -> float:
    return float(rate["best"])


def _at_least_as_wide(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (dtype,) if dtype is torch.float32 else (dtype, torch.float32)


def _product(side: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    how = f"{side} x {side} x {side}, {str(dtype).removeprefix('torch.')}"
    first = _seconds(lambda: a @ b.t(), device)
    # Where a dtype has no fast product here one call may take minutes of what the whole run has.
    return _measured(lambda: a @ b.t(), 2 * side**3, device, repeats if first < 2 else 1, how)


def _product_of_codes(side: int, device: torch.device, repeats: int) -> dict[str, Any] | None:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def call() -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _measured(call, 2 * side**3, device, repeats, f"{side} x {side} x {side}, e4m3")


def _measured(call: Callable[[], Tensor], amount: int, device: torch.device, repeats: int, how: str) -> dict[str, Any]:
    _seconds(call, device)
    time.sleep(_PAUSE)
    return _rate(summary([_seconds(call, device) for _ in range(repeats)]), amount, how)


def _rate(seconds: dict[str, float], amount: int, how: str) -> dict[str, Any]:
    return {
        "best": amount / seconds["min"],
        "median": amount / seconds["median"],
        "p10": amount / seconds["p90"],
        "p90": amount / seconds["p10"],
        "n": seconds["n"],
        "how": how,
    }


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    synchronize(device)
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start
