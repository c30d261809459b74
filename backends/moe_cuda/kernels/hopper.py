"""What the grouped products for Hopper are made of: a warpgroup that only loads, and others that only multiply.

Each multiplying warpgroup has 64 rows of a tile of 128 or 192; the loading one keeps their operands coming, also while
they finish a tile. Weights come through the tensor memory accelerator, hidden states are gathered by asynchronous
copies, or, where a kernel in front has gathered them, come like weights; barriers in shared memory say what is there
(``ready``) and what may be overwritten (``empty``). The loading warpgroup also decides what comes next: it draws pieces
of work from a counter in global memory, so that no multiprocessor waits for one that had larger tiles, and hands each
on through shared memory (``said`` and ``heard``). Which multiprocessor makes a tile changes no bit of it. In Gluon,
because Triton's own pipeline has all warps load and multiply in turn; Triton's interpreter cannot run it. The kernels
are in :mod:`moe_cuda.kernels.hopper_products`, what loads for them in :mod:`moe_cuda.kernels.hopper_loaders`.
"""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HEIGHT = 64
"""Rows that one warpgroup multiplies."""
ROWS = (2 * HEIGHT, 3 * HEIGHT)
"""Of a tile; of one that is not full, the warpgroups without a row skip its steps, and their rows are not loaded."""
DEPTH = 64
"""Elements of a sum in one step: 128 bytes, the widest row of swizzled shared memory."""
_HEIGHT, _DEPTH = gl.constexpr(HEIGHT), gl.constexpr(DEPTH)
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
LOADERS = gl.constexpr(128)  # threads of the warpgroup that loads
OUT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))  # sixteen bytes a thread go to memory
_RECORD = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))  # each thread has all four


def boxes(tensor: Tensor, rows: int) -> Any:
    """A descriptor of ``tensor`` [..., K] as a matrix, whose boxes are ``rows`` high."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return TensorDescriptor(tensor, list(matrix.shape), list(matrix.stride()), [rows, DEPTH], SHARED)


@gluon.jit
def barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Of STAGES steps, which ARRIVALS make ready and GROUPS warpgroups hand back, of the work that is handed on, and of
    what of it is stored."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    work = gl.allocate_shared_memory(gl.int32, [2, 4], _PLAIN)
    said = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    stored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=GROUPS)
    for slot in gl.static_range(2):
        mbarrier.init(said.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=GROUPS)
        mbarrier.init(stored.index(slot), count=GROUPS)
    return ready, empty, work, said, heard, stored


@gluon.jit
def allocate(boxes, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
             ARRIVALS: gl.constexpr):  # fmt: skip
    """Shared memory for STAGES steps of GROUPS warpgroups and of COLUMNS rows of weights, DEPTH elements each, and its
    barriers; ARRIVALS make a step ready."""
    a = gl.allocate_shared_memory(boxes.dtype, [STAGES * GROUPS, _HEIGHT, DEPTH], boxes.layout)
    b = gl.allocate_shared_memory(boxes.dtype, [STAGES, COLUMNS, DEPTH], boxes.layout)
    ready, empty, work, said, heard, stored = barriers(STAGES, GROUPS, ARRIVALS)
    return a, b, ready, empty, work, said, heard, stored


@gluon.jit
def say(work, said, heard, nth, block, expert, start, stop):
    """The nth piece of work: a block of columns of a tile's rows; stop = 0 says that there is no more."""
    slot = nth % 2
    mbarrier.wait(heard.index(slot), ((nth // 2) & 1) ^ 1)
    i = gl.arange(0, 4, _RECORD)
    record = gl.where(i == 0, block, gl.where(i == 1, expert, gl.where(i == 2, start, stop)))
    work.index(slot).store(record)
    mbarrier.arrive(said.index(slot))


@gluon.jit
def hear(work, said, heard, nth):
    """block, expert, start and stop of the nth piece of work."""
    slot = nth % 2
    mbarrier.wait(said.index(slot), (nth // 2) & 1)
    i = gl.arange(0, 4, _RECORD)
    record = work.index(slot).load(_RECORD)
    block = gl.sum(gl.where(i == 0, record, 0), 0)
    expert = gl.sum(gl.where(i == 1, record, 0), 0)
    start = gl.sum(gl.where(i == 2, record, 0), 0)
    stop = gl.sum(gl.where(i == 3, record, 0), 0)
    mbarrier.arrive(heard.index(slot))
    return block, expert, start, stop


@gluon.jit
def fence_async_global():
    """What was stored to global memory, or is known to be there, comes before what the accelerator reads next."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def hand_in(stored, nth):
    """A warpgroup has stored its part of the nth piece of work."""
    fence_async_global()
    gl.thread_barrier()
    mbarrier.arrive(stored.index(nth % 2))


@gluon.jit
def multiply(acc, a, b, ready, empty, step, PART: gl.constexpr, GROUPS: gl.constexpr, LENGTH: gl.constexpr,
             STAGES: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    """acc + a @ b^T over LENGTH elements for a warpgroup's rows; a step is handed back when the next is under way."""
    for at in range(0, LENGTH, _DEPTH):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        if FENCE:
            # Asynchronous copies write like ordinary stores; the products read like the accelerator.
            fence_async_shared()
        rows = a.index(stage * GROUPS + PART)
        token = warpgroup_mma(rows, b.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(token,))
        if at > 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return acc, step


@gluon.jit
def skip(ready, empty, step, STEPS: gl.constexpr, STAGES: gl.constexpr):
    """No rows for this warpgroup: it hands every step back, not sooner than it has come."""
    for _ in range(STEPS):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage))
        step += 1
    return step
