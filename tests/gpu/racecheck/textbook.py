"""textbook.cu in Gluon: one warpgroup stores records, another reads them; full and empty barriers, two slots."""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
WIDE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def producer(slots, full, empty, steps):
    for n in range(steps):
        mbarrier.wait(empty.index(n % 2), ((n // 2) & 1) ^ 1)
        slots.index(n % 2).store(n + gl.arange(0, 128, WIDE))
        mbarrier.arrive(full.index(n % 2))


@gluon.jit
def consumer(out, slots, full, empty, steps):
    total = gl.zeros([128], gl.int32, WIDE)
    for n in range(steps):
        mbarrier.wait(full.index(n % 2), (n // 2) & 1)
        total += slots.index(n % 2).load(WIDE)
        mbarrier.arrive(empty.index(n % 2))
    gl.store(out + gl.arange(0, 128, WIDE), total)


@gluon.jit
def textbook(out, steps):
    slots = gl.allocate_shared_memory(gl.int32, [2, 128], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    gl.warp_specialize(
        [(consumer, (out, slots, full, empty, steps)), (producer, (slots, full, empty, steps))], [4], [40]
    )


out = torch.zeros(128, dtype=torch.int32, device="cuda")
textbook[(1,)](out, 16)
expected = 120 + 16 * torch.arange(128, device="cuda", dtype=torch.int32)
assert torch.equal(out, expected)
