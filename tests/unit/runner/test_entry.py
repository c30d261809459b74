"""One of two entries, chosen once at bind by the experts' trait; what a graph believes of the op is true."""

from __future__ import annotations

import gc

import pytest
import torch
import toys
from torch.library import opcheck

from moe_core import MoEConfig, MoELayer, MoERunner, hookimpl, ops


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of ops that were entered."""
    seen: list[str] = []
    right = ops.call

    def call(runner, *inputs):
        seen.append(runner.op.name().removeprefix("moe_core::"))
        return right(runner, *inputs)

    monkeypatch.setattr(ops, "call", call)
    return seen


@torch.no_grad()
@pytest.mark.parametrize(
    ("traits", "entry"), [({}, "python"), ({"entry": "python"}, "python"), ({"entry": "op"}, "op")]
)
@pytest.mark.parametrize("shared", [None, 40])
def test_the_backend_chooses_the_entry_at_bind(bind, op_calls: list[str], traits, entry: str, shared) -> None:
    runner = bind(toys.Toy(**traits), shared_intermediate_size=shared)
    assert runner.report.entry == entry
    assert f"entry {entry}" in runner.report.summary()
    runner(torch.randn(3, 32))
    assert op_calls == ({"python": [], "op": ["moe_forward_shared" if shared else "moe_forward"]}[entry])


@torch.no_grad()
def test_the_entry_does_not_change_after_the_bind(bind, op_calls: list[str]) -> None:
    toy = toys.Toy(entry="op")
    runner = bind(toy)
    toy.traits["entry"] = "python"
    runner(torch.randn(3, 32))
    assert (op_calls, runner.report.entry) == (["moe_forward_shared"], "op")


@torch.no_grad()
@pytest.mark.parametrize("shared", [None, 40])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_both_entries_give_equal_bits(bind, shared, tokens: int) -> None:
    config = MoEConfig(32, 24, 8, 2, shared_intermediate_size=shared)
    layer, x = MoELayer(config), torch.randn(tokens, 32)
    by_op = bind(toys.Toy(entry="op"), layer=layer, shared_intermediate_size=shared)
    assert torch.equal(by_op(x), MoERunner(config, layer.weights(), backend="reference")(x))


def test_what_must_give_gradients_takes_the_python_entry(bind, op_calls: list[str]) -> None:
    class Training(toys.Toy):
        @hookimpl
        def moe_supports(self, config, stage, platform):
            return toys.Verdict.yes(entry="op", supports_backward=True)

    runner, x = bind(Training()), torch.randn(3, 32, requires_grad=True)
    runner(x).sum().backward()
    assert op_calls == []
    assert x.grad.abs().sum() > 0
    assert runner.report.training.entry == "python"
    with torch.no_grad():
        runner(x)
    assert op_calls == ["moe_forward_shared"]


@pytest.mark.parametrize("place", ["gate", "shared_experts", "routed_input_transform", "routed_output_transform"])
def test_a_function_of_the_caller_keeps_its_gradients_from_the_op(bind, op_calls: list[str], place: str) -> None:
    """Its parameters are not seen at bind, only in what it returns: nothing of it may vanish in an op."""

    class Training(toys.Toy):
        @hookimpl
        def moe_supports(self, config, stage, platform):
            return toys.Verdict.yes(entry="op", supports_backward=True)

    layer = MoELayer(MoEConfig(32, 24, 8, 2)).requires_grad_(False)
    weight = torch.randn(32, 8 if place == "gate" else 32, requires_grad=True)
    runner = bind(Training(), layer=layer, shared_intermediate_size=None, **{place: lambda x: x @ weight})
    runner(torch.randn(5, 32)).square().sum().backward()
    assert weight.grad.abs().sum() > 0
    assert op_calls == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["moe_forward", "moe_forward_shared"])
def test_the_op_writes_nothing_even_where_the_caller_allowed_it(bind, name: str) -> None:
    """Its schema says that nothing is written, and a compiler reorders by that; ``inplace`` is for the other entry."""
    shared = 40 if name.endswith("shared") else None
    runner = bind(toys.Mutating(entry="op"), shared_intermediate_size=shared, inplace=True)
    x = torch.randn(5, 32)
    before = x.clone()
    opcheck(getattr(torch.ops.moe_core, name), (x, None, None, None, None, runner.handle))
    want = ops.call(runner, x, None, None, None, None)
    assert torch.equal(x, before)
    compiled = torch.compile(lambda x: runner(x) + x, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), want + before)
    torch._dynamo.reset()
    assert torch.equal(runner(x), want)
    assert torch.equal(x, torch.full_like(x, toys.MARK)), "an eager call may"


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_result_never_shares_memory_with_the_input(bind, tokens: int) -> None:
    x = torch.randn(tokens, 32)
    for inplace in (False, True):
        out = bind(inplace=inplace)(x)
        assert tokens == 0 or out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@torch.no_grad()
def test_a_layer_is_named_by_a_handle_that_dies_with_it(bind) -> None:
    first, second = bind(), bind()
    assert first.handle.device.type == "cpu"
    assert (first.handle.shape, first.handle.dtype) == ((), torch.int64)
    assert int(first.handle) != int(second.handle)
    x, want = torch.randn(3, 32), second(torch.zeros(3, 32))
    assert torch.equal(ops.call(second, torch.zeros(3, 32), None, None, None, None), want)
    number = int(first.handle)
    first(x)
    del first
    gc.collect()
    assert number not in ops._runners
    assert int(second.handle) in ops._runners


@torch.no_grad()
def test_stages_are_plain_functions_of_the_backend_until_somebody_watches(bind, register) -> None:
    """What runs the experts is resolved once, at bind; no plugin manager is called in the hot path."""
    toy = toys.Toy()
    runner = bind(toy)
    binding = runner.bound(needs_grad=False)
    assert binding._experts == toy.moe_experts
    assert binding._reduce == toy.moe_reduce


def test_weights_without_scales_are_refused_never_computed_as_if_they_were_plain(layer: MoELayer) -> None:
    import dataclasses

    from moe_core import QuantConfig
    from moe_core.errors import WeightsError

    for scheme in ("fp8_tensor", "mxfp4", "nvfp4"):
        config = dataclasses.replace(layer.config, quant=QuantConfig(scheme))
        with pytest.raises(WeightsError, match=f"w13_weight_scale.* {scheme}"):
            MoERunner(config, layer.weights())
