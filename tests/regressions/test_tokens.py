"""How many tokens there are and where they go: none, chunk tails, cold and hot experts, more than 65535 rows."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, Routing, explain, hookimpl, plugins
from moe_core.platform import Platform
from moe_core.routing import route
from moe_core.testing import SIZES, random_weights
from moe_core.types import Pending, Plan

SHARED = {"shared_intermediate_size": 40, "shared_expert_gate": True}


def config_of(**fields: object) -> MoEConfig:
    return MoEConfig(**{**SIZES, **fields})


@torch.no_grad()
@pytest.mark.parametrize("order", ["overlap", "before", "after", "internal"])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regression_07_no_tokens(backend: str, order: str, chunk: int | None, dtype: torch.dtype) -> None:
    """An idle rank's empty batch launched kernels with an empty grid, or died in a reshape."""
    config = config_of(**SHARED, shared_experts_order=order, max_chunk_tokens=chunk)
    runner = dense.bind(backend, config, random_weights(config, dtype=dtype))
    for shape in ((0, 32), (2, 0, 32), (0, 3, 32)):
        out = runner(torch.empty(shape, dtype=dtype))
        assert (out.shape, out.dtype) == (shape, dtype)
    out = runner(torch.empty(0, 32, dtype=dtype), torch.empty(0, 16))
    assert out.shape == (0, 32)
    out = runner(torch.empty(0, 32, dtype=dtype), topk_weights=torch.empty(0, 4), topk_ids=torch.empty(0, 4).int())
    assert out.shape == (0, 32)
    op = torch.ops.moe_core.moe_forward_shared
    assert op(torch.empty(0, 32, dtype=dtype), None, None, None, None, runner.handle).shape == (0, 32)
    compiled = torch.compile(lambda x: runner(x) + 1, backend="eager", fullgraph=True)
    assert compiled(torch.empty(0, 32, dtype=dtype)).shape == (0, 32)


@torch.no_grad()
def test_regression_07_every_stage_takes_no_tokens(backend: str) -> None:
    """The layer returns early, but a stage may be called by a dispatch that found nothing for this rank."""
    config = config_of(**SHARED, zero_expert_num=2, zero_expert_type="identity")
    weights, platform = random_weights(config), Platform.detect("cpu", torch.float32)
    plugin = plugins.registry().plugins[backend]
    served = explain(config, "cpu", dtype=torch.float32).candidate(backend).stages
    prepared = weights
    if "moe_prepare" in plugin.impls:
        prepared = plugin.call("moe_prepare", config=config, weights=weights, platform=platform)
    plan, x = Plan(config, prepared, platform.device, torch.float32), torch.empty(0, 32)
    routing = Routing(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.int32))
    if "gate" in served:
        found = plugin.call("moe_gate", plan=plan, hidden_states=x, router_logits=None, input_ids=None)
        assert [tuple(t.shape) for t in found] == [(0, 4), (0, 4)]
    if "shared_experts" in served:
        assert plugin.call("moe_shared_experts", plan=plan, hidden_states=x).result().shape == (0, 32)
    if "experts" in served:
        out = plugin.call("moe_experts", plan=plan, hidden_states=x, routing=routing, router_logits=None)
        assert out.value.shape == ((0, 32) if out.reduced else (0, 4, 32))
        if "reduce" in served:
            pending = Pending(torch.empty(0, 32))
            total = plugin.call("moe_reduce", plan=plan, routing=routing, experts_out=out, shared=pending)
            assert total.shape == (0, 32)


class Rows:
    """An observer that notes the first column of all rows that the experts get."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    @hookimpl(wrapper=True)
    def moe_experts(self, hidden_states):
        self.seen.append(hidden_states[:, 0].clone())
        return (yield)


@pytest.fixture
def rows() -> list[Tensor]:
    observer = Rows()
    plugins.register(observer, "rows")
    yield observer.seen
    plugins.unregister("rows")


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 6])
def test_regression_09_chunk_tails(backend: str, size: int, rows: list[Tensor]) -> None:
    """The last token of a chunked call was computed and written twice; no tokens began at row -1."""
    config, chunked = config_of(**SHARED), config_of(**SHARED, max_chunk_tokens=size)
    weights = random_weights(config)
    whole, parts = dense.bind(backend, config, weights), dense.bind(backend, chunked, weights)
    for tokens in sorted({0, 1, size - 1, size, size + 1, 2 * size, 2 * size + 1}):
        x = torch.randn(tokens, 32)
        wanted = whole(x)
        rows.clear()
        assert torch.equal(parts(x), wanted), tokens
        assert torch.equal(torch.cat([torch.empty(0), *rows]), x[:, 0]), "each row once, in order"


COLD = [0, 7, 15]


def logits_away_from(cold: int) -> Tensor:
    logits = torch.randn(20, 16)
    logits[:, cold] = -1e9
    return logits


def poison_the_allocator() -> None:
    """What is freed here is what a buffer that nobody clears begins with."""
    kept = [torch.full((size,), float("nan")) for size in (640, 2560, 4096, 16 * 24 * 32, 16 * 48 * 32)]
    del kept


@torch.no_grad()
@pytest.mark.parametrize("cold", COLD)
def test_regression_10_an_expert_without_tokens(backend: str, cold: int) -> None:
    """Its rows of a grouped product's buffers were never written: NaN from recycled memory."""
    config = config_of(renormalize=True, expert_bias=True)
    weights, x, logits = random_weights(config), torch.randn(20, 32), logits_away_from(cold)
    routing = route(config, weights, logits)
    assert not (routing.topk_ids == cold).any()
    runner = dense.bind(backend, config, weights)
    poison_the_allocator()
    dense.assert_near(runner(x, logits), dense.routed(config, weights, x, *routing))


@pytest.mark.parametrize("cold", COLD)
def test_regression_10_gradients_of_an_expert_without_tokens(backend: str, cold: int) -> None:
    """Its gradient was whatever the memory held; it is exactly zero."""
    config = config_of(renormalize=True, expert_bias=True)
    weights, x, logits = random_weights(config), torch.randn(20, 32), logits_away_from(cold)
    poison_the_allocator()
    for _, tensor in weights.named_tensors():
        tensor.requires_grad_()
    dense.bind(backend, config, weights)(x, logits).square().sum().backward()
    for tensor in (weights.w13_weight, weights.w2_weight, weights.w13_bias, weights.w2_bias):
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad[cold].abs().sum() == 0
        assert (tensor.grad.flatten(1).abs().sum(1) > 0).sum() == 15


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 4])
def test_regression_11_all_tokens_on_one_expert(backend: str, top_k: int) -> None:
    """Buffers had room for an even load, or for each token once an expert; rows beyond were dropped."""
    config = config_of(top_k=top_k)
    weights, x = random_weights(config), torch.randn(4096, 32)
    ids, topk_weights = torch.full((4096, top_k), 11, dtype=torch.int32), torch.rand(4096, top_k)
    found = dense.bind(backend, config, weights)(x, topk_weights=topk_weights, topk_ids=ids)
    dense.assert_near(found, dense.routed(config, weights, x, topk_weights, ids))
    ids[::3] = 2
    found = dense.bind(backend, config, weights)(x, topk_weights=topk_weights, topk_ids=ids)
    dense.assert_near(found, dense.routed(config, weights, x, topk_weights, ids))


@torch.no_grad()
def test_regression_12_more_rows_than_a_launch_grid_takes(backend: str) -> None:
    """A grid dimension ends at 65535, and int32 offsets wrapped: rows at the far end came from elsewhere."""
    config = MoEConfig(8, 8, 4, 2, renormalize=True)
    weights, x = random_weights(config), torch.randn(70_000, 8)
    dense.assert_near(dense.bind(backend, config, weights)(x), dense.layer(config, weights, x))


@torch.no_grad()
def test_regression_12_weights_beyond_two_to_the_31(backend: str) -> None:
    """Expert times rows times columns overflowed int32. Here the experts overlap in one small storage."""
    if "moe_prepare" in plugins.registry().plugins[backend].impls:
        pytest.skip(f"{backend} repacks the weights, which would need their size in memory")
    experts, rows, hidden = 70_000, 256, 128
    config = MoEConfig(hidden, rows // 2, experts, 2)
    w13 = torch.randn(experts + rows * hidden).div_(8).as_strided((experts, rows, hidden), (1, hidden, 1))
    w2 = torch.randn(experts + rows * hidden).div_(8).as_strided((experts, hidden, rows // 2), (1, rows // 2, 1))
    assert w13.numel() > 2**31
    weights, x = MoEWeights(w13_weight=w13, w2_weight=w2), torch.randn(3, hidden)
    ids = torch.tensor([[0, 69_999], [65_535, 65_536], [69_999, 1]], dtype=torch.int32)
    given = {"topk_weights": torch.rand(3, 2), "topk_ids": ids}
    found = dense.bind(backend, config, weights)(x, **given)
    dense.assert_near(found, dense.routed(config, weights, x, *given.values()))


@torch.no_grad()
def test_every_small_and_odd_batch_equals_the_oracle(backend: str) -> None:
    """Tiles that are mostly padding gave garbage, and routers lost the rows behind their first block."""
    config = config_of(**SHARED, renormalize=True)
    weights, x = random_weights(config), torch.randn(1025, 32)
    runner, wanted = dense.bind(backend, config, weights), dense.layer(config, weights, x)
    together = runner(x)
    for tokens in (*range(1, 18), 31, 33, 127, 129, 257, 1025):
        found = runner(x[:tokens])
        dense.assert_near(found, wanted[:tokens])
        assert torch.equal(found, together[:tokens])


@torch.no_grad()
def test_padding_is_not_counted_as_load(backend: str) -> None:
    """Rows of padding, id -1, were added to the load of an expert, and a placement was planned from it."""
    config = config_of()
    runner, ids = dense.bind(backend, config), torch.tensor([[0, 1, 2, 3], [-1, -1, -1, -1], [3, -1, -1, -1]])
    with runner.recording() as record:
        runner(torch.randn(3, 32), topk_weights=torch.rand(3, 4), topk_ids=ids)
    assert record.tokens_per_expert.tolist() == [1, 1, 1, 2] + [0] * 12
