"""Every scheme means what docs/quantisation.md says: stored numbers against the page's formulas, one by one."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from moe_core import MoEConfig, MoERunner, MoEWeights, QuantConfig, explain
from moe_core.errors import ConfigError, SelectionError, WeightsError
from moe_core.quant import dequantise, matrices, quantise, quantised_parts
from moe_core.quant.dequantise import dequantise_matrix, tensors_of
from moe_core.quant.error import predicted_error
from moe_core.quant.packing import e2m1_codes, e2m1_values, e8m0_values, pack, unpack
from moe_core.quant.rounding import quantise_rows
from moe_core.testing import QUANT_VARIANTS, SIZES, random_weights
from moe_core.testing.harness import Oracle, error_of

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Sizes that neither the blocks, nor the groups, nor two of a byte divide.
SMALL = {"hidden_size": 37, "intermediate_size": 21, "num_experts": 2, "top_k": 1}
QUANTS = {
    "fp8_tensor": QuantConfig("fp8_tensor"),
    "fp8_channel": QuantConfig("fp8_channel"),
    "fp8_block": QuantConfig("fp8_block", block_shape=(16, 8)),
    "int8_w8a8": QuantConfig("int8_w8a8"),
    "int8_row": QuantConfig("int8_weight_only"),
    "int8_zero_32": QuantConfig("int8_weight_only", group_size=32, symmetric=False),
    "int4_32": QuantConfig("int4_weight_only", group_size=32),
    "int4_zero": QuantConfig("int4_weight_only", symmetric=False),
    "mxfp4": QuantConfig("mxfp4"),
    "nvfp4": QuantConfig("nvfp4"),
}


def config_of(name: str, **fields) -> MoEConfig:
    return MoEConfig(**{**SMALL, **fields}, quant=QUANTS[name])


def random_parts(config: MoEConfig) -> MoEWeights:
    """Any bytes that the dtypes allow, no NaN among them."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for field, part in quantised_parts(config).items():
        dtype = part.dtypes[0]
        if field.endswith("_input_scale"):
            continue
        if dtype.is_floating_point and dtype.itemsize > 1:
            tensors[field] = torch.rand(part.shape, generator=generator).add(0.1).to(dtype)
        elif dtype is torch.float8_e4m3fn:
            tensors[field] = torch.randn(part.shape, generator=generator).mul(50).to(dtype)
        else:
            low, high = (100, 150) if config.quant.scheme == "mxfp4" and field.endswith("_scale") else (0, 256)
            values = torch.randint(low, high, part.shape, generator=generator)
            tensors[field] = values.to(torch.uint8).view(dtype)
    return MoEWeights(**tensors)


def meaning(quant: QuantConfig, weights: MoEWeights, field: str, place: tuple[int, int, int], pieces: int) -> float:
    """One weight, by the page."""
    expert, row, column = place
    stored, scale = getattr(weights, field)[expert], getattr(weights, f"{field}_scale")[expert]
    rows = stored.shape[0]
    piece, within = divmod(row, rows // pieces)
    if quant.scheme in ("mxfp4", "nvfp4", "int4_weight_only"):
        byte = int(stored[row, column // 2])
        code = byte & 15 if column % 2 == 0 else byte >> 4
        number = code if quant.scheme == "int4_weight_only" else E2M1[code & 7] * (-1 if code & 8 else 1)
    else:
        number = float(stored[row, column])
    if quant.scheme == "fp8_tensor":
        return number * float(scale[piece])
    if quant.scheme in ("fp8_channel", "int8_w8a8"):
        return number * float(scale[row])
    if quant.scheme == "fp8_block":
        high, wide = quant.block_shape
        return number * float(scale[piece * math.ceil(rows / pieces / high) + within // high, column // wide])
    if quant.scheme == "mxfp4":
        return number * 2.0 ** (int(scale[row, column // 32]) - 127)
    if quant.scheme == "nvfp4":
        return number * float(scale[row, column // 16]) * float(getattr(weights, f"{field}_scale_2")[expert, piece])
    group = 0 if quant.group_size == -1 else column // quant.group_size
    if quant.symmetric:
        zero = 8 if quant.scheme == "int4_weight_only" else 0
    else:
        zero = int(getattr(weights, f"{field}_zero_point")[expert, row, group])
    return (number - zero) * float(scale[row, group])


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("fields", [{}, {"w13_interleaved": True}, {"gated": False}], ids=["packed", "mixed", "plain"])
def test_a_stored_weight_means_what_the_page_says(name: str, fields: dict) -> None:
    config = config_of(name, **fields)
    weights = random_parts(config)
    for field, matrix in matrices(config).items():
        pieces = 2 if field == "w13_weight" and not fields else 1
        values = dequantise_matrix(matrix, tensors_of(weights, matrix))
        assert values.shape == (2, matrix.rows, matrix.columns)
        places = torch.randint(0, 2**30, (60, 3), generator=torch.Generator().manual_seed(1)).tolist()
        places += [(1, matrix.rows - 1, matrix.columns - 1), (0, matrix.piece_rows, 0), (0, matrix.piece_rows - 1, 16)]
        for expert, row, column in places:
            place = (expert % 2, row % matrix.rows, column % matrix.columns)
            expected = meaning(config.quant, weights, field, place, pieces)
            assert float(values[place]) == pytest.approx(expected, rel=1e-6), (field, place)


@pytest.mark.parametrize("name", QUANTS)
def test_quantisation_rounds_to_nearest_and_keeps_what_it_can_store(name: str) -> None:
    config = config_of(name)
    plain = dataclasses.replace(config, quant=None)
    before = random_weights(plain)
    before.w13_weight[0, 3] = 0.0  # a row of zeros, and an expert of them
    before.w2_weight[1] = 0.0
    _, after = quantise(plain, before, dataclasses.replace(config.quant, dtype="float32"))
    values = dequantise(config, after, torch.float32)[1]
    assert not values.w13_weight[0, 3].any()
    assert not values.w2_weight[1].any()
    assert values.w13_weight.isfinite().all()
    again = dequantise(config, quantise(plain, values, dataclasses.replace(config.quant, dtype="float32"))[1])[1]
    # What was stored once is stored again, but for ties, and for scales that the largest code no longer reaches.
    assert error_of(again.w13_weight.float(), values.w13_weight) < 5e-3
    # Nothing is further off than half the largest step: of 448, 6, 127 or 7 codes to the largest weight of all.
    step = {"e4m3": 32 / 448, "e2m1": 2 / 4, "int8": 1 / 120, "int4": 1 / 7}[matrices(config)["w13_weight"].scheme.code]
    far = (values.w13_weight - before.w13_weight).abs().max()
    assert far <= 0.51 * step * before.w13_weight.abs().max()


@pytest.mark.parametrize("name", [n for n, f in QUANT_VARIANTS.items() if "expert_bias" not in f])
def test_the_error_of_a_layer_is_the_predicted_one(name: str) -> None:
    config = MoEConfig(**{**SIZES, **QUANT_VARIANTS[name]})
    config = dataclasses.replace(config, quant=dataclasses.replace(config.quant, dtype="float32"))
    plain_config = dataclasses.replace(config, quant=None)
    plain, weights = random_weights(plain_config), random_weights(config)
    x = torch.randn(60, config.hidden_size, generator=torch.Generator().manual_seed(3))
    oracle = Oracle(config, weights)
    routing = oracle.gate(x)
    found = error_of(oracle.layer(x, routing), Oracle(plain_config, plain).layer(x, routing))
    shared = 1.0 if config.shared_intermediate_size is None else 1.2  # routed and shared errors add up
    assert 0.7 * shared < found / predicted_error(config, plain, weights) < 1.25 * shared


def test_the_oracle_of_weight_only_schemes_is_the_dequantised_layer() -> None:
    config = MoEConfig(**{**SIZES, **QUANT_VARIANTS["mxfp4"]})
    config = dataclasses.replace(config, quant=dataclasses.replace(config.quant, dtype="float32"))
    weights = random_weights(config)
    plain_config, plain = dequantise(config, weights)
    x = torch.randn(7, config.hidden_size)
    assert plain.w13_weight_scale is None
    run = MoERunner(config, weights, backend="reference")
    assert torch.equal(run(x), MoERunner(plain_config, plain, backend="reference")(x))


def test_e2m1_rounds_ties_to_even() -> None:
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.5, 100.0, -0.75, -5.0])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -1.0, -4.0]
    assert e2m1_values(e2m1_codes(halves)).tolist() == expected
    every = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(e2m1_codes(e2m1_values(every)), every)


def test_packing_is_low_half_first_and_takes_odd_rows() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0x43, 0x05]]
    assert torch.equal(unpack(pack(codes), 5), codes)


def test_e8m0_is_a_power_of_two_or_nan() -> None:
    values = e8m0_values(torch.tensor([0, 127, 130, 255], dtype=torch.uint8))
    assert values[:3].tolist() == [2.0**-127, 1.0, 8.0]
    assert values[3].isnan()


def test_activations_round_by_row_by_piece_and_by_a_scale_of_the_file() -> None:
    x = torch.tensor([[1.0, -448.0, 0.0, 14.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = quantise_rows(x, "e4m3", 2)
    assert scales.tolist() == [[1.0, 14 / 448], [0.0, 0.0]]
    assert codes.float().tolist() == [[1.0, -448.0, 0.0, 448.0], [0.0, 0.0, 0.0, 0.0]]
    codes, scales = quantise_rows(x, "int8", 4, torch.tensor([2.0]))
    assert scales.tolist() == [[2.0], [2.0]]
    assert codes.tolist() == [[0, -127, 0, 7], [0, 0, 0, 0]]  # ties to even, beyond the largest to the largest


# What is refused, and what a refusal says.


def test_a_quantised_config_says_what_its_tensors_must_be_like() -> None:
    config = config_of("int4_zero")
    weights = random_parts(config)
    MoERunner(config, dataclasses.replace(weights, gate_weight=torch.randn(2, 37)))
    for change, text in (
        ({"w13_weight_scale": None}, r"w13_weight_scale=None: expected a tensor \(2, 42, 1\)"),
        ({"w2_weight_zero_point": None}, "w2_weight_zero_point=None"),
        ({"w13_weight": weights.w13_weight.view(torch.int8)}, "w13_weight has dtype torch.int8, expected torch.uint8"),
        ({"w2_weight": weights.w2_weight[..., :5]}, r"w2_weight has shape \(2, 37, 5\), expected \(2, 37, 11\)"),
        ({"w13_weight_scale_2": torch.ones(2, 2)}, "w13_weight_scale_2 is present"),
    ):
        with pytest.raises(WeightsError, match=text):
            MoERunner(config, dataclasses.replace(weights, **change))
    plain = dataclasses.replace(config, quant=None)
    with pytest.raises(WeightsError, match="w13_weight_scale is present"):
        MoERunner(plain, dataclasses.replace(random_weights(plain), w13_weight_scale=torch.ones(2)))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scheme": "mxfp4", "group_size": 64}, "group_size=64: expected one of -1, 32 with mxfp4"),
        ({"scheme": "fp8_channel", "group_size": 128}, "group_size=128: expected one of -1 with"),
        ({"scheme": "fp8_block", "block_shape": (128, 0)}, "block_shape"),
        ({"scheme": "mxfp4", "symmetric": False}, "symmetric=False"),
        ({"scheme": "nvfp4", "dtype": "float8"}, "dtype='float8'"),
    ],
)
def test_a_scheme_refuses_what_it_would_not_read(fields: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text.split(":")[0]):
        QuantConfig(**fields)


def test_a_scheme_of_shared_experts_needs_shared_experts() -> None:
    with pytest.raises(ConfigError, match=r"quant\.shared_scheme='mxfp4'"):
        MoEConfig(**SMALL, quant=QuantConfig("mxfp4", "mxfp4"))


def test_gradients_pass_weights_that_are_rounded_and_stop_at_activations_that_are() -> None:
    for name, gives in (("int4_32", True), ("fp8_channel", False)):
        config = config_of(name)
        config = dataclasses.replace(config, quant=dataclasses.replace(config.quant, dtype="float32"))
        weights = dataclasses.replace(random_parts(config), gate_weight=torch.randn(2, 37))
        x = torch.randn(3, 37, requires_grad=True)
        if gives:
            MoERunner(config, weights)(x).sum().backward()
            assert x.grad is not None and x.grad.any()
            continue
        with pytest.raises(SelectionError, match="has no backward"):
            MoERunner(config, weights)(x)
        with torch.no_grad():
            MoERunner(config, weights)(x)


def test_explain_knows_the_dtype_of_a_quantised_layer() -> None:
    assert explain(config_of("mxfp4"), backend="reference").dtype == "bfloat16"


def test_no_expert_held_here() -> None:
    plain = MoEConfig(**SMALL, num_local_experts=0)
    config, weights = quantise(plain, random_weights(plain), QUANTS["int4_32"])
    assert weights.w13_weight.shape == (0, 42, 19)
    assert dequantise(config, weights)[1].w13_weight.shape == (0, 42, 37)
