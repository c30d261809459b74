"""The kernels that only a Hopper GPU runs compile anywhere: Triton's interpreter says nothing about them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

SCRIPT = """
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("meta")
    def map_python_to_cpp_type(self, name): return "x"

triton.runtime.driver.set_active(Driver())
from moe_cuda.kernels import hopper
from moe_cuda.kernels.hopper_products import first_kernel, second_kernel
T, H, I, E, K = 64, 192, 128, 4, 2
make = lambda *size, dtype=torch.bfloat16: torch.empty(size, dtype=dtype, device="meta")
ints = [make(size, dtype=torch.int32) for size in (T * K, 8, 8, 8, 3)]
table = (ints[0], make(T, K, dtype=torch.float32), *ints[1:])
w13, w2, inner, parts = make(E, 2 * I, H), make(E, H, I), make(T * K, I), make(T * K, H)
b13, b2 = make(E, 2 * I), make(E, H)
act = ("silu", 7.0, 1.702, 1.0)
boxes, options = hopper.boxes, dict(num_warps=4, grid=(1,))
for groups, block, stages, registers, columns in (
    (2, 128, 4, (232, 40), 256), (3, 128, 3, (160, 32), 128), (3, 64, 5, (160, 32), 128)
):
    kernels = [
        *(
            first_kernel.warmup(
                x, boxes(w13, block), b13, inner, *table, 132, groups, H, I, K, True, True, *act, block, stages, 8,
                *registers, gathered, not gathered, True, **options
            )
            for x, gathered in ((make(T, H), False), (boxes(make(T * K, H), 64), True))
        ),
        second_kernel.warmup(
            boxes(inner, 64), boxes(w2, 2 * block), b2, parts, *table, 132, groups, H, I, True, False, 2 * block,
            stages, 8, *registers, 1, True, **options
        ),
    ]
    for kernel in kernels:
        assert kernel.metadata.num_warps == 4 * groups + 4 and kernel.metadata.shared <= 232448, kernel.metadata
        multiply = f"wgmma.mma_async.sync.aligned.m64n{columns}k16"
        for instruction in (multiply, "setmaxnreg", "cp.async.bulk.tensor"):
            assert instruction in kernel.asm["ptx"], instruction

from moe_cuda.kernels import hopper_turned
rows, weights = make(T * K, I), hopper_turned.gate_and_up(w13)
for main, rest, stages, early, columns in (
    (128, 32, 6, False, (32, 64, 128)), (256, 32, 4, True, (16, 32, 64, 128, 256))
):
    kernels = [
        hopper_turned.first_kernel.warmup(
            make(T, H), make(T, H), weights, b13, inner, *table, 132, H, I, K, True, True, *act, main, rest, stages, 8,
            216, 72, False, early, True, **options
        ),
        hopper_turned.second_kernel.warmup(
            boxes(rows, main // 4), boxes(rows, rest), boxes(w2, 128), b2, parts, *table, 132, H, I, True, False,
            main, rest, stages, 8, 232, 40, 2 * early, True, **options
        ),
    ]
    for kernel in kernels:
        assert kernel.metadata.num_warps == 12 and kernel.metadata.shared <= 232448, kernel.metadata
        assert ("fence.proxy.async.global" in kernel.asm["ptx"]) == early, "results go from kernel to kernel"
        for width in columns:
            assert f"wgmma.mma_async.sync.aligned.m64n{width}k16" in kernel.asm["ptx"], width
        assert "stmatrix.sync.aligned.m8n8.x4.trans" in kernel.asm["ptx"], "results are turned by the matrix stores"

from moe_cuda.kernels import hopper_fp8
H, I, code, real = 384, 256, torch.float8_e4m3fn, torch.float32
make8 = lambda *size: make(*size, dtype=code)
scales = lambda *size: make(*size, dtype=real)
boxes8 = hopper_fp8.boxes
rows8 = (make8(T * K, I), scales(T * K, I // 128))
kernels = [
    hopper_fp8.first_kernel.warmup(
        make8(T, H), scales(T, H // 128), boxes8(make8(E, 2 * I, H), 128), scales(E, 2 * I // 128, H // 128),
        make(E, 2 * I), *rows8, *table, 132, H, I, K, True, True, *act, 4, 8, 232, 40, True, **options
    ),
    hopper_fp8.second_kernel.warmup(
        boxes8(rows8[0], 64), rows8[1], boxes8(make8(E, H, I), 256), scales(E, H // 128, I // 128), make(E, H),
        make(T * K, H), *table, 132, H, I, True, False, 4, 8, 232, 40, True, **options
    ),
]
for kernel in kernels:
    assert kernel.metadata.num_warps == 12 and kernel.metadata.shared <= 232448, kernel.metadata
    for instruction in ("wgmma.mma_async.sync.aligned.m64n128k32", "setmaxnreg", "cp.async.bulk.tensor"):
        assert instruction in kernel.asm["ptx"], instruction

from moe_cuda.kernels import mma_words
T, H, I, E, K = 16, 2880, 320, 4, 2
ids, weights = make(T, K, dtype=torch.int32), make(T, K, dtype=real)
word = lambda *size: make(*size, dtype=torch.int32)
for code, group, mx, kind in (("e2m1", 32, True, torch.uint8), ("int4", 128, False, torch.bfloat16)):
    scales = lambda n, k: make(E, n, -(-k // group), dtype=kind)
    for chunks, high, wide in ((2, 4, 1), (4, 1, 4)):
        sizes = (code, group, mx, chunks, high, wide, True, True)
        kernels = [
            mma_words.first_kernel.warmup(
                word(T, H // 2), ids, weights, word(E, 2 * I, H // 8), scales(2 * I, H), make(E, 2 * I),
                make(T * K, I), T * K, 32, E, H, I, K, 1, I, True, False, *act, *sizes, **options
            ),
            mma_words.second_kernel.warmup(
                word(T * K, I // 2), ids, weights, word(E, H, I // 8), scales(H, I), make(E, H), make(T * K, H),
                T * K, 32, E, H, I, True, False, *sizes, **options
            ),
        ]
        for kernel in kernels:
            assert "mma.sync.aligned.m16n8k16" in kernel.asm["ptx"]
            # Weights go to registers; warps that share a sum add it up in shared memory.
            assert kernel.metadata.shared == (2048 if wide > 1 else 0), kernel.metadata

from moe_cuda.kernels import row_words
for code, group, mx, kind in (("e2m1", 32, True, torch.uint8), ("int4", 128, False, torch.bfloat16)):
    scales = lambda n, k: make(E, n, -(-k // group), dtype=kind)
    for each, ahead, high, wide in ((1, 3, 4, 1), (2, 2, 1, 2)):
        sizes = (code, group, mx, each, ahead, high, wide, 512, True)
        options = dict(num_warps=high * wide, grid=(1,))
        kernels = [
            row_words.first_kernel.warmup(
                word(T, H // 2), ids, weights, word(E, 2 * I, H // 8), scales(2 * I, H), make(E, 2 * I),
                make(T * K, I), T * K, E, H, I, K, 1, I, True, False, *act, *sizes, **options
            ),
            row_words.second_kernel.warmup(
                word(T * K, I // 2), ids, weights, word(E, H, I // 8), scales(H, I), make(E, H), make(T * K, H),
                T * K, E, H, I, True, False, *sizes, **options
            ),
        ]
        for kernel in kernels:
            assert "mma.sync.aligned.m16n8k16" in kernel.asm["ptx"]
            # A row of x, and nothing of weights.
            assert kernel.metadata.shared == 8192, kernel.metadata
print("compiled")
"""


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="written in the Gluon of triton 3.6")
def test_loader_kernels_compile_without_a_gpu() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
