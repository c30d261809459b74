"""Plugins of another age: fewer arguments still work, and every way to write a plugin is served alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from moe_core import (
    BackendInfo,
    ExpertsOut,
    MoELayer,
    Pending,
    Routing,
    Verdict,
    backends,
    explain,
    hookimpl,
    plugins,
    reference,
)
from moe_core.binding import NAMED
from moe_core.errors import BackendUnavailableError, BindError, PluginError, RoutingError, StageError
from moe_core.plugins import STAGE_HOOKS, spec_arguments
from moe_core.types import HOOK_API

from .conftest import Distribute, healthy

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


@pytest.mark.parametrize("major", [HOOK_API - 1, HOOK_API + 1])
def test_another_major_is_refused_with_the_versions_that_would_do(
    major: int, distribute: Distribute, layer: MoELayer
) -> None:
    distribute("other", healthy("other", hook_api=major, priority=90))
    (status,) = [status for status in backends() if status.name == "other"]
    assert status.status == "incompatible"
    assert status.reason == f"written for hook API {major}, this moe_core has {HOOK_API}"
    assert f"a version of other-dist for hook API {HOOK_API}" in status.remedy
    assert f"a moe-core that has {major}" in status.remedy
    assert explain(layer.config, "cpu").backend != "other"
    with pytest.raises(BackendUnavailableError, match=f"written for hook API {major}"):
        explain(layer.config, "cpu", backend="other")


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


class WideGate(Toy):
    @hookimpl
    def moe_gate(self, plan, hidden_states):
        weights, ids = reference.moe_gate(plan, hidden_states, None, None)
        return Routing(weights, ids.long())


class NarrowExperts(Toy):
    """[T, 1, H]: einsum would broadcast it."""

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing):
        return ExpertsOut(reference.moe_experts(plan, hidden_states, routing).value[:, :1], False)


class OneRowShared(Toy):
    """[1, H]: a sum would broadcast it."""

    @hookimpl
    def moe_shared_experts(self, plan, hidden_states):
        return Pending(reference.moe_shared_experts(plan, hidden_states).result()[:1])


class LateOneRowShared(Toy):
    @hookimpl
    def moe_shared_experts(self, plan, hidden_states):
        return Pending(lambda: reference.moe_shared_experts(plan, hidden_states).result()[:1])


class NoShared(Toy):
    @hookimpl
    def moe_shared_experts(self, plan):
        return Pending(None)


class WrongDtypeReduce(Toy):
    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        return reference.moe_reduce(plan, routing, experts_out, shared).double()


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
        (WideGate, "stage gate of backend toy returned .*int64, expected .*int32"),
        (NarrowExperts, r"stage experts of backend toy returned \[3, 1, 32\].*expected \[3, 2, 32\]"),
        (OneRowShared, r"stage shared_experts of backend toy returned a Pending of \[1, 32\].*\[3, 32\]"),
        (LateOneRowShared, r"stage shared_experts of backend toy returned a Pending of \[1, 32\].*\[3, 32\]"),
        (NoShared, "stage shared_experts of backend toy returned a Pending of NoneType"),
        (WrongDtypeReduce, "stage reduce of backend toy returned .*float64, expected .*float32"),
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


class Odd(BaseException): ...


@torch.no_grad()
@pytest.mark.parametrize("stage", ["gate", "shared_experts", "experts", "reduce"])
@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, Odd])
def test_whatever_a_stage_raises_names_it(stage: str, error: type, register, layer: MoELayer) -> None:
    register(failing(stage, error("out of luck")))
    with pytest.raises(
        StageError, match=f"stage {stage} of backend toy failed: {error.__name__}: out of luck"
    ) as caught:
        layer(torch.randn(3, 32))
    assert isinstance(caught.value.__cause__, error)


@torch.no_grad()
@pytest.mark.parametrize("error", [RoutingError("row 3"), torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_errors_that_callers_handle_by_type_stay_what_they_are(error: BaseException, register, layer: MoELayer) -> None:
    register(failing("experts", error))
    with pytest.raises(type(error)) as caught:
        layer(torch.randn(3, 32))
    assert caught.value is error


def failing(stage: str, error: BaseException) -> Toy:
    def fail(self, plan):
        raise error

    return type("Failing", (Toy,), {f"moe_{stage}": hookimpl(fail)})()


@torch.no_grad()
@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_a_failing_prepare_is_a_bind_error(error: type, register, layer: MoELayer) -> None:
    def fail(self, weights):
        raise error("out of luck")

    register(type("Failing", (Toy,), {"moe_prepare": hookimpl(fail)})())
    with pytest.raises(BindError, match=f"backend toy failed to prepare its weights: {error.__name__}"):
        layer.report  # noqa: B018


@pytest.mark.parametrize("hook", NAMED)
def test_an_observed_stage_has_the_arguments_of_its_specification(hook: str) -> None:
    names = spec_arguments(hook)
    function = NAMED[hook](lambda *arguments: arguments)
    assert function.__code__.co_varnames[: function.__code__.co_argcount] == names
    assert function(*names) == names


def test_every_stage_can_be_observed() -> None:
    assert set(NAMED) == set(STAGE_HOOKS.values())


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
