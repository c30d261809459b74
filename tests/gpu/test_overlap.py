"""On the device, with the reference: overlap changes no bit, nor do other streams, threads, or ten thousand calls."""

from __future__ import annotations

import gc
import random
import threading

import pytest
import torch

from moe_core import MoERunner, streams
from moe_core.testing.tolerances import tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SPECS = {
    "softmax": {},
    "groups": {
        "scoring_func": "sigmoid",
        "num_expert_group": 2,
        "topk_group": 1,
        "group_score": "top2_sum",
        "e_score_correction_bias": True,
        "renormalize": True,
        "routed_scaling_factor": 2.5,
    },
    "biases": {"gate_bias": True, "expert_bias": True, "shared_expert_bias": True, "shared_expert_gate": True},
    "zero experts": {"zero_expert_num": 2, "zero_expert_type": "identity"},
}


def tokens_of(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 32, device="cuda").to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_overlap_equals_no_overlap_bit_for_bit(make_layer, bind, monkeypatch, spec: dict, dtype) -> None:
    forks: list[int] = []
    right = streams.fork
    monkeypatch.setattr(streams, "fork", lambda main, side: (forks.append(1), right(main, side)))
    layer = make_layer(dtype, **spec)
    overlap, before = bind(layer, shared_experts_order="overlap"), bind(layer, shared_experts_order="before")
    after = bind(layer, shared_experts_order="after")
    for tokens in (0, 1, 2, 7, 64, 255, 256, 257, 512):
        x = tokens_of(tokens, dtype)
        forks.clear()
        for _ in range(3):
            out = overlap(x)
            assert torch.equal(out, before(x)), tokens
            assert torch.equal(out, after(x)), tokens
        assert bool(forks) == (0 < tokens <= 256), tokens


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_device_agrees_with_the_cpu(make_layer, bind, spec: dict) -> None:
    layer = make_layer(**spec)
    x, logits = tokens_of(130), torch.randn(130, layer.config.num_router_outputs, device="cuda")
    out = bind(layer)(x, logits).cpu()
    want = MoERunner(layer.config, layer.cpu().weights(), backend="reference")(x.cpu(), logits.cpu())
    assert (out - want).norm() <= tolerance(torch.float32, "layer") * want.norm()


@torch.no_grad()
def test_the_same_kernels_on_two_streams_a_thousand_times(make_layer, bind) -> None:
    layer, x = make_layer(), tokens_of(16)
    overlap, want = bind(layer), bind(layer, shared_experts_order="before")(x)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differing += (overlap(x) != want).any()
    assert int(differing) == 0


@torch.no_grad()
def test_two_streams_at_once_give_what_one_gives(make_layer, bind, delay) -> None:
    runner, inputs = bind(make_layer()), [tokens_of(1 + i % 40) for i in range(60)]
    want = [runner(x) for x in inputs]
    torch.cuda.synchronize()
    callers, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(callers[i % 2]):
            if i in (0, 31):  # each is behind the other once
                delay()
            results.append(runner(x))
    torch.cuda.synchronize()
    for out, y in zip(results, want, strict=True):
        assert torch.equal(out, y)


@torch.no_grad()
@pytest.mark.parametrize("own_stream", [True, False], ids=["a stream each", "one stream"])
@pytest.mark.parametrize("options", [{}, {"max_chunk_tokens": 5}], ids=["whole", "chunked"])
def test_eight_threads_give_what_one_gives(make_layer, bind, options: dict, own_stream: bool) -> None:
    runner, inputs = bind(make_layer(), **options), [tokens_of(1 + i % 13) for i in range(8 * 10)]
    want = [runner(x) for x in inputs]
    torch.cuda.synchronize()
    results: dict[int, torch.Tensor] = {}
    barrier, failures = threading.Barrier(8), []

    def work(i: int) -> None:
        try:
            stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
            barrier.wait()
            with torch.no_grad(), torch.cuda.stream(stream):
                for k in range(i, len(inputs), 8):
                    results[k] = runner(inputs[k])
            stream.synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    torch.cuda.synchronize()
    for k, y in enumerate(want):
        assert torch.equal(results[k], y)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_call_never_waits_for_the_device(make_layer, bind, spec: dict) -> None:
    runner, x = bind(make_layer(**spec)), tokens_of(70)
    runner(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner(x)
        with runner.recording(ids=True):
            runner(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_on_the_device_are_those_on_the_cpu(make_layer) -> None:
    layer, x = make_layer(), tokens_of(20).requires_grad_()
    inputs = [x, *layer.parameters()]
    found = [grad.cpu() for grad in torch.autograd.grad(layer(x).square().sum(), inputs)]
    layer.cpu()
    x = x.detach().cpu().requires_grad_()
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ten_thousand_calls_of_any_size_leak_no_memory(make_layer, bind) -> None:
    runner = bind(make_layer(num_experts=2, top_k=1), shared_experts_stream_token_threshold=256)
    rng, memory = random.Random(0), tokens_of(512)

    def calls(count: int) -> tuple[int, int]:
        for i in range(count):
            runner(memory[: rng.randint(0, 512)])
            if i % 500 == 499:
                torch.cuda.synchronize()  # else the host may run ahead, and memory in flight is no leak
        torch.cuda.synchronize()
        gc.collect()
        reserved = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), reserved

    runner(memory)
    allocated, reserved = calls(500)
    allocated_then, reserved_then = calls(10_000)
    assert allocated_then == allocated
    assert reserved_then <= reserved + 32 * 2**20
