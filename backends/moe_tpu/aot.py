"""What the TPU compiler says of a layer, on a host without a TPU.

    python -m moe_tpu.aot --chip v5e,v6e --config qwen3-30b-a3b --tokens 16,256,2048

A bound layer is traced on XLA's CPU device with tensors that hold no values, and the graph is compiled for a TPU by
libtpu, which counts its FLOPs, bytes, temporaries and collectives. Nothing is run: "compiled for", never "ran on".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_core.bench.shapes import parse_shape

from .kernels.work import Work, combine_work, work_of
from .target import compiling_for

MODELS = ("qwen3-30b-a3b", "olmoe", "mixtral-8x7b", "deepseek-v3")
TERAFLOPS = {"v5e": 197.0, "v6e": 918.0}
GIGABYTES_PER_SECOND = {"v5e": 819.0, "v6e": 1638.0}
GIGABYTES = {"v5e": 16.0, "v6e": 32.0}
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
ENVIRONMENT = {
    "PJRT_DEVICE": "CPU",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
PALLAS = 'custom_call_target="tpu_custom_call"'
LIBTPU = "libtpu==0.0.24"
"""torch_xla 2.9 comes with an older one, which refuses the kernels of jax 0.7.1."""


@dataclass(frozen=True)
class Compiled:
    """One graph, compiled for one chip; counts are of one device."""

    gflop: float
    gigabytes: float
    temporaries_mb: float
    arguments_mb: float
    collectives: dict[str, int]
    pallas_calls: int
    seconds: float

    def roofline_us(self, chip: str) -> float:
        """The time that its FLOPs or its bytes take at the chip's peak, whichever is longer."""
        return max(self.gflop / TERAFLOPS[chip] * 1e3, self.gigabytes / GIGABYTES_PER_SECOND[chip] * 1e6)


def compile_for(chip: str, graph: bytes, devices: int = 1) -> Compiled:
    """Compile a torch_xla graph (a serialised HLO module) for ``devices`` chips of a 2x2 slice."""
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies
    from jaxlib import _jax

    text = _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(graph))
    chips = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices[:devices]
    started = time.monotonic()
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        assignment = np.array([[device.id for device in chips]], dtype=np.int32)
        options = compiler.get_compile_options(
            num_replicas=1, num_partitions=devices, device_assignment=assignment, use_spmd_partitioning=devices > 1
        )
        options.executable_build_options.use_shardy_partitioner = False
        if devices > 1:  # parameters without values carry no sharding of their own
            options.executable_build_options.allow_spmd_sharding_propagation_to_parameters = [True]
        built = compiler.backend_compile(chips[0].client, module, xla_client.DeviceList(tuple(chips)), options)
    costs = built.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    memory, hlo = built.get_compiled_memory_stats(), built.hlo_modules()[0].to_string()
    work, calls = pallas_work(hlo, devices)
    return Compiled(
        (costs["flops"] + work.flops) / 1e9,
        (costs["bytes accessed"] + work.bytes) / 1e9,
        memory.temp_size_in_bytes / 1e6,
        memory.argument_size_in_bytes / 1e6,
        {name: len(re.findall(rf"= [^=]*\b{name}(?:-start)?\(", hlo)) for name in COLLECTIVES},
        calls,
        time.monotonic() - started,
    )


def pallas_work(hlo: str, devices: int = 1) -> tuple[Work, int]:
    """What the Pallas calls of a compiled module do, and their number.

    The compiler cannot look into one and counts it as nothing; what it does follows from its grid and blocks, and these
    from its shapes. Each of ``devices`` expects its share of the rows.
    """
    work, calls = Work(), 0
    for line in hlo.splitlines():
        if PALLAS not in line or "pallas_call" not in line:
            continue  # XLA's own grouped product is such a call too, and declares what it does
        given = re.search(r"operand_layout_constraints=\{(.*?\})\}", line)
        assert given is not None, line
        shapes = _shapes(given.group(1))
        calls += 1
        # Which of the kernels it is, its operands tell: the compiled module keeps no name.
        matrices, last = [shape for shape in shapes if len(shape[1]) == 3], shapes[-1][1]
        item = matrices[-1][0]
        if len(last) == 2:  # combine: ..., rows in parts, weights
            (tokens, k), width = last, math.prod(matrices[0][1][1:])
            work += combine_work(tokens, k, width, item, tokens * k // devices)
            continue
        # gathered: ..., places of the rows, rows in parts, gate, up; grouped: ..., rows, weight
        halves = len(matrices) - 1 or 1
        rows = [sizes for _, sizes in shapes if len(sizes) == (1 if halves == 2 else 2)][-1][0]
        work += work_of(rows, *last, halves, item, expected=rows // devices)
    return work, calls


def _shapes(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """(bytes of an element, sizes) of each array type in a piece of HLO."""
    found = re.findall(r"\b(f32|s32|u32|bf16|pred)\[([\d,]*)\]", text)
    width = {"bf16": 2, "pred": 1}
    return [(width.get(kind, 4), tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes in found]


@contextlib.contextmanager
def lowering_for_tpu() -> Iterator[None]:
    """Inside, ``call_jax`` lowers for a TPU although the tensors are on XLA's CPU device."""
    import jax
    import torch_xla.core.xla_builder as xb
    import torchax.ops.mappings as mappings

    def specialize(self: Any, tensors: Sequence[Any]) -> Any:
        shapes = tuple(
            None if t is None else jax.ShapeDtypeStruct(t.shape, mappings.t2j_dtype(t.dtype)) for t in tensors
        )
        traced = jax.jit(self._flat_input_func.flat_call, keep_unused=True).trace(shapes)
        lowered = traced.lower(lowering_platforms=("tpu",))
        proto = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
        return xb.xla_computation_as_func(xb.computation_from_module_proto("jax_callable", proto), "jax_func")

    before, cache = xb.JaxCallable.specialize, dict(xb._JAX_TO_XLA_COMPUTATION_CACHE)
    xb._JAX_TO_XLA_COMPUTATION_CACHE.clear()
    xb.JaxCallable.specialize = specialize
    try:
        yield
    finally:
        xb.JaxCallable.specialize = before
        xb._JAX_TO_XLA_COMPUTATION_CACHE.clear()
        xb._JAX_TO_XLA_COMPUTATION_CACHE.update(cache)


def trace_layer(config: Any, tokens: int, dtype: Any) -> bytes:
    """The graph of one call of a bound layer, from tensors that hold no values."""
    import torch
    import torch_xla
    from torch_xla.core.xla_builder import create_placeholder_tensor

    from moe_core import MoERunner

    config = dataclasses.replace(config, check_layout=False)  # no values to check
    weights = _without_values(config, dtype)
    runner = MoERunner(config, weights, backend="tpu")
    with torch.no_grad():
        y = runner(create_placeholder_tensor((tokens, config.hidden_size), dtype))
    graph: bytes = torch_xla._XLAC._get_xla_tensors_hlo_proto([y])
    return graph


def trace_parallel(config: Any, tokens: int, dtype: Any, devices: int) -> bytes:
    """The graph of a layer whose experts are spread over ``devices`` chips; gate and shared experts are on each."""
    import numpy as np
    import torch
    import torch_xla
    import torch_xla.distributed.spmd as spmd
    from torch_xla.core.xla_builder import create_placeholder_tensor

    from moe_core import ExpertsOut, Pending
    from moe_core.platform import Platform
    from moe_core.types import Plan

    from . import gate, layout, reduce, shared
    from .parallel import ExpertParallel

    weights, device = _without_values(config, dtype), torch_xla.device()
    mesh = spmd.Mesh(np.arange(devices), (devices,), ("ep",))
    prepared = layout.prepare(config, weights, Platform.detect(device, dtype))
    plan = Plan(config, prepared, device, dtype)
    experts = ExpertParallel(config, weights, mesh, form=prepared.form)
    x = create_placeholder_tensor((tokens, config.hidden_size), dtype)
    with torch.no_grad():
        beside = shared.shared_experts(plan, x) if config.has_shared_experts else Pending(None)
        routing = gate.gate(plan, x, None, None)
        y = reduce.reduce(plan, routing, ExpertsOut(experts(x, routing), True), beside)
    graph: bytes = torch_xla._XLAC._get_xla_tensors_hlo_proto([y])
    return graph


def _without_values(config: Any, dtype: Any) -> Any:
    """The weights of a layer, as tensors that have no memory."""
    import torch
    from torch_xla.core.xla_builder import create_placeholder_tensor

    from moe_core import MoEWeights
    from moe_core.layer import parameter_shapes

    tensors = {name: create_placeholder_tensor(shape, dtype) for name, shape in parameter_shapes(config).items()}
    if config.e_score_correction_bias:
        tensors["e_score_correction_bias"] = create_placeholder_tensor((config.num_router_outputs,), torch.float32)
    return MoEWeights(**tensors)


@dataclass(frozen=True)
class Useful:
    """The least that a layer can do: what the compiled one is compared with.

    Args:
        gflop: of the products of the router, K experts a token, and the shared ones.
        gigabytes: every weight that is hit read once; input read, output written; each activation in expert order
            (sorted rows, activated rows, experts' outputs) written once and read once.
        expert_order_mb: of the activations in expert order.
    """

    gflop: float
    gigabytes: float
    expert_order_mb: float


def useful(config: Any, tokens: int, item: int, devices: int = 1) -> Useful:
    """For one of ``devices`` chips that share the experts among them."""
    hidden, inner, slots = config.hidden_size, config.intermediate_size, tokens * config.top_k
    shared, factor = config.shared_intermediate_size or 0, 3 if config.gated else 2
    expert = factor * hidden * inner
    flops = 2 * (slots / devices * expert + tokens * (config.num_router_outputs + factor * shared) * hidden)
    hit = min(config.num_experts, slots) / devices
    ordered = slots * (2 * hidden + inner) * item
    weights = (hit * expert + factor * shared * hidden + config.num_router_outputs * hidden) * item
    return Useful(flops / 1e9, (weights + 2 * tokens * hidden * item + 2 * ordered) / 1e9, ordered / 1e6)


def examine(model: str, tokens: int, chip: str, form: str, devices: int = 1) -> dict[str, Any]:
    """One row of the table: a layer of ``model`` in bfloat16, compiled for one chip or for a 2x2 slice."""
    import torch

    config = parse_shape(model).config("layer")
    os.environ["MOE_TPU_FORM"] = form
    row: dict[str, Any] = {"model": model, "tokens": tokens, "chip": chip, "form": form, "devices": devices}
    with compiling_for(chip), lowering_for_tpu():
        if devices == 1:
            graph = trace_layer(config, tokens, torch.bfloat16)
        else:
            graph = trace_parallel(config, tokens, torch.bfloat16, devices)
    try:
        found = compile_for(chip, graph, devices)
    except RuntimeError as error:  # the compiler's own refusals, out of memory among them, are a result
        return {**row, "error": str(error).strip().splitlines()[0][:200]}
    least = useful(config, tokens, 2, devices)
    floor = max(least.gflop / TERAFLOPS[chip] * 1e3, least.gigabytes / GIGABYTES_PER_SECOND[chip] * 1e6)
    return {
        **row,
        "gflop": round(found.gflop, 3),
        "flop_waste": round(found.gflop / least.gflop, 4),
        "gigabytes": round(found.gigabytes, 4),
        "temporaries_mb": round(found.temporaries_mb, 2),
        "expert_order_mb": round(least.expert_order_mb, 2),
        "arguments_mb": round(found.arguments_mb, 1),
        "collectives": {name: count for name, count in found.collectives.items() if count},
        "pallas_calls": found.pallas_calls,
        "roofline_us": round(found.roofline_us(chip), 1),
        "floor_us": round(floor, 1),
        "roofline_waste": round(found.roofline_us(chip) / floor, 3),
    }


COLUMNS = (
    "model",
    "tokens",
    "chip",
    "form",
    "gflop",
    "flop_waste",
    "gigabytes",
    "temporaries_mb",
    "roofline_us",
    "floor_us",
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    cells = [COLUMNS, *([str(row.get(name, "")) for name in COLUMNS] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    for i, row in enumerate(rows, start=1):
        if "error" in row:
            lines[i] = f"{lines[i].rstrip()}  {row['error']}"
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    import importlib.metadata

    names = ("torch", "torch_xla", "jax", "jaxlib")
    return {**{name: importlib.metadata.version(name) for name in names}, "libtpu": LIBTPU.partition("==")[2]}


def compare(recorded: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], allowed: float = 0.05) -> list[str]:
    """What has grown by more than ``allowed`` since it was recorded, has other collectives, or no longer compiles."""
    key = ("model", "tokens", "chip", "form", "devices")
    before = {tuple(row[name] for name in key): row for row in recorded}
    worse = []
    for row in rows:
        old, name = before.get(tuple(row[part] for part in key)), " ".join(str(row[part]) for part in key)
        if old is None or "error" in old:
            continue
        if "error" in row:
            worse.append(f"{name}: {row['error']}")
            continue
        if row["collectives"] != old["collectives"]:
            worse.append(f"{name}: collectives {row['collectives']}, recorded {old['collectives']}")
        worse += [
            f"{name}: {figure} {row[figure]}, recorded {old[figure]}"
            for figure in ("gflop", "gigabytes", "temporaries_mb", "roofline_us")
            if row[figure] > old[figure] * (1 + allowed)
        ]
    return worse


def _write(path: str, rows: list[dict[str, Any]]) -> None:
    document = {"compiled_for": "TPU, ahead of time; nothing ran", "versions": versions(), "rows": rows}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, compile, print; 1 where a figure is worse than the recorded one."""
    parser = argparse.ArgumentParser(prog="python -m moe_tpu.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", default="v5e,v6e", help="of " + ", ".join(TERAFLOPS))
    parser.add_argument("--config", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--tokens", default="16,256,2048")
    parser.add_argument("--form", default="ragged,gmm", help="of ragged, gmm")
    parser.add_argument("--devices", type=int, default=1, help="4 spreads the experts over a 2x2 slice")
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--check", help="compare with the rows of this file; more than 5 %% worse is an error")
    asked = parser.parse_args(arguments)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if asked.devices > 1:
        os.environ["CPU_NUM_DEVICES"] = str(asked.devices)
    import torch_xla
    import torch_xla.runtime

    if asked.devices > 1:
        torch_xla.runtime.use_spmd()
    torch_xla._XLAC._init_computation_client()  # before jax looks for devices
    rows = []
    for model in asked.config.split(","):
        for chip in asked.chip.split(","):
            for tokens in map(int, asked.tokens.split(",")):
                for form in asked.form.split(","):
                    rows.append(examine(model, tokens, chip, form, asked.devices))
                    _say(table(rows[-1:]).splitlines()[1])
                    if asked.json:
                        _write(asked.json, rows)
    _say(table(rows))
    if not asked.check:
        return 0
    with open(asked.check, encoding="utf-8") as file:
        worse = compare(json.load(file)["rows"], rows)
    _say("\n".join(worse) or "no figure is more than 5 % above the recorded one")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
