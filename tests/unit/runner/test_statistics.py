"""What was routed where: recorded and replayed for any backend, at no cost while nobody asks."""

from __future__ import annotations

import pytest
import torch
import toys

from moe_core import MoEConfig, MoELayer, backends
from moe_core.errors import InputError
from moe_core.statistics import RoutingRecord

USABLE = [status.name for status in backends() if status.status == "ok" and "cpu" in status.device_types]


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("chunk", [None, 4])
def test_tokens_per_expert_and_ids_are_those_of_the_router(bind, backend: str, chunk) -> None:
    layer, x = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)), torch.randn(11, 32)
    runner = bind(backend, layer=layer, max_chunk_tokens=chunk)
    want = (x @ layer.gate_weight.t()).topk(2).indices
    with runner.recording(ids=True) as record:
        runner(x)
        runner(x[:3])
    found = torch.cat(record.routed_experts)
    assert torch.equal(found.long(), torch.cat([want, want[:3]]))
    assert found.dtype == torch.int32
    assert torch.equal(record.tokens_per_expert, torch.bincount(found.long().reshape(-1), minlength=8))
    runner(x)
    assert int(record.tokens_per_expert.sum()) == 28, "nothing is counted behind the with"


@torch.no_grad()
def test_ids_of_nobody_are_counted_for_nobody(bind) -> None:
    runner, x = bind(check_ids=False), torch.randn(3, 32)
    ids = torch.tensor([[0, -1], [7, 0], [-1, -1]])
    with runner.recording() as record:
        runner(x, topk_weights=torch.ones(3, 2), topk_ids=ids)
    assert record.tokens_per_expert.tolist() == [2, 0, 0, 0, 0, 0, 0, 1]
    assert record.routed_experts == [], "ids are kept on request only"
    record.add(torch.tensor([[8, 99]]))
    assert int(record.tokens_per_expert.sum()) == 3, "an id out of range is no reason to write out of bounds"


@torch.no_grad()
def test_zero_experts_are_counted_behind_the_others(bind) -> None:
    runner, x = bind(zero_expert_num=2, zero_expert_type="identity", top_k=3), torch.randn(30, 32)
    with runner.recording() as record:
        runner(x)
    assert record.tokens_per_expert.shape == (10,)
    assert int(record.tokens_per_expert.sum()) == 90


@torch.no_grad()
@pytest.mark.parametrize("entry", ["python", "op"])
def test_a_compiled_graph_is_recorded_too(bind, entry: str) -> None:
    runner, x = bind(toys.Toy(entry=entry)), torch.randn(5, 32)
    compiled = torch.compile(lambda x: runner(x), fullgraph=True, backend="eager")
    compiled(x)
    with runner.recording() as record:
        compiled(x)
    assert int(record.tokens_per_expert.sum()) == 10
    torch._dynamo.reset()


@torch.no_grad()
def test_off_it_looks_at_nothing(bind, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args):
        raise AssertionError("recorded without being asked")

    runner = bind()
    monkeypatch.setattr(RoutingRecord, "add", refuse)
    runner(torch.randn(5, 32))
    with pytest.raises(AssertionError, match="without being asked"), runner.recording():
        runner(torch.randn(5, 32))
    runner(torch.randn(5, 32))


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("chunk", [None, 4])
def test_replayed_ids_give_the_recorded_result(bind, backend: str, chunk) -> None:
    """Another router chooses otherwise; with the recorded ids and its own logits it is the first layer again."""
    layer = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40, renormalize=True))
    runner = bind(backend, layer=layer, renormalize=True, max_chunk_tokens=chunk)
    calls = [torch.randn(tokens, 32) for tokens in (11, 0, 1)]
    with runner.recording(ids=True) as record:
        want = [runner(x) for x in calls]
    with runner.replaying(record.routed_experts):
        for x, y in zip(calls, want, strict=True):
            torch.testing.assert_close(runner(x), y)
    noise = torch.randn(11, 8)
    weights = torch.softmax(noise, -1)
    with runner.recording(ids=True) as record:
        runner(calls[0])
    ids = torch.cat(record.routed_experts)
    chosen = weights.gather(1, ids.long())
    given = runner(calls[0], topk_weights=chosen / chosen.sum(-1, keepdim=True), topk_ids=ids)
    with runner.replaying(record.routed_experts):
        torch.testing.assert_close(runner(calls[0], noise), given)


def test_a_replay_gives_gradients_to_the_router(bind) -> None:
    layer, x = MoELayer(MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)), torch.randn(5, 32)
    from moe_core import MoERunner

    runner = MoERunner(layer.config, layer.weights())
    with runner.recording(ids=True) as record:
        runner(x)
    with runner.replaying(record.routed_experts):
        runner(x).square().sum().backward()
    assert layer.gate_weight.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda runner, x, ids: (runner(x), runner(x)), "1 calls were recorded and all are used"),
        (lambda runner, x, ids: runner(x[:2]), "recorded with 5 tokens, this has 2"),
        (lambda runner, x, ids: runner(x, topk_weights=torch.ones(5, 2), topk_ids=ids), "topk_ids is given while"),
    ],
)
def test_a_replay_that_does_not_fit_is_refused(bind, call, text: str) -> None:
    runner, x, ids = bind(), torch.randn(5, 32), torch.zeros(5, 2, dtype=torch.int32)
    with pytest.raises(InputError, match=text), runner.replaying([ids]):
        call(runner, x, ids)
    runner(x)


@torch.no_grad()
def test_a_gate_that_chooses_by_itself_is_not_replayed_in_silence(bind) -> None:
    ids = torch.zeros(5, 2, dtype=torch.int32)
    runner = bind(gate=lambda x: (torch.ones(5, 2), ids))
    with pytest.raises(InputError, match="gate= chooses experts by itself"), runner.replaying([ids]):
        runner(torch.randn(5, 32))
