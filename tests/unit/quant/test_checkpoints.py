"""Published formats of quantised experts, written here by hand as their documents describe them, load bit by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, QuantConfig
from moe_core.checkpoints import load_weights
from moe_core.errors import CheckpointError
from moe_core.quant import quantise
from moe_core.testing import random_weights

H, I, E = 64, 32, 3
BASE = MoEConfig(H, I, E, 2, shared_intermediate_size=64)
PREFIX = "model.layers.3.mlp"
Tensors = dict[str, Tensor]


def halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up."""
    return tensor.chunk(2, dim=0)


def each(weights: MoEWeights, write: Callable[[str, Tensor, dict[str, Tensor]], Tensors]) -> Tensors:
    """One linear layer a matrix of an expert: name, weight, what goes with it."""
    out: Tensors = {"gate.weight": weights.gate_weight}
    suffixes = ("_scale", "_zero_point", "_scale_2")
    for e in range(E):
        for i, name in enumerate(("gate_proj", "up_proj")):
            parts = {
                s: halves(getattr(weights, f"w13_weight{s}")[e])[i]
                for s in suffixes
                if getattr(weights, f"w13_weight{s}") is not None
            }
            out |= write(f"experts.{e}.{name}", halves(weights.w13_weight[e])[i], parts)
        parts = {
            s: getattr(weights, f"w2_weight{s}")[e] for s in suffixes if getattr(weights, f"w2_weight{s}") is not None
        }
        out |= write(f"experts.{e}.down_proj", weights.w2_weight[e], parts)
    for i, name in enumerate(("gate_proj", "up_proj")):
        out[f"shared_experts.{name}.weight"] = halves(weights.shared_w13_weight)[i]
    out["shared_experts.down_proj.weight"] = weights.shared_w2_weight
    return out


def in_words(codes: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """[..., n] to int32 [..., n * bits / 32], the first lowest, or as order says."""
    count = 32 // bits
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // count, dtype=torch.int64)
    for i in range(count):
        column = i if order is None else order[i]
        words |= codes[..., column::count].long() << (bits * i)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def codes4(packed: Tensor) -> Tensor:
    return torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2)


def deepseek(stem: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensors:
    return {f"{stem}.weight": weight, f"{stem}.weight_scale_inv": parts["_scale"]}


def channels(stem: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensors:
    return {f"{stem}.weight": weight, f"{stem}.weight_scale": parts["_scale"][:, None]}


def tensorwise(stem: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensors:
    fixed = torch.tensor(0.5 if "gate" in stem else 0.75)
    return {f"{stem}.weight": weight, f"{stem}.weight_scale": parts["_scale"][0], f"{stem}.input_scale": fixed}


def compressed(bits: int) -> Callable[[str, Tensor, dict[str, Tensor]], Tensors]:
    def write(stem: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensors:
        codes = codes4(weight) if bits == 4 else weight.long() + 128 if weight.dtype is torch.int8 else weight
        out = {f"{stem}.weight_packed": in_words(codes, bits), f"{stem}.weight_scale": parts["_scale"]}
        out[f"{stem}.weight_shape"] = torch.tensor(codes.shape)
        if "_zero_point" in parts:
            out[f"{stem}.weight_zero_point"] = in_words(parts["_zero_point"].t(), bits).t()
        return out

    return write


def gptq(stem: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensors:
    codes, scale = codes4(weight), parts["_scale"]
    zero = parts.get("_zero_point", torch.full(scale.shape, 8, dtype=torch.uint8))
    return {
        f"{stem}.qweight": in_words(codes, 4).t(),
        f"{stem}.qzeros": in_words(((zero.int() - 1) % 16).t(), 4),
        f"{stem}.scales": scale.t(),
        f"{stem}.g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // 32,
    }


def awq(stem: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensors:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        f"{stem}.qweight": in_words(codes4(weight).t(), 4, order),
        f"{stem}.qzeros": in_words(parts["_zero_point"].t(), 4, order),
        f"{stem}.scales": parts["_scale"].t(),
    }


def modelopt(stem: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensors:
    return {
        f"{stem}.weight": weight,
        f"{stem}.weight_scale": parts["_scale"],
        f"{stem}.weight_scale_2": parts["_scale_2"][0],
        f"{stem}.input_scale": torch.tensor(0.1),
    }


GROUPS = {"group_size": 32, "dtype": "float16"}
FORMATS = {
    "deepseek": (QuantConfig("fp8_block", block_shape=(16, 16)), deepseek),
    "fp8 channels": (QuantConfig("fp8_channel"), channels),
    "fp8 tensors": (QuantConfig("fp8_tensor"), tensorwise),
    "int8 channels": (QuantConfig("int8_w8a8"), channels),
    "compressed int4": (QuantConfig("int4_weight_only", **GROUPS), compressed(4)),
    "compressed int4, zero points": (QuantConfig("int4_weight_only", symmetric=False, **GROUPS), compressed(4)),
    "compressed int8": (QuantConfig("int8_weight_only", **GROUPS), compressed(8)),
    "compressed int8, zero points": (QuantConfig("int8_weight_only", symmetric=False, **GROUPS), compressed(8)),
    "gptq": (QuantConfig("int4_weight_only", **GROUPS), gptq),
    "gptq, zero points": (QuantConfig("int4_weight_only", symmetric=False, **GROUPS), gptq),
    "awq": (QuantConfig("int4_weight_only", symmetric=False, **GROUPS), awq),
    "modelopt nvfp4": (QuantConfig("nvfp4"), modelopt),
}


def made(quant: QuantConfig, base: MoEConfig = BASE) -> tuple[MoEConfig, MoEWeights]:
    return quantise(base, random_weights(base), quant)


def save(tensors: Tensors, path: Path) -> Path:
    save_file({f"{PREFIX}.{name}": tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def assert_same(found: MoEWeights, wanted: MoEWeights) -> None:
    assert {name for name, _ in found.named_tensors()} >= {name for name, _ in wanted.named_tensors()}
    for name, tensor in wanted.named_tensors():
        other = getattr(found, name)
        assert other.dtype == tensor.dtype and other.shape == tensor.shape, name
        assert torch.equal(other.float(), tensor.float()), name


@pytest.mark.parametrize("name", FORMATS)
def test_a_published_format_loads_bit_by_bit(name: str, tmp_path: Path) -> None:
    quant, write = FORMATS[name]
    config, weights = made(quant)
    path = save(each(weights, write), tmp_path / "model.safetensors")
    found = load_weights(path, PREFIX, config)
    assert_same(found, weights)
    if name == "fp8 tensors":
        assert found.w13_input_scale.tolist() == [0.75]  # the largest of all experts
    two = load_weights(path, PREFIX, dataclasses.replace(config, num_local_experts=2), experts=[2, 0])
    assert torch.equal(two.w2_weight[0].float(), weights.w2_weight[2].float())


def test_stacked_formats_and_shared_experts(tmp_path: Path) -> None:
    config, weights = made(QuantConfig("fp8_block", "fp8_block", block_shape=(16, 16)))
    tensors = {"gate.weight": weights.gate_weight, "experts.gate_up_proj": weights.w13_weight}
    tensors |= {"experts.gate_up_proj_scale_inv": weights.w13_weight_scale, "experts.down_proj": weights.w2_weight}
    tensors["experts.down_proj_scale_inv"] = weights.w2_weight_scale
    for i, name in enumerate(("gate_proj", "up_proj")):
        tensors |= deepseek(
            f"shared_experts.{name}",
            halves(weights.shared_w13_weight)[i],
            {"_scale": halves(weights.shared_w13_weight_scale)[i]},
        )
    tensors |= deepseek(
        "shared_experts.down_proj", weights.shared_w2_weight, {"_scale": weights.shared_w2_weight_scale}
    )
    assert_same(load_weights(save(tensors, tmp_path / "m.safetensors"), PREFIX, config, interleaved=False), weights)


def test_gpt_oss_blocks(tmp_path: Path) -> None:
    base = MoEConfig(H, I, E, 2, w13_interleaved=True, expert_bias=True)
    config, weights = made(QuantConfig("mxfp4"), base)
    tensors = {
        "router.weight": weights.gate_weight,
        "experts.gate_up_proj_blocks": weights.w13_weight.view(E, 2 * I, H // 32, 16),
        "experts.gate_up_proj_scales": weights.w13_weight_scale,
        "experts.gate_up_proj_bias": weights.w13_bias,
        "experts.down_proj_blocks": weights.w2_weight.view(E, H, I // 32, 16),
        "experts.down_proj_scales": weights.w2_weight_scale,
        "experts.down_proj_bias": weights.w2_bias,
    }
    path = save(tensors, tmp_path / "m.safetensors")
    assert_same(load_weights(path, PREFIX, config), weights)
    packed = dataclasses.replace(config, w13_interleaved=False)
    found = load_weights(path, PREFIX, packed, interleaved=True)
    assert torch.equal(found.w13_weight[:, :I], weights.w13_weight[:, 0::2])
    assert torch.equal(found.w13_weight_scale[:, I:], weights.w13_weight_scale[:, 1::2])


@pytest.mark.parametrize(
    ("name", "quant", "spoil", "text"),
    [
        (
            "deepseek",
            None,
            lambda t: t.pop("experts.1.up_proj.weight_scale_inv"),
            "experts.1.up_proj.weight is not quantised",
        ),
        ("deepseek", QuantConfig("int8_w8a8"), lambda t: None, "expected torch.int8 with scheme int8_w8a8"),
        (
            "deepseek",
            QuantConfig("fp8_block", block_shape=(8, 8)),
            lambda t: None,
            "mend the group size or block shape",
        ),
        (
            "deepseek",
            QuantConfig("fp8_block", "fp8_block", block_shape=(16, 16)),
            lambda t: None,
            "shared_experts.gate_proj.weight is not quantised",
        ),
        ("gptq, zero points", QuantConfig("int4_weight_only", **GROUPS), lambda t: None, "pass symmetric=False"),
        ("gptq", None, lambda t: t["experts.0.up_proj.g_idx"].copy_(t["experts.0.up_proj.g_idx"].flip(0)), "g_idx"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(
    name: str, quant: QuantConfig | None, spoil: Callable[[Tensors], object], text: str, tmp_path: Path
) -> None:
    made_for, write = FORMATS[name]
    config, weights = made(made_for)
    tensors = each(weights, write)
    spoil(tensors)
    path = save(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=text):
        load_weights(path, PREFIX, dataclasses.replace(config, quant=quant or made_for))


def test_blocks_that_another_order_of_rows_would_cut_are_refused(tmp_path: Path) -> None:
    config, weights = made(QuantConfig("fp8_block", block_shape=(16, 16)))
    path = save(each(weights, deepseek), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="blocks of 16 rows would be cut"):
        load_weights(path, PREFIX, dataclasses.replace(config, w13_interleaved=True))
