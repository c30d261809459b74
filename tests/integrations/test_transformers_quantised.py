"""Files as transformers' own quantisers write them, on a CPU: they load, and mean what transformers says they mean."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from moe_core import MoEConfig, QuantConfig
from moe_core.checkpoints import load_weights
from moe_core.quant import dequantise
from moe_core.testing import random_weights

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
H, I, E = 64, 32, 3
PREFIX = "model.layers.0.mlp"


def test_fine_grained_fp8_written_by_transformers(tmp_path: Path) -> None:
    """`Fp8Quantize` writes the tensors of every expert, `Fp8Dequantize` says what they are."""
    settings = SimpleNamespace(weight_block_size=[16, 16], scale_fmt="float")
    quantiser = SimpleNamespace(quantization_config=settings)
    plain = random_weights(MoEConfig(H, I, E, 2))
    tensors, meant = {f"{PREFIX}.gate.weight": plain.gate_weight}, {}
    for e in range(E):
        gate, up = plain.w13_weight[e].chunk(2)
        for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", plain.w2_weight[e])):
            key = f"{PREFIX}.experts.{e}.{name}.weight"
            written = fp8.Fp8Quantize(quantiser).convert({key: value.contiguous()})
            tensors |= written
            meant[e, name] = fp8.Fp8Dequantize(quantiser)._dequantize_one(*written.values(), torch.float32)
    assert any(name.endswith("weight_scale_inv") for name in tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = MoEConfig(H, I, E, 2, quant=QuantConfig("fp8_block", block_shape=(16, 16)))
    _, found = dequantise(config, load_weights(tmp_path, PREFIX, config), torch.float32)
    for e in range(E):
        assert torch.equal(found.w13_weight[e], torch.cat([meant[e, "gate_proj"], meant[e, "up_proj"]]))
        assert torch.equal(found.w2_weight[e], meant[e, "down_proj"])


def test_mxfp4_blocks_mean_what_transformers_says(tmp_path: Path) -> None:
    """Its quantiser needs a GPU kernel; its dequantiser does not, and gives [E, in, out]."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{PREFIX}.router.weight": torch.randn(E, H),
        f"{PREFIX}.experts.gate_up_proj_blocks": torch.randint(0, 256, (E, 2 * I, H // 32, 16), generator=generator),
        f"{PREFIX}.experts.gate_up_proj_scales": torch.randint(100, 140, (E, 2 * I, H // 32), generator=generator),
        f"{PREFIX}.experts.gate_up_proj_bias": torch.randn(E, 2 * I),
        f"{PREFIX}.experts.down_proj_blocks": torch.randint(0, 256, (E, H, I // 32, 16), generator=generator),
        f"{PREFIX}.experts.down_proj_scales": torch.randint(100, 140, (E, H, I // 32), generator=generator),
        f"{PREFIX}.experts.down_proj_bias": torch.randn(E, H),
    }
    tensors = {name: t if t.is_floating_point() else t.to(torch.uint8) for name, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = MoEConfig(H, I, E, 2, w13_interleaved=True, expert_bias=True, quant=QuantConfig("mxfp4"))
    _, found = dequantise(config, load_weights(tmp_path, PREFIX, config), torch.float32)
    for field, name in (("w13_weight", "gate_up_proj"), ("w2_weight", "down_proj")):
        blocks, scales = (tensors[f"{PREFIX}.experts.{name}_{part}"] for part in ("blocks", "scales"))
        meant = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(getattr(found, field), meant.transpose(1, 2))
