"""convert_block, convert_model and register() beyond equal outputs: memory, names, gradients, refusals, variants."""

import copy

import pytest
import torch
import zoo
from test_transformers_sweep import TOLERANCE, arguments, assert_equal_results
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_core.integrations.transformers import convert_block, convert_model, register


def block_of(name, **overrides):
    return zoo.build(zoo.find(name), **overrides)


def tiny_model(**overrides):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        **overrides,
    )
    return Qwen2MoeForCausalLM(config).eval()


VARIANTS = [
    ("DeepseekV3MoE", {"n_group": 1, "topk_group": 1}),
    ("DeepseekV3MoE", {"norm_topk_prob": False}),
    ("DeepseekV2Moe", {"topk_method": "group_limited_greedy"}),
    ("DeepseekV2Moe", {"topk_method": "greedy"}),
    ("AXK2MoE", {"n_group": None, "topk_group": None}),
    ("Qwen2MoeSparseMoeBlock", {"norm_topk_prob": False}),
    ("Qwen2MoeSparseMoeBlock", {"hidden_act": "gelu"}),
    ("MixtralSparseMoeBlock", {"hidden_act": "gelu_pytorch_tanh"}),
    ("MixtralSparseMoeBlock", {"hidden_act": "quick_gelu"}),
    ("Cohere2MoeSparseMoeBlock", {"expert_selection_fn": "softmax"}),
    ("Cohere2MoeSparseMoeBlock", {"expert_selection_fn": "sigmoid"}),
    ("Cohere2MoeSparseMoeBlock", {"shared_expert_combination_strategy": "sum"}),
    ("Cohere2MoeSparseMoeBlock", {"shared_expert_combination_strategy": "average"}),
    ("DeepseekV4SparseMoeBlock", {"mlp_layer_types": ["hash_moe", "hash_moe"]}),
    ("DeepseekV4SparseMoeBlock", {"mlp_layer_types": ["moe", "moe"]}),
    ("Ernie4_5_MoeSparseMoeBlock", {"moe_num_shared_experts": 0}),
    ("Ernie4_5_MoeSparseMoeBlock", {"use_bias": True}),
    ("Lfm2MoeSparseMoeBlock", {"use_expert_bias": False}),
    ("Lfm2MoeSparseMoeBlock", {"use_expert_bias": True}),
    ("Llama4TextMoe", {"num_experts_per_tok": 1}),
    ("Llama4TextMoe", {"num_experts_per_tok": 3}),
    ("LongcatFlashMoE", {"zero_expert_num": 0}),
    ("LongcatFlashMoE", {"zero_expert_num": 4}),
    ("NemotronHMoE", {"moe_latent_size": None}),
    ("NemotronHMoE", {"moe_latent_size": 16}),
    ("Step3p7SparseMoeBlock", {"swiglu_limits": [0.3, 0.3], "swiglu_limits_shared": [0.2, 0.2]}),
    ("Step3p7SparseMoeBlock", {"swiglu_limits": [0.3, 0.3], "swiglu_limits_shared": [0.3, 0.3]}),
    ("Step3p7SparseMoeBlock", {"swiglu_limits": None, "swiglu_limits_shared": None}),
    ("DeepseekV3MoE", {"num_experts_per_tok": 4}),
]


@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v))
def test_settings_of_an_architecture(name, overrides, no_transformers_experts):
    block = block_of(name, **overrides)
    with torch.no_grad():
        wanted = block(*(a.clone() for a in arguments(block)))
        converted = convert_block(block)
        with no_transformers_experts():
            assert_equal_results(wanted, converted(*arguments(block)))


@pytest.mark.parametrize("p", [1, 2, None])
def test_dbrx_divides_by_a_p_norm(p):
    block = block_of("DbrxFFN")
    block.moe_normalize_expert_weights = p
    with torch.no_grad():
        assert_equal_results(block(*arguments(block)), convert_block(block)(*arguments(block)))


@pytest.mark.parametrize("name", ["Qwen2MoeSparseMoeBlock", "MixtralSparseMoeBlock", "GptOssMLP", "LongcatFlashMoE"])
def test_expert_weights_are_not_copied(name):
    block = block_of(name)
    held = {p.untyped_storage().data_ptr() for p in convert_block(block).parameters()}
    experts = {p.untyped_storage().data_ptr() for p in block.experts.parameters()}
    assert experts <= held


@pytest.mark.parametrize(
    "name",
    ["Qwen2MoeSparseMoeBlock", "GptOssMLP", "DeepseekV3MoE", "MuseSparkMoE", "DbrxFFN", "NemotronHMoE", "JetMoeMoE"],
)
@pytest.mark.filterwarnings("ignore::moe_core.runner.FallbackWarning")
def test_gradients_equal_the_eager_blocks(name):
    block = block_of(name)
    converted = convert_block(copy.deepcopy(block))
    losses = []
    for module in (block, converted):
        for _ in range(2):  # twice: views and packed weights must not be used up by the first
            out = module(*arguments(block))
            loss = (out[0] if isinstance(out, tuple) else out).square().sum()
            module.zero_grad()
            loss.backward()
        losses.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad and p.grad is not None})
    wanted = losses[0]
    got = dict(converted.named_parameters())
    from moe_core.integrations.transformers.slots import save_names

    grads = {n: p.grad for n, p in got.items() if p.grad is not None}
    save_names(converted.slots, grads, "")
    assert wanted.keys() <= grads.keys()
    for n, gradient in wanted.items():
        torch.testing.assert_close(grads[n], gradient, atol=2e-4, rtol=2e-4, msg=lambda m, n=n: f"{n}: {m}")


def test_an_optimizer_step_is_seen():
    block = convert_block(block_of("MuseSparkMoE"))
    x = arguments(block)[0]
    with torch.no_grad():
        before = block(x)
        block.experts.post_expert_norm.weight.add_(0.5 * torch.arange(16))
        assert not torch.equal(block(x), before)


def test_dtype_and_copies():
    block = convert_block(block_of("DeepseekV3MoE"))
    x = arguments(block)[0]
    with torch.no_grad():
        wanted = block(x)
        twin = copy.deepcopy(block)
        assert torch.equal(twin(x), wanted)
        half = block.to(torch.bfloat16)
        assert half.gate.e_score_correction_bias.dtype == torch.float32
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(twin(x), wanted)


def test_convert_model_replaces_every_block_and_keeps_the_outputs(no_transformers_experts):
    model = tiny_model()
    ids = torch.arange(40).reshape(2, 20) % 64
    names = set(model.state_dict())
    with torch.no_grad():
        wanted = model(ids).logits
        replaced = convert_model(model)
        with no_transformers_experts():
            got = model(ids).logits
    assert replaced == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert set(model.state_dict()) == names
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)
    assert model.get_submodule(replaced[0]).report.backend in ("cpu", "reference")


def test_register_gives_the_figures_of_convert_model(no_transformers_experts):
    register()
    register()
    ids = torch.arange(40).reshape(2, 20) % 64
    ours = tiny_model()
    convert_model(ours)
    theirs = tiny_model()
    theirs.set_experts_implementation("moe_core")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=TOLERANCE, rtol=0)


def test_saved_and_loaded_by_transformers(tmp_path):
    model = tiny_model()
    ids = torch.arange(20)[None] % 64
    convert_model(model)
    with torch.no_grad():
        wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = Qwen2MoeForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, atol=TOLERANCE, rtol=0)
