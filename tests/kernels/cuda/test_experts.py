"""The routed experts' three forms against the reference, wherever Triton runs: on a GPU, or in its interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import ExpertsOut, MoEConfig, MoEWeights, Pending, Routing, reference
from moe_core.platform import Platform
from moe_core.testing.cases import EXPERT_VARIANTS, random_weights
from moe_core.testing.tolerances import tolerance
from moe_core.types import Plan

pytest.importorskip("triton")
from moe_cuda import experts, layout, reduce
from moe_cuda.tuning import BUCKETS, Choices, Dot, Few, Grouped, Pairs, Tile

# Small enough for the interpreter; sizes of layers below divide by none, by some or by all of these blocks.
FORMS = {
    "few": Few(16, 32, 4, 16, 16, 4),
    "few, fetched early": Few(8, 64, 4, 32, 32, 4, prefetch=3),
    "pairs": Pairs(Dot(32, 32, 4, 2), Dot(32, 32, 4, 2)),
    "pairs, columns first": Pairs(Dot(16, 64, 4, 1, True), Dot(64, 16, 4, 1, True)),
    "grouped": Grouped(16, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    "grouped, persistent": Grouped(32, Tile(32, 32, 4, 2, 1, 4, True), Tile(32, 32, 4, 2, 1, 4, True, True)),
    "grouped, gathered": Grouped(32, Tile(32, 32, 4, 2, half=True, gather=True), Tile(32, 32, 4, 2)),
    "grouped, pointers": Grouped(16, Tile(32, 16, 4, 2, tma=False), Tile(16, 16, 4, 2, tma=False)),
}
WHOLE = {
    "few": Few(32, 64, 4, 64, 32, 4),
    "pairs": Pairs(Dot(32, 64, 4, 1), Dot(64, 32, 4, 1)),
    "grouped": Grouped(16, Tile(32, 64, 4, 1), Tile(64, 32, 4, 1)),
}
"""One block a row: programs are what the interpreter's time goes into."""
LAYERS: dict[str, dict[str, Any]] = {
    "zero_experts": {"zero_expert_num": 2, "zero_expert_type": "identity"},
    "output_scaled": {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
    **EXPERT_VARIANTS,
}


class Case:
    """One layer on the device of the tests, and the reference's answer on the CPU."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], fields: dict[str, Any]
    ) -> None:
        hidden, inner, count, k = sizes
        k = fields.get("top_k", k)
        self.config = MoEConfig(hidden, inner, count, k, **{n: v for n, v in fields.items() if n != "top_k"})
        weights = random_weights(self.config, dtype=dtype, seed=1)
        moved = MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})
        self.device, self.dtype = device, dtype
        platform = Platform.detect(device, dtype)
        if not layout.supports(self.config, "experts", platform):
            pytest.skip(layout.supports(self.config, "experts", platform).reason)
        self.plan = Plan(self.config, layout.prepare(self.config, moved, platform), device, dtype)
        plain = MoEWeights(**{name: tensor.float() for name, tensor in weights.named_tensors()})
        self.oracle = Plan(self.config, plain, torch.device("cpu"), torch.float32)

    def draw(self, tokens: int) -> tuple[Tensor, Routing]:
        """Hidden states in the layer's dtype, and a routing with ids of every kind."""
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, self.config.expert_hidden_size, generator=generator).to(self.dtype)
        outputs, k = self.config.num_router_outputs, self.config.top_k
        ids = torch.rand(tokens, outputs, generator=generator).argsort(1)[:, :k].to(torch.int32)
        ids[torch.rand(tokens, k, generator=generator) < 0.1] = -1
        weights = torch.rand(tokens, k, generator=generator).masked_fill(ids < 0, float("inf"))
        return x, Routing(weights, ids)

    def expected(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, H] float32."""
        found = reference.moe_experts(self.oracle, x.float(), routing)
        return reference.moe_reduce(self.oracle, routing, found, Pending(None))

    def run(self, choice: Any, x: Tensor, routing: Routing) -> Tensor:
        """[T, H] on the CPU, from memory that held NaN."""
        out = torch.full(x.shape, float("nan"), dtype=self.dtype, device=self.device)
        moved = Routing(*(tensor.to(self.device) for tensor in routing))
        experts.run(self.plan, choice, x.to(self.device), moved, out)
        return out.cpu()

    def check(self, choice: Any, tokens: int) -> None:
        """Within the table of tolerances."""
        self.check_given(choice, *self.draw(tokens))

    def check_given(self, choice: Any, x: Tensor, routing: Routing) -> Tensor:
        """[T, H]: the result, within the table of tolerances."""
        found, expected = self.run(choice, x, routing), self.expected(x, routing)
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        assert error <= tolerance(self.dtype, "experts"), f"{error:.1e}"
        return found


@pytest.mark.parametrize("fields", LAYERS)
@pytest.mark.parametrize("form", WHOLE)
def test_every_layer_in_every_form(form: str, fields: str, device: torch.device) -> None:
    Case(device, torch.float32, (48, 32, 6, 2), dict(LAYERS[fields])).check(WHOLE[form], 5)


@pytest.mark.parametrize("sizes", [(40, 24, 3, 1), (72, 50, 9, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_at_any_size(form: str, sizes: tuple[int, ...], device: torch.device) -> None:
    """Sizes that no block divides, experts without a token, experts with more rows than a tile."""
    Case(device, torch.float16, sizes, {}).check(FORMS[form], 11)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form: str, device: torch.device) -> None:
    Case(device, torch.bfloat16, (64, 32, 5, 2), {}).check(FORMS[form], 7)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_again_and_alone(form: str, device: torch.device) -> None:
    """Run to run, and for a row whatever stands beside it."""
    case = Case(device, torch.float32, (64, 32, 4, 2), {})
    x, routing = case.draw(6)
    first = case.run(FORMS[form], x, routing)
    assert torch.equal(first, case.run(FORMS[form], x, routing))
    alone = case.run(FORMS[form], x[2:3], Routing(*(tensor[2:3] for tensor in routing)))
    assert torch.equal(first[2:3], alone)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_experts_is_zero_whatever_it_holds(form: str, device: torch.device) -> None:
    case = Case(device, torch.float32, (64, 32, 4, 2), {})
    x, routing = case.draw(4)
    x[1], x[2] = float("nan"), float("inf")
    routing.topk_ids[1:3] = -1
    found = case.run(FORMS[form], x, routing)
    assert not found[1:3].any() and torch.isfinite(found).all()


LEFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"expert_bias": True},
    "output_scaled": LAYERS["output_scaled"],
    "shared": {"shared_intermediate_size": 24, "shared_expert_gate": True},
    "on_input": {"apply_router_weight_on_input": True, "top_k": 1},
    "zero_experts": LAYERS["zero_experts"],
}


@pytest.mark.parametrize("fields", LEFT)
def test_the_sum_that_is_left_to_the_reduction(fields: str, device: torch.device) -> None:
    """Row by row in any parts, nobody's rows being undefined; where zero experts have no row, the sum is not left."""
    case = Case(device, torch.float32, (48, 32, 6, 2), dict(LEFT[fields]))
    x, routing = case.draw(12)
    moved = Routing(*(tensor.to(device) for tensor in routing))
    grouped = dataclasses.replace(case.plan.weights, choices=Choices((WHOLE["grouped"],) * BUCKETS, ""))
    plan = dataclasses.replace(case.plan, weights=grouped, leave_sum=True)
    value, reduced = experts.experts(plan, x.to(device), moved)
    assert reduced == bool(case.config.zero_expert_num)
    if not reduced:
        value.masked_fill_(moved.topk_ids[..., None] < 0, float("nan"))
    sums = []
    for part in (slice(0, 5), slice(5, 5), slice(5, None)):
        out = ExpertsOut(value[part], reduced)
        sums.append(reduce.reduce(plan, Routing(*(tensor[part] for tensor in moved)), out, Pending(None)))
    found, expected = torch.cat(sums).cpu(), case.expected(x, routing)
    assert float((found - expected).norm() / expected.norm()) <= tolerance(torch.float32, "experts")


def test_no_row_and_few_rows_are_summed_all_the_same(device: torch.device) -> None:
    case = Case(device, torch.float32, (48, 32, 6, 2), {})
    plan = dataclasses.replace(case.plan, leave_sum=True)
    for tokens in (0, 1):
        x, routing = case.draw(tokens)
        value, reduced = experts.experts(plan, x.to(device), Routing(*(tensor.to(device) for tensor in routing)))
        assert reduced and value.shape == (tokens, 48)


@pytest.mark.parametrize("one_expert", [True, False])
def test_more_rows_than_a_share_of_the_experts_suggests(one_expert: bool, device: torch.device) -> None:
    """A rank with 2 of 8 experts gets all rows, or none: its programs are made for a quarter of the worst case."""
    case = Case(device, torch.float32, (48, 32, 8, 2), {"num_local_experts": 2})
    x, weights = torch.randn(40, 48), torch.rand(40, 2)
    ids = torch.tensor([1 if one_expert else -1, -1], dtype=torch.int32).repeat(40, 1)
    routing = Routing(weights, ids)
    form = Grouped(16, Tile(32, 64, 4, 1), Tile(64, 32, 4, 1))
    found, expected = case.run(form, x, routing), case.expected(x, routing)
    assert float((found - expected).norm()) <= tolerance(torch.float32, "experts") * float(expected.norm())
    assert bool(expected.any()) is one_expert


LOADER = Grouped(128, Tile(128, 64, 8, 3, 1, 4, True, loader=True), Tile(256, 64, 8, 3, 1, 4, True, loader=True))


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [name for name, of in LAYERS.items() if of.get("gated", True)])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (192, 128), (192, 64)])
@pytest.mark.parametrize(("tokens", "gather"), [(9, False), (700, False), (700, True)])
def test_loader_kernels(fields: str, tokens: int, gather: bool, rows: int, columns: int, device: torch.device) -> None:
    """A warpgroup that only loads: tiles of few rows, of some and of all, column blocks beyond the last column."""
    case = Case(device, torch.bfloat16, (320, 192, 7, 3), dict(LAYERS[fields]))
    if not case.plan.weights.loader:
        pytest.skip("these kernels are for compute capability 9.0")
    if rows == 192 and not layout.loads_both(case.plan.weights.first, case.plan.weights.second):
        pytest.skip("tiles of 192 rows are for layers whose products both have these kernels")
    first = dataclasses.replace(LOADER.first, n=columns, gather=gather)
    form = Grouped(rows, first, dataclasses.replace(LOADER.second, n=2 * columns, early=not gather))
    case.check(form, tokens)
    x, routing = case.draw(tokens)
    assert torch.equal(case.run(form, x, routing), case.run(form, x, routing))


TURNED = Grouped(256, Tile(64, 64, 8, 4, 1, 2, loader=True), Tile(128, 64, 8, 4, 1, 2, loader=True), turned=True)


def turned(rows: int, option: str = "") -> Grouped:
    stages = {128: 6, 256: 4}[rows]
    first = dataclasses.replace(TURNED.first, stages=stages, gather=option == "gather")
    second = dataclasses.replace(TURNED.second, stages=stages, early=option == "early")
    return dataclasses.replace(TURNED, rows=rows, first=first, second=second)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [name for name, of in LAYERS.items() if of.get("gated", True)])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize(("tokens", "option"), [(9, "early"), (700, "early"), (700, "gather")])
def test_turned_kernels(fields: str, tokens: int, option: str, rows: int, device: torch.device) -> None:
    """Weights times tokens: blocks of columns beyond the last one, few rows and several tiles an expert."""
    case = Case(device, torch.bfloat16, (320, 192, 7, 3), dict(LAYERS[fields]))
    if not case.plan.weights.loader or not layout.loads_both(case.plan.weights.first, case.plan.weights.second):
        pytest.skip("for layers whose products both have these kernels, on compute capability 9.0")
    form = turned(rows, option)
    case.check(form, tokens)
    x, routing = case.draw(tokens)
    assert torch.equal(case.run(form, x, routing), case.run(form, x, routing))


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["", "early", "gather"])
@pytest.mark.parametrize("rows", [128, 256])
def test_turned_kernels_at_every_height(rows: int, option: str, device: torch.device) -> None:
    """Experts of so many rows that every width of an instruction is met, and its borders."""
    case = Case(device, torch.bfloat16, (320, 192, 24, 1), {})
    if not case.plan.weights.loader:
        pytest.skip("these kernels are for compute capability 9.0")
    counts = [1, 63, 64, 65, 95, 96, 97, 128, 129, 144, 145, 160, 161, 192, 193, 256, 257, 272, 273, 288, 289, 320, 544]
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].to(torch.int32)[:, None]
    x = torch.randn(len(ids), 320, generator=torch.Generator().manual_seed(1)).bfloat16()
    routing = Routing(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)), ids)
    found, expected = case.run(turned(rows, option), x, routing).double(), case.expected(x, routing).double()
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) <= 2 * tolerance(case.dtype, "experts")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "form",
    [
        turned(128, "early"),
        turned(256, "early"),
        dataclasses.replace(LOADER, second=dataclasses.replace(LOADER.second, early=True)),
        dataclasses.replace(LOADER, rows=192, second=dataclasses.replace(LOADER.second, early=True)),
    ],
    ids=["turned 128", "turned 256", "128", "192"],
)
def test_the_second_product_waits_for_what_it_reads(form: Grouped, device: torch.device) -> None:
    """It begins before the first has ended, when memory still holds what another input left."""
    case = Case(device, torch.bfloat16, (1024, 512, 16, 4), {})
    if not case.plan.weights.loader:
        pytest.skip("these kernels are for compute capability 9.0")
    x, routing = case.draw(3000)
    inputs = [(x, routing), (-2 * x, Routing(routing.topk_weights.flip(0), routing.topk_ids.flip(0)))]
    first = [case.check_given(form, *given) for given in inputs]
    for _ in range(30):
        for given, wanted in zip(inputs, first, strict=True):
            assert torch.equal(case.run(form, *given), wanted)
