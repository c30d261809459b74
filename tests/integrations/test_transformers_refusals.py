"""Whatever is not recognised raises ConversionError and names what it was; the model is left as it was."""

import models
import pytest
import torch
import zoo
from torch import nn
from torch.nn.utils import parametrize

from moe_core.errors import ConversionError
from moe_core.integrations.transformers import convert_block, convert_model


def block_of(name, **overrides):
    return zoo.build(zoo.find(name), **overrides)


class StrangeMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.dispatcher = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (StrangeMoE(), r"StrangeMoE is not recognised as an MoE block \(its submodules: dispatcher\)"),
        (nn.Linear(4, 4), "Linear is not recognised"),
        (nn.ModuleList(), "ModuleList is not recognised"),
        (None, "block is a NoneType, expected an nn.Module"),
        (torch.ones(2), "block is a Tensor, expected an nn.Module"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_is_no_block(module, message):
    with pytest.raises(ConversionError, match=message):
        convert_block(module)


@pytest.mark.parametrize(
    ("module", "part", "message"),
    [
        ("jetmoe", "JetMoeMoA", r"JetMoeMoA is not recognised.*input_linear, output_linear, router"),
        ("jetmoe", "JetMoeParallelExperts", "JetMoeParallelExperts is not recognised: it lacks is_transposed"),
        ("inkling", "InklingSharedExperts", "InklingSharedExperts is not recognised: it lacks is_transposed"),
        ("gemma4", "Gemma4TextDecoderLayer", "not recognised as an MoE block, but holds experts: convert_model"),
        ("diffusion_gemma", "DiffusionGemmaEncoderTextLayer", "holds experts: convert_model"),
        ("qwen2_moe", "Qwen2MoeDecoderLayer", "holds mlp: convert_model"),
        ("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeTopKRouter is not recognised"),
    ],
)
def test_parts_of_transformers_that_are_no_block(module, part, message):
    model = models.build(f"transformers.models.{module}.modeling_{module}")
    found = next(m for m in model.modules() if type(m).__name__ == part)
    with pytest.raises(ConversionError, match=message):
        convert_block(found)


def test_models_with_nothing_to_replace():
    for model in (nn.Sequential(nn.Linear(4, 4)), None):
        with pytest.raises(ConversionError, match="Sequential holds no MoE block|model is a NoneType"):
            convert_model(model)
    with pytest.raises(ConversionError, match="is an MoE block itself; pass it to convert_block"):
        convert_model(block_of("MixtralSparseMoeBlock"))


def test_experts_with_another_name_for_a_known_layout():
    experts = block_of("GptOssMLP").experts
    experts.__class__ = type("Mxfp4GptOssExperts", (nn.Module,), {})  # as quantisers replace them
    del experts.has_gate
    with pytest.raises(ConversionError, match="Mxfp4GptOssExperts is not recognised: it lacks has_gate"):
        convert_block(experts)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Subclass(torch.Tensor):
    """As sharded and quantised tensors are."""


def _without(block):
    del block.gate.e_score_correction_bias


def _quantised(block):
    block.experts.down_proj = nn.Parameter(block.experts.down_proj.detach().to(torch.int8), requires_grad=False)


def _parametrised(block):
    parametrize.register_parametrization(block.gate, "weight", Halved())


def _wrapped(block):
    block.experts.gate_up_proj = nn.Parameter(block.experts.gate_up_proj.detach().as_subclass(Subclass))


def _other_router(block):
    block.gate = nn.Linear(zoo.H, zoo.E)


def _other_width(block):
    block.shared_experts.down_proj = nn.Linear(16, zoo.H, bias=False)


def _groups(block):
    block.gate.topk_group, block.gate.top_k = 1, 4


def _doubles(block):
    block.double()


def _prelu(block):
    block.experts.act_fn = nn.PReLU()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "DeepseekV3MoE has no parameter or buffer 'gate.e_score_correction_bias'"),
        (_quantised, "moe_core refuses: w2_weight has dtype torch.int8"),
        (_parametrised, "has no parameter or buffer 'gate.weight'.*parametrised"),
        (_wrapped, "experts.gate_up_proj is a Subclass, expected a plain tensor"),
        (_other_router, "DeepseekV3MoE has a known name and is not what it names: AttributeError: 'Linear' object"),
        (_other_width, "DeepseekV3MoE describes a layer that moe_core refuses: shared_w13_weight has shape"),
        (_groups, "DeepseekV3MoE describes a layer that moe_core refuses.*topk_group"),
        (_doubles, "dtype torch.float64"),
        (_prelu, "activation PReLU has parameters of its own"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_a_changed_block_says_what_changed(change, message):
    block = block_of("DeepseekV3MoE")
    change(block)
    with pytest.raises(ConversionError, match=message):
        convert_block(block)


@pytest.mark.parametrize("found", [*zoo.block_classes(), zoo.find("GptOssExperts")], ids=str)
def test_no_other_error_leaks_out(found):
    """Each attribute and each part is spoilt in turn: a conversion succeeds, or raises ConversionError."""
    block = zoo.build(found)
    for part in block.modules():
        attributes = {name: part.__dict__ for name in vars(part) if not name.startswith("_")}
        for parts in (part._parameters, part._buffers, part._modules):
            attributes |= dict.fromkeys(parts, parts)
        for name, held in attributes.items():
            kept = held[name]
            for spoilt in (None, "text", -3) if held is part.__dict__ else (None,):
                held[name] = spoilt
                try:
                    convert_block(block)
                except ConversionError:
                    pass
                finally:
                    held[name] = kept


def test_a_model_is_changed_whole_or_not_at_all():
    model = models.build("transformers.models.qwen2_moe.modeling_qwen2_moe")
    kinds = [type(m) for m in model.modules()]
    del model.model.layers[1].mlp.experts.down_proj
    with pytest.raises(ConversionError, match="Qwen2MoeExperts: expected 3-D parameters gate_up_proj and down_proj"):
        convert_model(model)
    assert [type(m) for m in model.modules()] == kinds
