"""The grouped products of :mod:`moe_cuda.kernels.grouped` for Hopper, with a warpgroup that only loads.

Two warpgroups multiply 64 rows each of a tile of 128; the third keeps their operands coming, also while they finish a
tile. Weights come through the tensor memory accelerator, hidden states are gathered by asynchronous copies, or, where a
kernel in front has gathered them, come like weights; barriers in shared memory say what is there (``ready``) and what
may be overwritten (``empty``). In Gluon, because Triton's own pipeline has all warps load and multiply in turn;
Triton's interpreter cannot run it.
"""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation import finish
from .grouped import place

ROWS = 128
"""Of a tile; an expert's last tile of at most half as many keeps one of the two warpgroups idle."""
DEPTH = 64
"""Elements of a sum in one step: 128 bytes, the widest row of swizzled shared memory."""
_ROWS, _DEPTH = gl.constexpr(ROWS), gl.constexpr(DEPTH)
_HALF = gl.constexpr(ROWS // 2)
_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_LOADERS = gl.constexpr(128)  # threads of the warpgroup that loads
_OUT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))  # sixteen bytes a thread go to memory
_IN = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


def boxes(tensor: Tensor, rows: int) -> Any:
    """A descriptor of ``tensor`` [..., K] as a matrix, whose boxes are ``rows`` high."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return TensorDescriptor(tensor, list(matrix.shape), list(matrix.stride()), [rows, DEPTH], _SHARED)


@gluon.jit
def _load_rows(rows, start, stop, at, to, ready, COLUMNS: gl.constexpr):
    """DEPTH elements of a tile's rows, of half of them where that is all; COLUMNS rows of weights are to come too."""
    if stop - start > _HALF:
        mbarrier.expect(ready, (_ROWS + COLUMNS) * _DEPTH * 2)
        tma.async_copy_global_to_shared(rows, [start + _HALF, at], ready, to.slice(_HALF, _HALF, 0))
    else:
        mbarrier.expect(ready, (_HALF + COLUMNS) * _DEPTH * 2)
    tma.async_copy_global_to_shared(rows, [start, at], ready, to.slice(0, _HALF, 0))


@gluon.jit
def _load_first(
    x, w13, order, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, programs,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    GATHERED: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tiles = gl.load(num_tiles)
    step = 0
    for t in range(gl.program_id(0), tiles * BLOCKS, programs):
        tile, block = place(t, tiles, BLOCKS, GROUP)
        start, stop = gl.load(tile_start + tile), gl.load(tile_stop + tile)
        if not GATHERED:
            row = start + gl.arange(0, _ROWS, gl.SliceLayout(1, _IN))
            pair = gl.load(order + row, mask=row < stop, other=0)
            h = gl.arange(0, _DEPTH, gl.SliceLayout(0, _IN))
            x_at = x + (pair // K).to(gl.int64)[:, None] * H + h[None, :]
            here = (row < stop)[:, None]
        gate_row = gl.load(tile_expert + tile) * (2 * I) + block * BLOCK_N
        for at in range(0, H, _DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            if GATHERED:
                _load_rows(x, start, stop, at, a.index(stage), ready.index(stage), 2 * BLOCK_N)
            else:
                mbarrier.expect(ready.index(stage), 2 * BLOCK_N * _DEPTH * 2)
            gate, up = b.index(stage).slice(0, BLOCK_N, 0), b.index(stage).slice(BLOCK_N, BLOCK_N, 0)
            tma.async_copy_global_to_shared(w13, [gate_row, at], ready.index(stage), gate)
            tma.async_copy_global_to_shared(w13, [gate_row + I, at], ready.index(stage), up)
            if not GATHERED:
                async_copy.async_copy_global_to_shared(a.index(stage), x_at + at, mask=here)
                async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
            step += 1


@gluon.jit
def _multiply(acc, a, b, ready, empty, step, HALF: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
              FENCE: gl.constexpr):  # fmt: skip
    """acc + a @ b^T over DEPTH elements for one half of the rows; a step is handed back when the next is under way."""
    for at in range(0, DEPTH, _DEPTH):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        if FENCE:
            # Asynchronous copies write like ordinary stores; the products read like the accelerator.
            fence_async_shared()
        rows = a.index(stage).slice(_HALF * HALF, _HALF, 0)
        token = warpgroup_mma(rows, b.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(token,))
        if at > 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return acc, step


@gluon.jit
def _skip(ready, empty, step, DEPTH: gl.constexpr, STAGES: gl.constexpr):
    # No rows for this half: it hands every step back, not sooner than it has come.
    for _ in range(0, DEPTH, _DEPTH):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage))
        step += 1
    return step


@gluon.jit
def _first_half(
    b13, inner, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, programs,
    HALF: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, GATHERED: gl.constexpr,
):  # fmt: skip
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, 2 * BLOCK_N, 16])
    BLOCKS: gl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tiles = gl.load(num_tiles)
    step = 0
    for t in range(gl.program_id(0), tiles * BLOCKS, programs):
        tile, block = place(t, tiles, BLOCKS, GROUP)
        start, stop = gl.load(tile_start + tile) + _HALF * HALF, gl.load(tile_stop + tile)
        if start < stop:
            both = gl.zeros([_HALF, 2 * BLOCK_N], gl.float32, SUM)
            both, step = _multiply(both, a, b, ready, empty, step, HALF, H, STAGES, not GATHERED)
            gate, up = both.reshape([_HALF, 2, BLOCK_N]).permute((0, 2, 1)).split()
            weight = 1.0
            if WEIGHT_ON_INPUT:
                weighted = start + gl.arange(0, _HALF, gl.SliceLayout(1, gate.type.layout))
                pair = gl.load(order + weighted, mask=weighted < stop, other=0)
                weight = gl.load(topk_weights + pair, mask=weighted < stop, other=0.0)[:, None]
            column = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gate.type.layout))
            bias_at = (gl.load(tile_expert + tile).to(gl.int64) * (2 * I) + column)[None, :]
            y = finish(
                gate, up, weight, b13, bias_at, (column < I)[None, :], True, I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT,
                ALPHA, BETA,
            )  # fmt: skip
            y = gl.convert_layout(y.to(inner.dtype.element_ty), _OUT)
            row = start + gl.arange(0, _HALF, gl.SliceLayout(1, _OUT))
            n = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, _OUT))
            to = inner + row.to(gl.int64)[:, None] * I + n[None, :]
            gl.store(to, y, mask=(row < stop)[:, None] & (n < I)[None, :])
        else:
            step = _skip(ready, empty, step, H, STAGES)


@gluon.jit(do_not_specialize=["programs"])
def first_kernel(
    x, w13, b13, inner, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    ACT: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, SUM_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
    GATHERED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """inner[row] = act(x[token of row] @ w13[expert]^T), rows in the order of ``order``, x's too if GATHERED; H is a
    multiple of DEPTH."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    a = gl.allocate_shared_memory(inner.dtype.element_ty, [STAGES, _ROWS, _DEPTH], w13.layout)
    b = gl.allocate_shared_memory(inner.dtype.element_ty, [STAGES, 2 * BLOCK_N, _DEPTH], w13.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1 if GATHERED else 1 + _LOADERS)
        mbarrier.init(empty.index(stage), count=2)
    # Written out: a tuple with a name would make tensors of its constants.
    gl.warp_specialize(
        [
            (_first_half, (
                b13, inner, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty,
                programs, 0, H, I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, BLOCK_N, STAGES, GROUP,
                GATHERED,
            )),
            (_first_half, (
                b13, inner, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty,
                programs, 1, H, I, BIAS, WEIGHT_ON_INPUT, ACT, LIMIT, ALPHA, BETA, BLOCK_N, STAGES, GROUP,
                GATHERED,
            )),
            (_load_first, (
                x, w13, order, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, programs,
                H, I, K, BLOCK_N, STAGES, GROUP, GATHERED,
            )),
        ],
        [4, 4],
        [SUM_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _load_second(
    inner, w2, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, programs,
    H: gl.constexpr, I: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tiles = gl.load(num_tiles)
    step = 0
    for t in range(gl.program_id(0), tiles * BLOCKS, programs):
        tile, block = place(t, tiles, BLOCKS, GROUP)
        start, stop = gl.load(tile_start + tile), gl.load(tile_stop + tile)
        w_row = gl.load(tile_expert + tile) * H + block * BLOCK_N
        for at in range(0, I, _DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            _load_rows(inner, start, stop, at, a.index(stage), ready.index(stage), BLOCK_N)
            tma.async_copy_global_to_shared(w2, [w_row, at], ready.index(stage), b.index(stage))
            step += 1


@gluon.jit
def _second_half(
    b2, parts, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, programs,
    HALF: gl.constexpr, H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BLOCK_N, 16])
    BLOCKS: gl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    SIDE: gl.constexpr = BLOCK_N // 2
    tiles = gl.load(num_tiles)
    step = 0
    for t in range(gl.program_id(0), tiles * BLOCKS, programs):
        tile, block = place(t, tiles, BLOCKS, GROUP)
        start, stop = gl.load(tile_start + tile) + _HALF * HALF, gl.load(tile_stop + tile)
        if start < stop:
            acc = gl.zeros([_HALF, BLOCK_N], gl.float32, SUM)
            acc, step = _multiply(acc, a, b, ready, empty, step, HALF, I, STAGES, False)
            if BIAS:
                column = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUM))
                expert = gl.load(tile_expert + tile).to(gl.int64)
                acc += gl.load(b2 + expert * H + column, mask=column < H, other=0.0).to(gl.float32)[None, :]
            if not WEIGHT_ON_INPUT:
                weighted = start + gl.arange(0, _HALF, gl.SliceLayout(1, SUM))
                pair = gl.load(order + weighted, mask=weighted < stop, other=0)
                acc *= gl.load(topk_weights + pair, mask=weighted < stop, other=0.0)[:, None]
            row = start + gl.arange(0, _HALF, gl.SliceLayout(1, _OUT))
            here = (row < stop)[:, None]
            pair = gl.load(order + row, mask=row < stop, other=0)
            n = block * BLOCK_N + gl.arange(0, SIDE, gl.SliceLayout(0, _OUT))
            to = parts + pair.to(gl.int64)[:, None] * H + n[None, :]
            # One side after the other: the way through shared memory to wide stores takes half as much of it.
            left, right = acc.reshape([_HALF, 2, SIDE]).permute((0, 2, 1)).split()
            left = gl.convert_layout(left.to(parts.dtype.element_ty), _OUT)
            gl.store(to, left, mask=here & (n < H)[None, :])
            right = gl.convert_layout(right.to(parts.dtype.element_ty), _OUT)
            gl.store(to + SIDE, right, mask=here & (n + SIDE < H)[None, :])
        else:
            step = _skip(ready, empty, step, I, STAGES)


@gluon.jit(do_not_specialize=["programs"])
def second_kernel(
    inner, w2, b2, parts, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, programs,
    H: gl.constexpr, I: gl.constexpr, BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, SUM_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """parts[pair of row] = weight of pair * (inner[row] @ w2[expert]^T + b2[expert]); I is a multiple of DEPTH."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    a = gl.allocate_shared_memory(parts.dtype.element_ty, [STAGES, _ROWS, _DEPTH], w2.layout)
    b = gl.allocate_shared_memory(parts.dtype.element_ty, [STAGES, BLOCK_N, _DEPTH], w2.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (_second_half, (
                b2, parts, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty,
                programs, 0, H, I, BIAS, WEIGHT_ON_INPUT, BLOCK_N, STAGES, GROUP,
            )),
            (_second_half, (
                b2, parts, order, topk_weights, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty,
                programs, 1, H, I, BIAS, WEIGHT_ON_INPUT, BLOCK_N, STAGES, GROUP,
            )),
            (_load_second, (
                inner, w2, tile_expert, tile_start, tile_stop, num_tiles, a, b, ready, empty, programs,
                H, I, BLOCK_N, STAGES, GROUP,
            )),
        ],
        [4, 4],
        [SUM_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
