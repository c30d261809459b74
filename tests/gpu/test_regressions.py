"""Faults that other MoE layers had on GPUs (docs/regressions.md), on this library's own CUDA backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoERunner, MoEWeights, Routing
from moe_core.testing.cases import random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CONFIG = MoEConfig(512, 256, 8, 2, renormalize=True, shared_intermediate_size=256, shared_expert_gate=True)


def pair(config: MoEConfig = CONFIG) -> tuple[MoERunner, MoERunner]:
    """One layer with its shared experts on a stream of their own, and in the caller's."""
    weights = random_weights(config, dtype=torch.bfloat16, device="cuda")
    orders = (dataclasses.replace(config, shared_experts_order=order) for order in ("overlap", "before"))
    aside, serial = (MoERunner(of, weights, backend="cuda") for of in orders)
    return aside, serial


def tokens_of(count: int, width: int = 512) -> Tensor:
    return torch.randn(count, width, device="cuda").bfloat16()


@torch.no_grad()
def test_regression_02_the_side_streams_output_is_not_recycled(delay: Callable[[], None]) -> None:
    """The reduction runs late, when others have asked for memory of the same size on both streams."""
    aside, serial = pair()
    x = tokens_of(64)
    want, side = serial(x), torch.cuda.Stream()
    for _ in range(5):
        delay()
        out = aside(x)
        taken = [torch.full_like(out, 93.0) for _ in range(8)]
        with torch.cuda.stream(side):
            taken += [torch.full_like(out, 93.0) for _ in range(8)]
        torch.cuda.synchronize()
        assert torch.equal(out, want)
        del taken


@torch.no_grad()
def test_regression_03_values_do_not_depend_on_the_order(delay: Callable[[], None]) -> None:
    """The fork waits for an input that is still being computed, and the join for shared experts that are late."""
    aside, serial = pair()
    for tokens in (1, 16, 200):
        x = tokens_of(tokens)
        aside(x), serial(x)
        delay()
        late = x * 2
        assert torch.equal(aside(late), serial(late))


@torch.no_grad()
def test_regression_04_kernels_of_one_family_on_two_streams() -> None:
    """A thousand overlapped calls, from two streams at once: scratch memory is nobody's but the call's."""
    aside, serial = pair()
    inputs = [tokens_of(count) for count in (1, 8, 64, 200)]
    want = [serial(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(125):
        got: list[tuple[int, Tensor]] = []
        for index, x in enumerate(inputs):
            for stream in streams:
                with torch.cuda.stream(stream):
                    got.append((index, aside(x)))
        torch.cuda.synchronize()
        assert all(torch.equal(out, want[index]) for index, out in got)


def spot_check(weights: MoEWeights, x: Tensor, routing: Routing, out: Tensor, rows: list[int]) -> None:
    """Some rows of the routed sum against float32."""
    w13, w2 = weights.w13_weight, weights.w2_weight
    assert w13 is not None and w2 is not None
    for row in rows:
        want = torch.zeros(x.shape[1], device="cuda")
        for weight, expert in zip(routing.topk_weights[row], routing.topk_ids[row].tolist(), strict=True):
            gate, up = (w13[expert].float() @ x[row].float()).chunk(2)
            want += weight * (w2[expert].float() @ (torch.nn.functional.silu(gate) * up))
        error = float((out[row].float() - want).norm() / want.norm())
        assert error < 1e-2, f"row {row}: {error:.1e}"


def layer_of(hidden: int, inner: int, count: int, k: int) -> tuple[MoERunner, MoEWeights]:
    w13 = torch.randn(count, 2 * inner, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5
    w2 = torch.randn(count, hidden, inner, device="cuda", dtype=torch.bfloat16) * inner**-0.5
    weights = MoEWeights(w13_weight=w13, w2_weight=w2)
    return MoERunner(MoEConfig(hidden, inner, count, k), weights, backend="cuda", gate=_no_gate), weights


def _no_gate(x: Tensor) -> Any:
    raise AssertionError("ids are given")


@torch.no_grad()
def test_regression_12_a_kernels_rows_times_columns_beyond_two_to_the_31() -> None:
    """T*K*I and T*K*H beyond int32: rows at both ends."""
    runner, weights = layer_of(1024, 2048, 4, 2)
    tokens = 2**31 // (2 * 1024) + 1000
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    ids = torch.stack([torch.arange(tokens, device="cuda") % 4, (torch.arange(tokens, device="cuda") + 1) % 4], 1)
    routing = Routing(torch.full((tokens, 2), 0.5, device="cuda"), ids.to(torch.int32))
    out = runner(x, topk_weights=routing.topk_weights, topk_ids=routing.topk_ids)
    spot_check(weights, x, routing, out, [0, 1, tokens // 2, tokens - 2, tokens - 1])


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 16, 600])
def test_regression_12_a_kernels_weights_beyond_two_to_the_31(tokens: int) -> None:
    """E*2I*H beyond int32, in every form: the last experts."""
    runner, weights = layer_of(4096, 1408, 200, 2)
    assert weights.w13_weight is not None and weights.w13_weight.numel() > 2**31
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([[199, 198]], device="cuda", dtype=torch.int32).expand(tokens, 2).contiguous()
    routing = Routing(torch.rand(tokens, 2, device="cuda"), ids)
    out = runner(x, topk_weights=routing.topk_weights, topk_ids=routing.topk_ids)
    spot_check(weights, x, routing, out, [0, tokens - 1])
