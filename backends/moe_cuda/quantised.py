"""Quantised experts on a GPU: what is accepted, the weights as the kernels read them, and the launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_core import MoEConfig, MoEWeights, Routing
from moe_core.quant.dequantise import spread, tensors_of
from moe_core.quant.layout import Matrix, matrix_of, part_of

from .kernels import w8a8
from .kernels.align import Tiles, align
from .quant_tuning import Form, Forms, Step
from .quantised_words import dependent, programs_of, step_of, table_of, words

Launch = Callable[..., Any]


@dataclass(frozen=True)
class Operand:
    """One matrix [E, N, K] as kernels read it.

    ``weight`` is viewed as 16-bit words in weight-only schemes; ``scale``, ``zero`` and ``whole`` (the scale of a
    tensor) are as stored, except that a scale a tensor is one a row; ``given`` is an input scale of the file.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    whole: Tensor | None
    given: Tensor | None
    bias: Tensor | None
    code: str
    group: int


@dataclass(frozen=True)
class Products:
    """Both products of routed experts, or of the shared ones as if they were one expert.

    ``first`` and ``second`` are compile-time constants; ``block`` the (rows, columns) of a scale, None without blocks.
    """

    w13: Operand
    w2: Operand
    first: dict[str, Any]
    second: dict[str, Any]
    experts: int
    kind: str
    eight: bool
    int8: bool
    block: tuple[int, int] | None
    forms: Forms
    upcast: bool
    packed: bool
    tma: bool
    loader: bool
    gluon: bool
    pdl: bool
    multiprocessors: int


def refused(config: MoEConfig, stage: str, capability: tuple[int, int] | None) -> tuple[str, str] | None:
    """Why not, and what would help; None where the stage is unquantised or served.

    Args:
        capability: of the device; None under Triton's interpreter.
    """
    prefix = "" if stage == "experts" else "shared_"
    matrices = [matrix_of(config, f"{prefix}{name}_weight") for name in ("w13", "w2")]
    matrix = matrices[0]
    if matrix is None:
        return None
    plain = "moe_core.quant.dequantise gives a layer in bfloat16, or use backend='reference'"
    for each in matrices:
        assert each is not None
        unit = {"int4": 4, "e2m1": 4, "int8": 2}.get(each.scheme.code, 1) if each.scheme.activations is None else 1
        if each.columns % unit:
            return (
                f"{each.field} has {each.columns} columns, and kernels for {each.scheme_name} read words of {unit}",
                plain,
            )
    if matrix.scheme.scales == "block":
        rows, columns = matrix.block
        if columns not in (32, 64, 128):
            return f"blocks of {rows} x {columns}: kernels take 32, 64 or 128 columns", plain
    if matrix.scheme.code == "e4m3" and capability is not None and capability < (8, 9):
        return f"e4m3 products need compute capability 8.9, not {capability[0]}.{capability[1]}", plain
    if matrix.scheme_name == "fp8_tensor" and config.apply_router_weight_on_input and stage == "experts":
        return (
            "apply_router_weight_on_input with a scale a tensor: its input scale would meet the weighted input",
            plain,
        )
    return None


def operand(matrix: Matrix, weights: MoEWeights, bias: Tensor | None) -> Operand:
    """References to the tensors of a matrix; only what is not contiguous is copied, and scales a tensor are spread."""
    tensors = {name: None if t is None else t.detach().contiguous() for name, t in tensors_of(weights, matrix).items()}
    given = tensors.pop(part_of(matrix.field, "_input_scale"), None)
    if not matrix.lead:
        tensors = {name: None if t is None else t[None] for name, t in tensors.items()}
        bias = None if bias is None else bias[None]
    weight, scale = tensors[matrix.field], tensors[part_of(matrix.field, "_scale")]
    assert weight is not None and scale is not None
    if matrix.scheme.scales == "tensor":
        scale = spread(scale, matrix, "tensor")[..., 0].contiguous()
    zero, code = tensors.get(part_of(matrix.field, "_zero_point")), matrix.scheme.code
    group = 0
    if matrix.scheme.activations is None:
        weight = weight.view(torch.int16)
        # A scale a row is applied to sums; a zero point a row is taken from every weight, as one group of it all.
        whole_row = matrix.group >= matrix.columns
        group = matrix.group if not whole_row else 0 if zero is None and code != "e2m1" else _power(matrix.columns)
        code = "uint8" if code == "int8" and zero is not None else code
    return Operand(
        weight,
        scale,
        zero,
        tensors.get(part_of(matrix.field, "_scale_2")),
        given,
        None if bias is None else bias.detach().contiguous(),
        code,
        group,
    )


def _power(size: int) -> int:
    return max(128, triton.next_power_of_2(size))


def products(
    config: MoEConfig,
    weights: MoEWeights,
    prefix: str,
    find: Callable[[str, int | None], Forms],
    constants: dict[str, Any],
    *,
    on_gpu: bool,
    hopper: bool,
    loader: bool,
    multiprocessors: int,
) -> Products | None:
    """The products of the routed (prefix "") or the shared experts ("shared_"); None where they are not quantised.

    Args:
        find: forms of a kind and a width, as :func:`quant_tuning.forms` has them.
        constants: of the activation.
        loader: whether kernels in Gluon run, for which see ADR 8.
    """
    first, second = (matrix_of(config, f"{prefix}{name}_weight") for name in ("w13", "w2"))
    if first is None or second is None:
        return None
    w13 = operand(first, weights, getattr(weights, f"{prefix}w13_bias"))
    w2 = operand(second, weights, getattr(weights, f"{prefix}w2_bias"))
    inner, on_input = second.columns, config.apply_router_weight_on_input and not prefix
    sizes = {"H": first.columns, "I": inner}
    eight = first.scheme.activations is not None
    block = first.block if first.scheme.scales == "block" else None
    kind = "fp8_block" if block else "w8a8" if eight else f"words{8 if first.scheme.code == 'int8' else 4}"
    dtype = getattr(torch, first.quant.dtype)
    return Products(
        w13,
        w2,
        {
            **sizes,
            "K": 1 if prefix else config.top_k,
            "GATED": config.gated,
            "ROW": 2 if config.w13_interleaved and config.gated else 1,
            "UP": 1 if config.w13_interleaved and config.gated else inner,
            "BIAS": w13.bias is not None,
            "WEIGHT_ON_INPUT": on_input,
            **constants,
        },
        {**sizes, "BIAS": w2.bias is not None, "WEIGHT_ON_INPUT": on_input},
        first.lead[0] if first.lead else 1,
        kind,
        eight,
        first.scheme.code == "int8",
        block,
        find(kind, None if block is None else block[1]),
        upcast=not on_gpu,
        packed=hopper and dtype is torch.bfloat16,
        tma=hopper and first.columns % 16 == 0 and inner % 16 == 0,
        loader=loader and block == (128, 128) and first.columns % 128 == 0 and inner % 128 == 0,
        gluon=loader,
        pdl=hopper,
        multiprocessors=multiprocessors,
    )


def _launch(kernel: Any, programs: int | tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[programs if isinstance(programs, tuple) else (programs,)](*arguments, **constants)


def parts(
    plan: Any,
    these: Products,
    form: Form,
    x: Tensor,
    routing: Routing,
    dtype: torch.dtype,
    launch: Launch = _launch,
    tiles_of: Callable[[Tensor, int, int], Tiles] = align,
) -> Tensor:
    """[T*K, H], weighted; rows of pairs without a held expert are not written.

    Args:
        x: [T, H] contiguous, T > 0. dtype: of the result.
        launch, tiles_of: may compile instead of running.
    """
    if these.eight:
        return _eight_bits(plan, these, form, x, routing, dtype, launch, tiles_of)
    return words(plan, these, form, x, routing, dtype, launch, tiles_of)


def _eight_bits(
    plan: Any,
    these: Products,
    form: Form,
    x: Tensor,
    routing: Routing,
    dtype: torch.dtype,
    launch: Launch,
    tiles_of: Callable[[Tensor, int, int], Tiles],
) -> Tensor:
    w13, w2, first, second = these.w13, these.w2, form.first, form.second
    hidden, width = these.first["H"], these.first["I"]
    tokens, count = x.shape[0], routing.topk_ids.numel()
    workspace, code = plan.workspace(), w13.weight.dtype
    tiles = tiles_of(routing.topk_ids, these.experts, form.rows)
    table = table_of(tiles)
    blocked, group = these.block is not None, hidden if these.block is None else these.block[1]
    codes = workspace.empty(tokens, hidden, dtype=code)
    scales = workspace.empty(tokens, triton.cdiv(hidden, group), dtype=torch.float32)
    _round_rows(these, x, w13.given, codes, scales, group, tiles, launch, limited=False)
    inner = workspace.empty(count, width, dtype=code if blocked else x.dtype)
    inner_scales = workspace.empty(count, triton.cdiv(width, group) if blocked else 1, dtype=torch.float32)
    out = workspace.empty(count, hidden, dtype=dtype)
    high = 1 if these.block is None else these.block[0]
    gated, row = these.first["GATED"], these.first["ROW"]
    common = {"BLOCKED": blocked, "HIGH": high, "INT8": these.int8, "BLOCK_M": form.rows, "PDL": these.pdl}
    rows = (codes, scales)
    results: tuple[Tensor, ...] = (inner, inner_scales)
    routed = (tiles.order, routing.topk_weights, *table[1:])
    if _takes_loader(these, form, first) and gated and row == 1:
        _with_loader("first_kernel", these, first, 1, rows, w13, results, tiles, routed, launch)
    else:
        tma = these.tma and row == 1
        sides = 2 if gated else 1
        w13_tiles = _boxes(w13.weight, (these.experts, sides, width, hidden), first) if tma else w13.weight
        programs = programs_of(these, first, tiles, triton.cdiv(width, first.n))
        arguments: tuple[Any, ...] = (*rows, w13.weight, w13_tiles, w13.scale, w13.bias, *results, *routed, programs)
        more = {"PIECES": sides if row == 1 else 1, "SHARE": first.share, "FLATTEN": first.flatten, "TMA": tma}
        more["UPCAST"] = these.upcast
        constants = {**these.first, **common, **more, **step_of(first), **dependent(these)}
        launch(w8a8.first_kernel, programs, *arguments, **constants)
    if not blocked:
        rounded, group = workspace.empty(count, width, dtype=code), width
        _round_rows(these, inner, w2.given, rounded, inner_scales, group, tiles, launch, limited=True)
        inner = rounded
    rows, results = (inner, inner_scales), (out,)
    if _takes_loader(these, form, second):
        _with_loader("second_kernel", these, second, 2, rows, w2, results, tiles, routed, launch)
        return out
    w2_tiles = _boxes(w2.weight, (these.experts, 1, hidden, width), second) if these.tma else w2.weight
    programs = programs_of(these, second, tiles, triton.cdiv(hidden, second.n))
    arguments = (*rows, w2.weight, w2_tiles, w2.scale, w2.bias, *results, *routed, programs)
    more = {"SHARE": second.share, "FLATTEN": second.flatten, "TMA": these.tma}
    constants = {**these.second, **common, **more, **step_of(second), **dependent(these)}
    launch(w8a8.second_kernel, programs, *arguments, **constants)
    return out


def _takes_loader(these: Products, form: Form, step: Step) -> bool:
    if not (these.loader and step.loader):
        return False
    from .kernels import hopper_fp8

    return form.rows == hopper_fp8.ROWS


def _with_loader(
    name: str,
    these: Products,
    step: Step,
    product: int,
    rows: tuple[Tensor, Tensor],
    matrix: Operand,
    results: tuple[Tensor, ...],
    tiles: Tiles,
    routed: tuple[Tensor, ...],
    launch: Launch,
) -> None:
    """The first or the second product by the kernel with a loading warpgroup."""
    from .kernels import hopper_fp8

    block = hopper_fp8.BLOCK
    if product == 1:
        columns, weight = these.first["I"] // block, hopper_fp8.boxes(matrix.weight, block)
        constants = {k: v for k, v in these.first.items() if k not in ("GATED", "ROW", "UP")}
        given: tuple[Any, ...] = rows
    else:
        columns, weight = triton.cdiv(these.second["H"], 2 * block), hopper_fp8.boxes(matrix.weight, 2 * block)
        constants = these.second
        given = (hopper_fp8.boxes(rows[0], hopper_fp8.ROWS // 2), rows[1])
    programs = programs_of(these, step, tiles, columns)
    blocks = {"STAGES": step.stages, "GROUP": step.share, "PDL": these.pdl}
    blocks |= {"SUM_REGISTERS": 232, "LOAD_REGISTERS": 40}
    launch(
        getattr(hopper_fp8, name), programs, *given, weight, matrix.scale, matrix.bias, *results, *routed, programs,
        **constants, **blocks, num_warps=4, **dependent(these),
    )  # fmt: skip


def _round_rows(
    these: Products,
    x: Tensor,
    given: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    group: int,
    tiles: Tiles,
    launch: Launch,
    *,
    limited: bool,
) -> None:
    """Rows of x to codes and scales; ``limited`` to those that the tiles hold."""
    rows, width = x.shape
    block = triton.next_power_of_2(group)
    # Some thousand values a program: of one group of 128 there is less to do than to begin.
    groups = min(triton.next_power_of_2(triton.cdiv(width, group)), max(1, 2048 // block))
    launch(
        w8a8.round_kernel,
        (rows, triton.cdiv(width, group * groups)),
        x,
        given,
        codes,
        scales,
        tiles.tile_stop,
        tiles.num_tiles,
        WIDTH=width,
        GROUP=group,
        INT8=these.int8,
        GIVEN=given is not None,
        GROUPS=groups,
        BLOCK=block,
        LIMITED=limited,
        UPCAST=these.upcast,
        PDL=these.pdl,
        num_warps=4,
        **dependent(these),
    )


def _boxes(weight: Tensor, shape: tuple[int, int, int, int], step: Step) -> TensorDescriptor:
    _, sides, rows, columns = shape
    strides = [sides * rows * columns, rows * columns, columns, 1]
    return TensorDescriptor(weight, list(shape), strides, [1, 1, step.n, step.k])
