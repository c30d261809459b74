"""Plugins of another age: fewer arguments still work, and every way to write a plugin is served alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from moe_core import BackendInfo, MoELayer, Pending, Verdict, explain, hookimpl, plugins, reference
from moe_core.errors import PluginError, StageError

from .conftest import Distribute

OLDER = """
from moe_core import BackendInfo, Verdict, hookimpl, reference


@hookimpl
def moe_backend_info():
    return BackendInfo(name="older", priority=90, stages=("gate", "shared_experts", "experts", "reduce"))


@hookimpl
def moe_probe():
    return Verdict.yes()


@hookimpl
def moe_supports(stage):
    return Verdict.yes()


@hookimpl
def moe_prepare(weights):
    return weights


@hookimpl
def moe_gate(hidden_states, plan):  # the order of a signature means nothing
    return reference.moe_gate(plan, hidden_states, None, None)


@hookimpl
def moe_shared_experts(hidden_states, plan):
    return reference.moe_shared_experts(plan, hidden_states)


@hookimpl
def moe_experts(routing, plan, hidden_states):
    return reference.moe_experts(plan, hidden_states, routing)


@hookimpl
def moe_reduce(shared, experts_out, plan, routing):
    return reference.moe_reduce(plan, routing, experts_out, shared)
"""


@torch.no_grad()
def test_hooks_may_take_fewer_arguments_in_any_order(distribute: Distribute, layer: MoELayer) -> None:
    distribute("older", OLDER)
    x = torch.randn(5, 32)
    assert set(layer.report.stages.values()) == {"older"}
    expected = MoELayer(layer.config, backend="reference")
    expected.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), expected(x))


class Toy:
    """A plugin as an object; each test changes one method."""

    @hookimpl
    def moe_backend_info(self) -> BackendInfo:
        return BackendInfo(name="toy", priority=90, stages=("gate", "shared_experts", "experts", "reduce"))

    @hookimpl
    def moe_probe(self) -> Verdict:
        return Verdict.yes()

    @hookimpl
    def moe_gate(self, plan, hidden_states, router_logits, input_ids):
        return reference.moe_gate(plan, hidden_states, router_logits, input_ids)

    @hookimpl
    def moe_shared_experts(self, plan, hidden_states):
        return reference.moe_shared_experts(plan, hidden_states)

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing):
        return reference.moe_experts(plan, hidden_states, routing)

    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        return reference.moe_reduce(plan, routing, experts_out, shared)


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    def add(plugin: object, name: str = "toy") -> None:
        plugins.register(plugin, name)

    yield add
    for name in list(plugins._registered):
        plugins.unregister(name)


class NoGate(Toy):
    @hookimpl
    def moe_gate(self, plan, hidden_states):
        return None


class TupleGate(Toy):
    @hookimpl
    def moe_gate(self, plan, hidden_states):
        return tuple(reference.moe_gate(plan, hidden_states, None, None))


class TensorExperts(Toy):
    @hookimpl
    def moe_experts(self, plan, hidden_states):
        return hidden_states


class TensorShared(Toy):
    @hookimpl
    def moe_shared_experts(self, hidden_states):
        return hidden_states


class ForgetfulReduce(Toy):
    @hookimpl
    def moe_reduce(self, plan, routing, experts_out):
        return reference.moe_reduce(plan, routing, experts_out, Pending(None))


class GreedyReduce(Toy):
    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        return experts_out.value.sum(1) + shared.result() + shared.result()


@torch.no_grad()
@pytest.mark.parametrize(
    ("plugin", "text"),
    [
        (NoGate, "stage gate of backend toy returned NoneType"),
        (TupleGate, "stage gate of backend toy returned tuple"),
        (TensorExperts, "stage experts of backend toy returned Tensor"),
        (TensorShared, "stage shared_experts of backend toy returned Tensor"),
        (ForgetfulReduce, "without calling shared.result"),
        (GreedyReduce, "called twice"),
    ],
)
def test_a_stage_that_breaks_its_contract_is_named(plugin: type, text: str, register, layer: MoELayer) -> None:
    register(plugin())
    with pytest.raises(StageError, match=text):
        layer(torch.randn(3, 32))


def test_registering_by_hand_refuses_what_an_entry_point_would(register) -> None:
    with pytest.raises(PluginError, match="differs from the entry point's name"):
        plugins.register(Toy(), "other")
    register(Toy())
    with pytest.raises(PluginError, match="taken"):
        plugins.register(Toy(), "toy")
    with pytest.raises(PluginError, match="not registered by hand"):
        plugins.unregister("cpu")


def test_a_plugin_registered_by_hand_is_a_candidate_until_it_is_gone(register, layer: MoELayer) -> None:
    register(Toy())
    assert explain(layer.config, "cpu").backend == "toy"
    plugins.unregister("toy")
    assert explain(layer.config, "cpu").candidate("toy") is None
