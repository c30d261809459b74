"""MoERunner.capture: graphed calls of any number of tokens equal plain ones."""

from __future__ import annotations

import threading

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def tokens_of(count: int) -> torch.Tensor:
    return torch.randn(count, 32, device="cuda")


@torch.no_grad()
def test_every_count_of_tokens(make_layer, bind) -> None:
    """Below, at, between and above the buckets; an earlier result stays what it was."""
    runner = bind(make_layer(), shared_experts_order="overlap")
    graphed = runner.capture([1, 4, 16])
    kept = []
    for count in (0, 1, 2, 3, 4, 5, 16, 17):
        x = tokens_of(count)
        kept.append((graphed(x), runner(x)))
        assert graphed.bucket(count) == {0: None, 1: 1, 2: 4, 3: 4, 4: 4, 5: 16, 16: 16, 17: None}[count]
    for found, expected in kept:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    x = tokens_of(6).view(2, 3, 32)
    assert graphed(x).shape == x.shape


@torch.no_grad()
def test_capacity_takes_no_padding(make_layer, bind) -> None:
    """Rows of padding would take places that belong to real tokens."""
    runner = bind(make_layer(expert_capacity=2))
    graphed = runner.capture([8])
    assert graphed.bucket(7) is None and graphed.bucket(8) == 8
    x = tokens_of(7)
    assert torch.equal(graphed(x), runner(x))


@torch.no_grad()
def test_changed_weights_are_captured_again(make_layer, bind) -> None:
    layer = make_layer()
    runner = bind(layer)
    graphed, x = runner.capture([4]), tokens_of(3)
    graphed(x)
    layer.w2_weight.mul_(2)
    torch.testing.assert_close(graphed(x), runner(x), rtol=1e-5, atol=1e-5)


def test_gradients_go_past_the_graphs(make_layer, bind) -> None:
    runner = bind(make_layer(), shared_experts_order="before")
    graphed = runner.capture([4])
    x = tokens_of(3).requires_grad_()
    graphed(x).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_gradients_of_parameters_go_past_the_graphs_too(make_layer, bind) -> None:
    layer = make_layer(shared_experts_order="before")
    graphed = bind(layer).capture([4])
    graphed(tokens_of(3)).sum().backward()
    assert layer.w2_weight.grad is not None and layer.w2_weight.grad.any()


@torch.no_grad()
def test_threads_take_turns(make_layer, bind) -> None:
    """Eight threads on streams of their own share one buffer, and none sees another's rows."""
    runner = bind(make_layer())
    graphed = runner.capture([8])
    inputs = [tokens_of(8) for _ in range(8)]
    expected = [runner(x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                out = graphed(inputs[index])
                if not torch.allclose(out, expected[index], rtol=1e-5, atol=1e-5):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
