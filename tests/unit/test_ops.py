"""The custom ops: correct as torch sees them, equal to a plain call, and one graph for all layers."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from moe_core import MoEConfig, MoELayer, MoERunner, backends, ops
from moe_core.errors import GradientError, InputError

USABLE = [status.name for status in backends() if status.status == "ok" and "cpu" in status.device_types]
PLAIN, SHARED = MoEConfig(32, 24, 8, 2), MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)
OPS = {"moe_forward": PLAIN, "moe_forward_shared": SHARED}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def runner_of(config: MoEConfig, backend: str = "reference") -> MoERunner:
    return MoERunner(config, MoELayer(config).weights(), backend=backend)


def given_routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(tokens, 2), torch.rand(tokens, 8).argsort(dim=1)[:, :2].int()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, tokens: int) -> None:
    op, runner, x = getattr(torch.ops.moe_core, name), runner_of(OPS[name]), torch.randn(tokens, 32)
    opcheck(op, (x, None, None, None, None, runner.handle))
    opcheck(op, (x, torch.randn(tokens, 8), None, None, None, runner.handle))
    opcheck(op, (x, None, *given_routing(tokens), None, runner.handle))


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("name", OPS)
def test_both_entries_give_the_same_bits(name: str, backend: str) -> None:
    runner, x = runner_of(OPS[name], backend), torch.randn(2, 5, 32)
    logits = torch.randn(2, 5, 8)
    weights, ids = given_routing(10)
    cases = [(None, None, None), (logits, None, None), (None, weights, ids)]
    for router_logits, topk_weights, topk_ids in cases:
        direct = runner(x, router_logits, topk_weights=topk_weights, topk_ids=topk_ids)
        assert torch.equal(ops.call(runner, x, router_logits, topk_weights, topk_ids, None), direct)


@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 32), (0, 32), (32,)])
@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_have_the_shape_of_real_ones(name: str, shape: tuple[int, ...]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        out = getattr(torch.ops.moe_core, name)(x, None, None, None, None, torch.tensor(0))
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    assert out.is_contiguous()


@torch.no_grad()
def test_a_handle_dies_with_its_runner() -> None:
    runner = runner_of(PLAIN)
    handle, x = runner.handle, torch.randn(1, 32)
    del runner
    gc.collect()
    with pytest.raises(InputError, match="no living MoERunner"):
        torch.ops.moe_core.moe_forward(x, None, None, None, None, handle)


# torch.compile.


@torch.no_grad()
@pytest.mark.parametrize("bound_before", [False, True])
@pytest.mark.parametrize("backend", [None, *USABLE])
def test_a_stack_is_one_graph_without_a_break(backend: str | None, bound_before: bool) -> None:
    counter = CompileCounter()
    stack, x = torch.nn.Sequential(*(MoELayer(SHARED, backend=backend) for _ in range(4))), torch.randn(5, 32)
    if bound_before:
        stack(x)
    compiled = torch.compile(stack, fullgraph=True, backend=counter)
    assert torch.equal(compiled(x), stack(x))
    assert (counter.frame_count, counter.op_count) == (1, 4)


@torch.no_grad()
def test_layers_compiled_one_by_one_share_one_graph() -> None:
    counter = CompileCounter()
    layers, x = [MoELayer(SHARED) for _ in range(4)], torch.randn(5, 32)
    want = torch.nn.Sequential(*copy.deepcopy(layers))(x)
    for layer in layers:
        layer.compile(fullgraph=True, backend=counter)
    assert torch.equal(torch.nn.Sequential(*layers)(x), want)
    assert counter.frame_count == 1


@torch.no_grad()
def test_layers_of_other_sizes_share_the_graph_of_their_kind() -> None:
    counter, x = CompileCounter(), torch.randn(5, 32)
    for fields in ({"shared_intermediate_size": 40}, {"shared_intermediate_size": 24, "top_k": 3}, {"num_experts": 4}):
        config = MoEConfig(**{"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 2, **fields})
        layer = MoELayer(config)
        want = layer(x)
        layer.compile(fullgraph=True, backend=counter)
        assert torch.equal(layer(x), want)
    assert counter.frame_count == 2, "one with shared experts and one without"


@torch.no_grad()
def test_a_compiled_layer_through_the_default_compiler(layer: MoELayer) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 2):
        x = torch.randn(tokens, 32)
        assert torch.equal(compiled(x), layer(x))


@torch.no_grad()
def test_a_graph_follows_weights_that_change_after_it_was_made() -> None:
    counter = CompileCounter()
    layer, x = MoELayer(SHARED), torch.randn(5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    before = compiled(x)
    layer.w2_weight.mul_(-2)
    layer.shared_w2_weight.mul_(-2)
    assert torch.allclose(compiled(x), -2 * before, atol=1e-5)
    layer.load_state_dict(MoELayer(SHARED).state_dict(), assign=True)
    assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_copy_of_a_layer_does_not_share_its_handle() -> None:
    layer, x = MoELayer(SHARED), torch.randn(5, 32)
    other = copy.deepcopy(layer)
    other.w2_weight.zero_()
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(layer, x), layer(x))
    assert torch.equal(compiled(other, x), other(x))


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_a_runner_in_a_compiled_function(backend: str) -> None:
    runner, x = runner_of(SHARED, backend), torch.randn(5, 32)
    weights, ids = given_routing(5)
    compiled = torch.compile(
        lambda x, w, i: runner(x * 2, topk_weights=w, topk_ids=i) + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x, weights, ids), runner(x * 2, topk_weights=weights, topk_ids=ids) + 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, at a graph break
@pytest.mark.parametrize("bound_before", [False, True])
def test_training_through_the_compiler_gives_the_same_gradients(bound_before: bool) -> None:
    stack, x = torch.nn.Sequential(MoELayer(SHARED), torch.nn.Tanh(), MoELayer(SHARED)), torch.randn(5, 32)
    if bound_before:
        stack(x)
    torch.compile(stack, backend="aot_eager")(x).square().sum().backward()
    found = [parameter.grad.clone() for parameter in stack.parameters()]
    stack.zero_grad()
    stack(x).square().sum().backward()
    for ours, parameter in zip(found, stack.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "reference"])
def test_a_forced_backend_without_backward_says_so_in_a_graph_too(backend: str) -> None:
    compiled = torch.compile(MoELayer(SHARED, backend=backend), backend="eager")
    with pytest.raises(GradientError, match="no_grad"):
        compiled(torch.randn(5, 32))
