"""Adapters of libraries that CI does not have: what they choose and refuse before any library is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_core.bench.draw import make_weights
from moe_core.bench.peers import ipex, libraries, sgl_cpu
from moe_core.bench.registry import Problem, Unavailable
from moe_core.bench.shapes import parse_shape


@pytest.mark.parametrize(
    ("capability", "bfloat16", "library"),
    [("AVX2", False, "_C_AVX2"), ("AVX512", False, "_C_AVX512"), ("AVX512", True, "_C"), ("AVX512_BF16", True, "_C")],
)
def test_a_library_for_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: str, bfloat16: bool, library: str
) -> None:
    """A wrong choice ends the process by an illegal instruction."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(libraries, "has_bfloat16_instructions", lambda: bfloat16)
    for name in ("_C", "_C_AVX2", "_C_AVX512"):
        (tmp_path / f"{name}.abi3.so").touch()
    with pytest.raises(Unavailable, match=rf"^{library}\.abi3\.so does not load"):
        libraries.load_vllm_library([tmp_path])


def test_sglangs_kernel_is_not_tried_without_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgl_cpu, "has_bfloat16_instructions", lambda: False)
    shape = parse_shape("32x16x8x2")
    with pytest.raises(Unavailable, match="needs AVX512_BF16") as refusal:
        sgl_cpu.build(Problem(shape, "experts", make_weights(shape, torch.bfloat16, torch.device("cpu"), 0)))
    assert refusal.value.kind == "processor"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_for_ipex(dtype: torch.dtype) -> None:
    """Where each number of [N, K] lies: block of N, block of K, k, n, in bfloat16 with pairs of k innermost."""
    weight = (
        torch.arange(96 * 128).view(96, 128).to(torch.float32 if dtype is torch.float32 else torch.int16).view(dtype)
    )
    packed = ipex._blocked(weight)
    pair = 1 if dtype is torch.float32 else 2
    assert packed.shape == (2, 2, 64 // pair, 48, *(() if pair == 1 else (2,))) and packed.is_contiguous()
    plain = packed.view(2, 2, 64 // pair, 48, pair)
    for n, k in ((0, 0), (1, 0), (47, 63), (48, 64), (95, 127), (17, 90)):
        assert torch.equal(plain[n // 48, k // 64, k % 64 // pair, n % 48, k % pair], weight[n, k])
    with pytest.raises(Unavailable, match="sizes that 16 divides"):
        ipex._blocked(weight[:, :100])
