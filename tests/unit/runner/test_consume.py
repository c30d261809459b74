"""Weights that are given away: who may free which, what is left of them, and what a layer can no longer do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

from moe_core import MoEConfig, MoELayer, MoERunner, hookimpl
from moe_core.errors import BindError, InputError, WeightsError
from moe_core.weights import MoEWeights


class Repacks(toys.Toy):
    """Copies all it reads, and says so after each expert."""

    @hookimpl
    def moe_prepare(self, weights):
        copies = MoEWeights(**{name: tensor.detach().clone() for name, tensor in weights.named_tensors()})
        for expert in range(len(weights.w13_weight)):
            weights.release("w13_weight", expert)
            weights.release("w2_weight", expert)
        weights.release("shared_w13_weight")
        weights.release("gate_weight")
        return self.prepared(copies)

    def prepared(self, copies):
        return copies


@pytest.fixture
def layer() -> MoELayer:
    """Its experts have several pages each."""
    torch.manual_seed(0)
    return MoELayer(MoEConfig(64, 96, 8, 2, shared_intermediate_size=40))


def run(bind: Any, layer: MoELayer, backend: Any, **options: Any) -> tuple[MoERunner, torch.Tensor]:
    runner = bind(backend, layer=layer, hidden_size=64, intermediate_size=96, **options)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return runner, runner(x)


def test_what_was_released_is_gone_and_the_layer_computes_the_same(bind, layer: MoELayer) -> None:
    expected = run(bind, layer, "reference")[1]
    runner, found = run(bind, layer, Repacks(), consume_weights=True)
    assert torch.equal(found, expected)
    empty = {name for name, tensor in layer.named_parameters() if not tensor.numel()}
    assert empty == {"w13_weight", "w2_weight", "shared_w13_weight"}  # the router is always read again
    assert runner.weights.w13_weight.is_meta and runner.weights.w13_weight.shape == (8, 192, 64)
    assert runner.report.backend == "toy" and runner.device.type == "cpu"


def test_nothing_is_freed_without_being_asked(bind, layer: MoELayer) -> None:
    run(bind, layer, Repacks())
    assert all(tensor.numel() for tensor in layer.parameters())


def test_a_backend_that_reads_the_originals_leaves_them(bind, layer: MoELayer) -> None:
    runner, found = run(bind, layer, "reference", consume_weights=True)
    assert all(tensor.numel() for tensor in layer.parameters())
    runner.refresh()
    assert torch.equal(run(bind, layer, "reference")[1], found)


def test_what_another_backend_reads_is_not_freed(bind, layer: MoELayer) -> None:
    class ExpertsAlone(Repacks):
        stages = ("gate", "experts", "reduce")

    expected = run(bind, layer, "reference")[1]
    with pytest.warns(UserWarning, match="shared_experts"):
        _, found = run(bind, layer, ExpertsAlone(), consume_weights=True)
    assert torch.equal(found, expected)
    assert layer.shared_w13_weight.numel() and not layer.w13_weight.numel()


def test_experts_that_share_memory_are_not_emptied_one_by_one(bind, layer: MoELayer) -> None:
    """[E, 2I, H] with a stride of 0: what expert 0 gives back would be everybody's."""
    with torch.no_grad():
        layer.w13_weight = torch.nn.Parameter(layer.w13_weight[:1].clone().expand(8, -1, -1), requires_grad=False)
    expected = run(bind, layer, "reference")[1]
    assert torch.equal(run(bind, layer, Repacks(), consume_weights=True)[1], expected)


def test_the_check_at_bind_still_sees_a_wrong_expert(bind, layer: MoELayer) -> None:
    """It says what is wrong; the weights are gone all the same, so they can't be read as zeros."""

    class Swaps(Repacks):
        def prepared(self, copies):
            copies.w13_weight = copies.w13_weight.view(8, 2, 96, 64).flip(1).reshape(8, 192, 64)
            return copies

    with pytest.raises(BindError, match="gate and up are swapped"):
        run(bind, layer, Swaps(), consume_weights=True)
    assert not layer.w13_weight.numel()


def test_what_needs_them_again_says_so(bind, layer: MoELayer) -> None:
    runner, _ = run(bind, layer, Repacks(), consume_weights=True)
    with pytest.raises(WeightsError, match=r"w13_weight, w2_weight.*consume_weights=False"):
        runner.refresh()
    with pytest.raises(WeightsError, match="gradients"):
        runner.bound(needs_grad=True)
    with torch.no_grad():
        layer.gate_weight.mul_(2)
        with pytest.raises(WeightsError, match="binding anew"):
            runner(torch.ones(2, 64))


def test_ranks_keep_theirs(bind, layer: MoELayer) -> None:
    with pytest.raises(InputError, match="mesh"):
        run(bind, layer, "reference", consume_weights=True, mesh=object())
