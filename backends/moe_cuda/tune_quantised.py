"""Search block sizes for quantised layers, beside the same layer in bfloat16: ``moe-core tune cuda --quant SCHEME``.

    moe-core tune cuda --quant mxfp4 --shape 2880,2880,128,4 --tokens 1,16 [--out FILE] [--compile-only]

``SCHEME`` may carry a group size, ``int4_weight_only:128``; ``fp8_block`` has blocks of 128 x 128. Weights are random
codes. Every candidate is compiled first, in as many processes as there are cores, checked against the bfloat16 layer of
the dequantised weights, and timed by replaying a CUDA graph with the L2 cache flushed before each replay.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, QuantConfig
from moe_core.platform import Platform
from moe_core.quant import dequantise, quantised_parts
from moe_core.quant.config import SCHEMES
from moe_core.types import Plan

from . import experts, layout, quant_tuning, quantised, tuning
from .kernels.align import Tiles, max_tiles
from .quant_tuning import FEW_AT_MOST, LED_AT_MOST, Form, Step
from .tune import Clock, draw
from .tuning import Shape

Search = tuple[Form, list[Step], list[Step]]
"""A start, and what its first and its second product may be instead."""


def quant_of(text: str) -> QuantConfig:
    """``scheme`` or ``scheme:group_size``."""
    scheme, _, group = text.partition(":")
    blocks = (128, 128) if SCHEMES[scheme].scales == "block" else None
    return QuantConfig(scheme, group_size=int(group or -1), block_shape=blocks)


def candidates(shape: Shape, tokens: int, quant: QuantConfig) -> list[Search]:
    """Every form worth trying."""
    pairs = tokens * shape.top_k
    rows = pairs / shape.num_experts
    found: list[Search] = []
    if SCHEMES[quant.scheme].activations is None:
        if pairs <= FEW_AT_MOST and (tokens <= 4 or rows <= 1):
            wide = 2048 if SCHEMES[quant.scheme].code != "int8" else 1024
            sizes = [
                (8, wide // 2, 4),
                (4, wide // 2, 2),
                (4, wide // 2, 4),
                (16, wide // 2, 4),
                (16, wide // 2, 8),
                (8, wide, 4),
                (8, wide // 4, 4),
                (16, wide // 4, 4),
            ]
            ahead = [(8, wide // 2, 4, 1), (8, wide // 2, 4, 2), (8, wide // 2, 4, 4), (16, wide // 2, 4, 2)]
            ahead += [(4, wide // 2, 2, 2), (4, wide // 2, 4, 4), (8, wide, 4, 1)]
            ahead += [(8, wide // 4, 4, 1), (16, wide // 4, 4, 2)]
            firsts, seconds = [Step(*size, 1) for size in sizes], [Step(*size) for size in ahead]
            found.append((Form(1, firsts[0], seconds[0]), firsts, seconds))
            if SCHEMES[quant.scheme].code != "int8":
                # Columns of a warp (pairs of the second product), warps over columns and over the sum, steps ahead.
                units = [(1, 4, 1, 3), (1, 4, 1, 2), (1, 8, 1, 3), (1, 2, 1, 3), (2, 2, 1, 6), (2, 4, 1, 4)]
                units += [(1, 4, 2, 2), (1, 2, 2, 3), (1, 2, 2, 4), (1, 2, 4, 4), (1, 4, 1, 4), (2, 2, 2, 4)]
                firsts, seconds = (
                    [Step(side * each * high, 1024 * wide, high * wide, ahead) for each, high, wide, ahead in units]
                    for side in (1, 2)
                )
                found.append((Form(1, firsts[0], seconds[0], tensor_cores=True), firsts, seconds))
        if pairs <= LED_AT_MOST and rows <= 16 and SCHEMES[quant.scheme].code != "int8":
            # Warps over columns and over the sum, and its steps: few tokens leave most of the latter to do.
            sizes = [
                (4, 1, 2),
                (4, 1, 4),
                (8, 1, 2),
                (2, 1, 4),
                (1, 4, 1),
                (1, 4, 2),
                (1, 8, 1),
                (2, 2, 2),
                (2, 4, 1),
                (1, 2, 2),
            ]
            both = [
                [
                    Step(unit * high, 128 * wide * chunks, high * wide, 1, columns_first=order)
                    for high, wide, chunks in sizes
                    for order in (False, True)
                ]
                for unit in (8, 16)
            ]
            found.append((Form(8, both[0][0], both[1][0], led=True), *both))
        if pairs <= LED_AT_MOST and rows <= 16:
            first = [(32, 128, 4, 3), (32, 128, 4, 5), (32, 256, 4, 3), (64, 128, 4, 3), (64, 128, 8, 4)]
            first += [(64, 256, 8, 3), (32, 512, 4, 2), (64, 64, 4, 5), (32, 256, 4, 4), (64, 128, 4, 6)]
            first += [
                (32, 64, 4, 6),
                (64, 64, 8, 5),
                (128, 64, 8, 4),
                (128, 64, 8, 6),
                (64, 128, 4, 4),
                (128, 128, 8, 3),
            ]
            second = [(64, 128, 4, 3), (64, 128, 4, 5), (64, 256, 4, 3), (128, 128, 8, 4), (64, 512, 4, 2)]
            second += [
                (64, 64, 4, 6),
                (128, 64, 4, 5),
                (128, 64, 8, 6),
                (256, 64, 8, 5),
                (128, 128, 4, 3),
                (64, 128, 4, 4),
            ]
            second += [(64, 256, 4, 4), (64, 256, 4, 5)]
            if tokens <= 2:
                # A single row has a form of its own.
                first, second = [first[2], first[6]], [second[2], second[4]]
            orders = (False, True)
            found.append(
                (
                    Form(16, Step(32, 128, 4, 3), Step(64, 128, 4, 3), led=True),
                    [Step(*s, columns_first=order) for s, order in itertools.product(first, orders)],
                    [Step(*s, columns_first=order) for s, order in itertools.product(second, orders)],
                )
            )
        for height in (16, 32, 64, 128):
            if tokens > 16 and height / 4 <= max(rows, 4) and (rows <= height * 3 or height == 128):
                sizes = [(32, 128, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4), (64, 128, 8, 3), (128, 64, 8, 3)]
                steps = [Step(*size, 0, share) for size, share in itertools.product(sizes, (1, 8))]
                wide = [dataclasses.replace(step, n=2 * step.n) for step in steps]
                found.append((Form(height, steps[0], wide[0]), steps, wide))
        return found
    for height in (16, 32, 64, 128):
        if height / 4 <= max(rows, 4) and (rows <= height * 3 or height == 128):
            warps = (4, 8) if height >= 64 else (4,)
            stages = (3, 4) if height >= 64 else (3, 4, 5)
            both = [Step(128, 128, w, s, 0, share) for w, s, share in itertools.product(warps, stages, (1, 8))]
            both += [Step(128, 128, warps[-1], 3, 1, 16), Step(128, 128, warps[-1], 4, 1, 16, flatten=True)]
            wide = [*both, Step(256, 128, 8, 3, 0, 8)] if height >= 64 else both
            loaders: list[Step] = []
            if height == 128 and SCHEMES[quant.scheme].scales == "block":
                loaders = [Step(128, 128, 8, 4, 1, share, loader=True) for share in (1, 2, 4, 8, 16, 32)]
            found.append((Form(height, both[0], both[0]), [*both, *loaders], [*wide, *loaders]))
    return found


def plan_of(shape: Shape, quant: QuantConfig, device: str) -> tuple[Plan, MoEConfig, MoEWeights]:
    """A quantised layer of random codes; on ``meta`` it can only be compiled for."""
    config = MoEConfig(*dataclasses.astuple(shape), quant=quant)
    tensors: dict[str, Tensor] = {}
    for field, part in quantised_parts(config).items():
        if part.optional:
            continue
        dtype = part.dtypes[0] if "scale" not in field or len(part.dtypes) == 1 else torch.bfloat16
        tensors[field] = _random(field, part.shape, dtype, shape, device)
    weights = MoEWeights(**tensors)
    where = torch.device(device)
    platform = Platform.detect("cuda", torch.bfloat16)
    prepared = layout.prepare(config, weights, platform)
    return Plan(config, prepared, where, torch.bfloat16), config, weights


def _random(field: str, size: tuple[int, ...], dtype: torch.dtype, shape: Shape, device: str) -> Tensor:
    if device == "meta":
        return torch.empty(size, dtype=dtype, device=device)
    width = shape.hidden_size if field.startswith("w13") else shape.intermediate_size
    if field.endswith("_scale_2"):
        return torch.full(size, 1 / (192 * width**0.5), device=device)
    if "scale" in field:
        if dtype is torch.uint8:
            return torch.full(size, 127 - round(math.log2(2.5 * width**0.5)), dtype=dtype, device=device)
        steps = torch.rand(size, device=device).add(0.5)
        return (steps * 64 if dtype is torch.float8_e4m3fn else steps / (60 * width**0.5)).to(dtype)
    if dtype is torch.float8_e4m3fn:
        # Finite codes of both signs up to 112.
        return (torch.randint(0, 0x6F, size, dtype=torch.uint8, device=device) | _signs(size, device)).view(dtype)
    return torch.randint(0, 255, size, dtype=torch.uint8, device=device).view(dtype)


def _signs(size: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(0, 2, size, dtype=torch.uint8, device=device) << 7


def compile_one(job: tuple[Shape, int, str, Form]) -> str | None:
    """Compile one form's kernels into Triton's cache; what went wrong, if so."""
    shape, tokens, text, form = job
    plan, _, _ = plan_of(shape, quant_of(text), "meta")
    x, routing = draw(shape, tokens, plan.device)

    def warm(kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        kernel.warmup(*arguments, grid=(1,), **constants)

    def tiles(ids: Tensor, held: int, rows: int) -> Tiles:
        count = max_tiles(ids.numel(), held, rows)
        sizes = (ids.numel(), count, count, count, 3)
        return Tiles(*(torch.empty(size, dtype=torch.int32, device=plan.device) for size in sizes))

    try:
        quantised.parts(plan, plan.weights.routed, form, x, routing, torch.bfloat16, warm, tiles)
    except Exception as error:
        return f"{text} {form}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def main(arguments: list[str]) -> int:
    """Compile, time, write; the exit code."""
    parser = argparse.ArgumentParser(prog="moe-core tune cuda --quant", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quant", action="append", required=True, help="a scheme, or scheme:group_size")
    parser.add_argument("--shape", action="append", required=True, help="H,I,E,K; may be given several times")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,1024,4096")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further cell after so many")
    parser.add_argument("--compile-only", action="store_true")
    given = parser.parse_args(arguments)
    began, console = time.time(), Console(width=200)
    name = torch.cuda.get_device_name()
    path = given.out or tuning.own_table(name).with_name(tuning.QUANTISED + tuning.file_name(name))
    record = json.loads(path.read_text()) if path.exists() else {"device": name, "entries": []}
    shapes = [Shape(*map(int, text.split(","))) for text in given.shape]
    counts = [int(text) for text in given.tokens.split(",")]
    jobs = [
        (shape, tokens, text, dataclasses.replace(form, **{part: step}))
        for text in given.quant
        for shape in shapes
        for tokens in counts
        for form, *steps in candidates(shape, tokens, quant_of(text))
        for part, choices in zip(("first", "second"), steps, strict=True)
        for step in choices
    ]
    broken: set[str] = set()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        broken.update(fault for fault in pool.map(compile_one, jobs, chunksize=4) if fault)
    console.print(f"{len(jobs)} candidates compiled in {time.time() - began:.0f} s")
    if not given.compile_only:
        clock = Clock()
        for shape in shapes:
            for text in given.quant:
                if time.time() - began > given.seconds:
                    break
                _cells(shape, text, counts, clock, console, record, path, began + given.seconds, broken)
                torch.cuda.empty_cache()
    for fault in sorted(broken):
        console.print("not usable:", fault)
    return 0


def _cells(
    shape: Shape,
    text: str,
    counts: list[int],
    clock: Clock,
    console: Console,
    record: dict[str, Any],
    path: Path,
    until: float,
    broken: set[str],
) -> None:
    """All token counts of one layer, beside its bfloat16 twin."""
    quant = quant_of(text)
    plan, config, weights = plan_of(shape, quant, "cuda")
    plain_config, plain_weights = dequantise(config, weights)
    prepared = layout.prepare(plain_config, plain_weights, Platform.detect("cuda", torch.bfloat16))
    twin = Plan(plain_config, prepared, plan.device, torch.bfloat16)
    kind = plan.weights.routed.kind
    allowed = 0.08 if SCHEMES[quant.scheme].activations else 1.5e-2
    entry = {"shape": list(dataclasses.astuple(shape)), "kind": kind, "quant": text, "triton": triton.__version__}
    entry["tokens"] = {}
    record["entries"].append(entry)
    for tokens in counts:
        if time.time() > until:
            return
        x, routing = draw(shape, tokens, plan.device)
        expected, out = torch.empty_like(x), torch.empty_like(x)
        choice = prepared.choices(tokens)
        experts.run(twin, choice, x, routing, expected)
        plain = clock.microseconds(lambda x=x, r=routing, c=choice, to=expected: experts.run(twin, c, x, r, to))
        best: tuple[float, Form, float] | None = None
        for start, *steps in candidates(shape, tokens, quant):
            form, fastest, off = start, float("inf"), 0.0
            for part, choices in zip(("first", "second"), steps, strict=True):
                for step in choices:
                    tried = dataclasses.replace(form, **{part: step})
                    try:
                        out.zero_()
                        experts.run(plan, tried, x, routing, out)
                        error = float((out.float() - expected.float()).norm() / expected.float().norm())
                        if not error <= allowed:
                            raise ValueError(f"{error:.3g} off the layer in bfloat16")
                        took = clock.microseconds(
                            lambda f=tried, x=x, r=routing, to=out: experts.run(plan, f, x, r, to)
                        )
                    except Exception as fault:
                        broken.add(f"{text} {tried}: {type(fault).__name__}: {str(fault).splitlines()[0]}")
                        continue
                    if took < fastest:
                        fastest, form, off = took, tried, error
            if best is None or fastest < best[0]:
                best = (fastest, form, off)
        if best is None or best[0] == float("inf"):
            console.print(f"{text} {dataclasses.astuple(shape)} {tokens}: nothing usable")
            continue
        took, form, off = best
        figures = {"us": round(took, 1), "bfloat16_us": round(plain, 1), "error": float(f"{off:.2g}")}
        entry["tokens"][str(tokens)] = {**quant_tuning.to_json(form), **figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(
            f"{text:22} {dataclasses.astuple(shape)!s:24} {tokens:6d} {took:9.1f} us, bfloat16 {plain:9.1f} "
            f"({plain / took:.2f} x), off {off:.1e}, {form}"
        )
