"""Chunking bounds memory and nothing else; below it, a row does not depend on the rows beside it, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_core import MoEConfig, MoELayer, MoERunner, backends, hookimpl, plugins
from moe_core.chunking import bytes_per_token, chunks

USABLE = [status.name for status in backends() if status.status == "ok" and "cpu" in status.device_types]
CONFIGS = {
    "shared": {"renormalize": True, "shared_intermediate_size": 40, "shared_expert_gate": True},
    "sigmoid groups": {"scoring_func": "sigmoid", "num_expert_group": 4, "topk_group": 2, "renormalize": True},
    "no gate row": {"gated": False, "activation": "gelu_tanh", "intermediate_size": 25},
    "clamped": {"swiglu_limit": 0.5, "swiglu_alpha": 1.7, "swiglu_beta": 1.0, "scoring_func": "sqrtsoftplus"},
}


def layer_of(**fields: object) -> MoELayer:
    return MoELayer(MoEConfig(**{"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 2, **fields}))


def runner_of(layer: MoELayer, backend: str, **fields: object) -> MoERunner:
    with torch.no_grad():
        return MoERunner(dataclasses.replace(layer.config, **fields), layer.weights(), backend=backend)


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_chunked_equals_unchunked_bit_for_bit(fields: dict, backend: str) -> None:
    layer = layer_of(**fields)
    whole = runner_of(layer, backend)
    for size in (1, 7, 8):
        chunked = runner_of(layer, backend, max_chunk_tokens=size)
        for tokens in sorted({0, 1, size - 1, size, size + 1, 2 * size, 2 * size + 1, 37}):
            x = torch.randn(tokens, 32)
            assert torch.equal(chunked(x), whole(x)), f"{tokens} tokens in chunks of {size}"


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    layer = layer_of(hidden_size=2048, intermediate_size=96, shared_intermediate_size=64, shared_expert_gate=True)
    runner, x = runner_of(layer, backend), torch.randn(41, 2048)
    together = runner(x)
    for tokens in (1, 2, 3, 5, 8, 13, 32):
        assert torch.equal(runner(x[:tokens]), together[:tokens])
    assert torch.equal(runner(x.flip(0)).flip(0), together)


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_every_argument_is_cut_with_its_tokens(backend: str) -> None:
    layer = layer_of()
    whole, chunked = runner_of(layer, backend), runner_of(layer, backend, max_chunk_tokens=4)
    x, logits = torch.randn(11, 32), torch.randn(11, 8)
    assert torch.equal(chunked(x, logits), whole(x, logits))
    given = {"topk_weights": torch.rand(11, 2), "topk_ids": torch.stack([torch.randperm(8)[:2] for _ in range(11)])}
    assert torch.equal(chunked(x, **given), whole(x, **given))
    assert torch.equal(chunked(x.view(1, 11, 32)), whole(x).view(1, 11, 32))
    strided = torch.randn(32, 11).t()
    assert torch.equal(chunked(strided), whole(strided.contiguous()))
    assert torch.equal(chunked(x[:1].expand(11, 32)), whole(x[:1].expand(11, 32).contiguous()))


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_hash_routing_takes_the_ids_of_its_chunk(backend: str) -> None:
    layer = layer_of()
    weights = layer.weights()
    weights.tid2eid = torch.stack([torch.randperm(8)[:2] for _ in range(50)])
    config = dataclasses.replace(layer.config, hash_routing=True)
    x, ids = torch.randn(11, 32), torch.randint(0, 50, (11,))
    whole = MoERunner(config, weights, backend=backend)(x, input_ids=ids)
    chunked = MoERunner(dataclasses.replace(config, max_chunk_tokens=3), weights, backend=backend)
    assert torch.equal(chunked(x, input_ids=ids), whole)


def test_gradients_pass_through_chunks() -> None:
    x, seen = torch.randn(11, 32), []
    layer = layer_of(**CONFIGS["shared"])
    for limit in (None, 4):
        runner = MoERunner(dataclasses.replace(layer.config, max_chunk_tokens=limit), layer.weights())
        given = x.clone().requires_grad_()
        layer.zero_grad()
        runner(given).square().sum().backward()
        seen.append([given.grad, *(p.grad for p in layer.parameters())])
    for whole, chunked in zip(*seen, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_chunks_cover_every_token_once() -> None:
    for tokens in (0, 1, 5, 6, 7):
        parts = list(chunks(tokens, 3))
        assert [i for part in parts for i in range(tokens)[part]] == list(range(tokens))
        assert all(0 < len(range(tokens)[part]) <= 3 for part in parts)


class CallSizes:
    """An observer that notes how many tokens each call of the experts gets."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    @hookimpl(wrapper=True)
    def moe_experts(self, hidden_states):
        self.seen.append(hidden_states.shape[0])
        return (yield)


@pytest.fixture
def sizes() -> list[int]:
    observer = CallSizes()
    plugins.register(observer, "sizes")
    yield observer.seen
    plugins.unregister("sizes")


@torch.no_grad()
def test_the_budget_holds_in_every_call(sizes: list[int]) -> None:
    layer = layer_of()
    x = torch.randn(11, 32)
    runner_of(layer, "reference", max_chunk_tokens=4)(x)
    assert sizes == [4, 4, 3]
    sizes.clear()
    budget = 2 * bytes_per_token(layer.config, torch.float32) + 1
    runner_of(layer, "reference", max_chunk_bytes=budget)(x)
    assert max(sizes) == 2
    sizes.clear()
    runner_of(layer, "reference", max_chunk_bytes=1, max_chunk_tokens=4)(x)
    assert max(sizes) == 1, "a token is never cut"
    sizes.clear()
    runner_of(layer, "reference", max_chunk_tokens=11)(x)
    assert sizes == [11]


def test_the_report_counts_the_staging_buffer() -> None:
    report = runner_of(layer_of(), "reference", max_chunk_tokens=4).report
    assert report.workspace_bytes["staging"] == 4 * 32 * 4
    assert runner_of(layer_of(), "reference").report.workspace_bytes["staging"] == 0
