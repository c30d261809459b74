"""moe-core bench: shapes, the arithmetic of the floor, the spread, and what is drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_core import MoERunner
from moe_core.bench.draw import Draw, digest, expected_output, make_draws, make_weights
from moe_core.bench.floor import Work, floor, mean_floor, work
from moe_core.bench.settings import Candidate, Settings
from moe_core.bench.shapes import SHAPES, Shape, parse_shape
from moe_core.bench.timing import summary
from moe_core.errors import BenchError, ConfigError
from moe_core.routing import route
from moe_core.testing.tolerances import tolerance

CPU = torch.device("cpu")
TINY = Shape("tiny", 32, 16, 8, 2, 24, {"renormalize": True})
GROUPED = dataclasses.replace(SHAPES["deepseek-v3"], hidden_size=64, intermediate_size=16, num_experts=32)


def test_a_shape_by_name_and_by_numbers() -> None:
    assert parse_shape("qwen3-30b-a3b") is SHAPES["qwen3-30b-a3b"]
    shape = parse_shape("64x32x8x2+48")
    assert (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k) == (64, 32, 8, 2)
    assert shape.config("layer").shared_intermediate_size == 48 and shape.config("experts").has_shared_experts is False
    assert Shape.from_dict(shape.as_dict()) == shape
    gated = SHAPES["qwen1.5-moe-a2.7b"]
    assert gated.config("layer").shared_expert_gate and not gated.config("experts").shared_expert_gate


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_every_named_shape_makes_a_layer(shape: Shape) -> None:
    assert shape.config("layer").hidden_size == shape.hidden_size
    assert shape.expert_weight_bytes(2) == 6 * shape.num_experts * shape.hidden_size * shape.intermediate_size


def test_a_shape_that_is_none_is_refused() -> None:
    with pytest.raises(BenchError, match=r"'large': expected one of small, .* HxIxExK"):
        parse_shape("large")
    with pytest.raises(ConfigError, match="top_k=9"):
        parse_shape("64x32x8x9")


def test_work_is_counted_as_by_hand() -> None:
    # 3 tokens, 5 experts hit, 4-byte values: weights 5 * 3 * 32 * 16, input and output 2 * 3 * 32.
    assert work(TINY, "experts", 3, 5, 4) == Work((5 * 3 * 32 * 16 + 2 * 3 * 32) * 4, 6 * 3 * 2 * 32 * 16)
    layer = work(TINY, "layer", 3, 5, 4)
    assert layer.bytes == (5 * 3 * 32 * 16 + 2 * 3 * 32 + 8 * 32 + 3 * 32 * 24) * 4
    assert layer.flops == 6 * 3 * 2 * 32 * 16 + 2 * 3 * 32 * 8 + 6 * 3 * 32 * 24
    gated = work(dataclasses.replace(TINY, routing={"shared_expert_gate": True}), "layer", 3, 5, 4)
    assert (gated.bytes - layer.bytes, gated.flops - layer.flops) == (32 * 4, 2 * 3 * 32)


def test_the_floor_is_the_larger_of_both_times() -> None:
    assert dataclasses.astuple(floor(Work(1000, 10), 100.0, 100.0)) == (10.0, "memory")
    assert dataclasses.astuple(floor(Work(10, 1000), 100.0, 50.0)) == (20.0, "compute")
    mean = mean_floor([Work(1000, 0), Work(3000, 0), Work(0, 3500)], 100.0, 100.0)
    assert mean.seconds == pytest.approx(25.0) and mean.bound == "memory"


def test_the_floor_of_one_decoded_token_is_the_experts_it_hits() -> None:
    shape = SHAPES["qwen3-30b-a3b"]
    task = work(shape, "experts", 1, 8, 2)
    assert task.bytes == 75_497_472 + 2 * 2048 * 2  # 8 of 128 experts in bfloat16, one row in, one row out


def test_the_spread_is_p10_to_p90() -> None:
    found = summary([float(value) for value in range(11)])
    assert found == {"median": 5.0, "p10": 1.0, "p90": 9.0, "min": 0.0, "n": 11}
    assert summary([2.0])["n"] == 1


@pytest.mark.parametrize("shape", [TINY, GROUPED], ids=["softmax", "grouped sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_leave_no_choice_of_experts_to_rounding(shape: Shape, dtype: torch.dtype) -> None:
    weights = make_weights(shape, dtype, CPU, seed=1)
    for draw in make_draws(shape, weights, 9, 2, seed=1):
        # As a peer would do it: the product in the dtype, rounded.
        rounded = (draw.hidden_states @ weights.gate_weight.T).float()
        ids = route(shape.config("layer"), weights, rounded).topk_ids.long()
        assert torch.equal(ids.sort(dim=1).values, draw.topk_ids.sort(dim=1).values)
        assert draw.experts_hit == len(set(draw.topk_ids.flatten().tolist()))


def test_equal_seeds_draw_equal_routing() -> None:
    weights = make_weights(TINY, torch.float32, CPU, seed=1)
    first, again, other = (digest(make_draws(TINY, weights, 4, 2, seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_no_two_experts_have_the_same_weights() -> None:
    weights = make_weights(TINY, torch.float32, CPU, seed=0)
    for tensor in (weights.w13_weight, weights.w2_weight):
        assert len({tuple(expert.flatten().tolist()) for expert in tensor}) == TINY.num_experts


@pytest.mark.parametrize("stage", ["experts", "layer"])
def test_the_expected_output_is_the_layers(stage: str) -> None:
    weights = make_weights(TINY, torch.float32, CPU, seed=0)
    draw: Draw = make_draws(TINY, weights, 6, 1, seed=0)[0]
    expected = expected_output(TINY, stage, weights, draw)
    layer = MoERunner(TINY.config("layer"), weights, backend="reference")(draw.hidden_states)
    assert (torch.norm(expected - layer) / layer.norm() < tolerance(torch.float32, "layer")) == (stage == "layer")
    assert expected.dtype == torch.float32 and expected.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ()}, "tokens is empty"),
        ({"tokens": (0,)}, "tokens: 0: expected at least 1"),
        ({"dtypes": ("int8",)}, "'int8': expected one of float32"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"workers": {"main": "python"}}, "that is the name of this interpreter"),
        ({"candidates": (Candidate.parse("zen:loop"),)}, "no worker 'zen'; add --worker zen=PYTHON"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        Settings(**{"shapes": (TINY,), "tokens": (1,), **change})
