"""Shared experts beside routed ones: what they read, when they run, and what is scaled."""

from __future__ import annotations

from types import SimpleNamespace

import dense
import pytest
import torch
from torch import Tensor

from moe_core import BackendInfo, ExpertsOut, MoEConfig, MoERunner, Verdict, hookimpl, plugins, reference
from moe_core.routing import route, router_logits_of
from moe_core.testing import SHARED_VARIANTS, SIZES, random_weights

ORDERS = ["overlap", "before", "after", "internal"]
SHARED = {"shared_intermediate_size": 40, "shared_expert_gate": True}


def config_of(**fields: object) -> MoEConfig:
    return MoEConfig(**{**SIZES, **fields})


@hookimpl
def writes_into_its_input(plan, hidden_states, routing) -> ExpertsOut:
    out = reference.moe_experts(plan, hidden_states, routing)
    hidden_states.fill_(93.0)
    return out


@pytest.fixture
def writer() -> str:
    """A backend whose experts leave their input in ruins, as they declare."""
    plugin = SimpleNamespace(
        moe_backend_info=hookimpl(
            lambda: BackendInfo(name="writer", stages=("gate", "shared_experts", "experts", "reduce"))
        ),
        moe_probe=hookimpl(lambda: Verdict.yes()),
        moe_supports=hookimpl(lambda stage: Verdict.yes(mutates_input=stage == "experts")),
        moe_gate=reference.moe_gate,
        moe_shared_experts=reference.moe_shared_experts,
        moe_experts=writes_into_its_input,
        moe_reduce=reference.moe_reduce,
    )
    plugins.register(plugin, "writer")
    yield "writer"
    plugins.unregister("writer")


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_regression_01_shared_experts_read_the_input_that_in_place_experts_write(
    writer: str, order: str, inplace: bool
) -> None:
    """The routed kernel overwrote hidden_states while, or before, the shared experts read it."""
    config = config_of(**SHARED, shared_experts_order=order)
    weights, x = random_weights(config), torch.randn(9, 32)
    given = x.clone()
    out = MoERunner(config, weights, backend=writer, inplace=inplace)(given)
    dense.assert_near(out, dense.layer(config, weights, x))
    assert inplace or torch.equal(given, x)


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_regression_01_on_every_backend(backend: str, order: str, inplace: bool) -> None:
    """Whatever a backend does inside, a caller that did not ask for it keeps its input."""
    config = config_of(**SHARED, shared_experts_order=order)
    weights, x = random_weights(config), torch.randn(9, 32)
    given = x.clone()
    out = dense.bind(backend, config, weights, inplace=inplace)(given)
    dense.assert_near(out, dense.layer(config, weights, x))
    assert inplace or torch.equal(given, x)
    assert out.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()


class Order:
    """An observer that notes the stages as they begin and end."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def _note(self, stage: str):
        self.seen.append(stage)
        result = yield
        self.seen.append(f"/{stage}")
        return result

    @hookimpl(wrapper=True)
    def moe_gate(self):
        return (yield from self._note("gate"))

    @hookimpl(wrapper=True)
    def moe_shared_experts(self):
        return (yield from self._note("shared"))

    @hookimpl(wrapper=True)
    def moe_experts(self):
        return (yield from self._note("experts"))

    @hookimpl(wrapper=True)
    def moe_reduce(self):
        return (yield from self._note("reduce"))


@pytest.fixture
def stages() -> list[str]:
    observer = Order()
    plugins.register(observer, "order")
    yield observer.seen
    plugins.unregister("order")


@torch.no_grad()
def test_regression_03_the_gate_runs_behind_the_fork_and_the_join_behind_the_experts(
    backend: str, stages: list[str]
) -> None:
    """Gate and shared experts were moved before the fork: nothing overlapped, 6 to 8 % slower decoding."""
    x, outputs = torch.randn(9, 32), []
    routed = ["gate", "/gate", "experts", "/experts", "reduce"]
    for order in ORDERS:
        config = config_of(**SHARED, shared_experts_order=order)
        outputs.append(dense.bind(backend, config, random_weights(config))(x))
        if order == "after":
            assert stages == [*routed, "shared", "/shared", "/reduce"]
        else:
            assert stages == ["shared", "/shared", *routed, "/reduce"]
        stages.clear()
    assert all(torch.equal(outputs[0], other) for other in outputs)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_regression_06_shared_experts_see_rows_before_transform_and_chunking(
    backend: str, order: str, chunk: int | None
) -> None:
    """Shared experts were given dispatched, chunked or latent rows, and added to the wrong tokens."""
    config = config_of(**SHARED, moe_latent_size=16, shared_experts_order=order, max_chunk_tokens=chunk)
    weights, x = random_weights(config), torch.randn(11, 32)
    into, out_of = torch.randn(32, 16) / 6, torch.randn(16, 32) / 4
    seen: list[Tensor] = []

    def shared(rows: Tensor) -> Tensor:
        seen.append(rows.clone())
        return rows * 2

    runner = dense.bind(
        backend,
        config,
        weights,
        routed_input_transform=lambda rows: rows @ into,
        routed_output_transform=lambda rows: rows @ out_of,
        shared_experts=shared,
    )
    found = runner(x)
    assert torch.equal(torch.cat(seen), x)
    routing = route(config, weights, router_logits_of(config, weights, x))
    latent = dense.routed(config, weights, x @ into, *routing)
    dense.assert_near(found, latent @ out_of.double() + 2 * x.double())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("to_output", [False, True])
@pytest.mark.parametrize("combination", ["sum", "average"])
def test_regression_19_the_routed_scale_is_applied_once_and_to_the_routed_part_only(
    backend: str, combination: str, to_output: bool, dtype: torch.dtype
) -> None:
    """The factor was applied twice, never, or to the shared output too; in float16 it overflowed."""
    fields = {**SHARED, "shared_expert_combination": combination, "renormalize": True}
    config = config_of(**fields, routed_scaling_factor=2.5, apply_routed_scale_to_output=to_output)
    weights, x = random_weights(config, dtype=dtype), torch.randn(9, 32).to(dtype)
    found = dense.bind(backend, config, weights)(x)
    plain = config_of(**fields)
    routing = route(plain, weights, router_logits_of(plain, weights, x))
    wanted = 2.5 * dense.routed(plain, weights, x, *routing) + dense.shared(plain, weights, x)
    dense.assert_near(found, wanted / (2 if combination == "average" else 1))


@torch.no_grad()
@pytest.mark.parametrize("name", SHARED_VARIANTS)
def test_shared_variants_equal_the_oracle(backend: str, name: str) -> None:
    """Gate, bias, average and the scale on the output, in every combination that the table has."""
    config = config_of(**SHARED_VARIANTS[name])
    weights, x = random_weights(config), torch.randn(9, 32)
    dense.assert_near(dense.bind(backend, config, weights)(x), dense.layer(config, weights, x))
