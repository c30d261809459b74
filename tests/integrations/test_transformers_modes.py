"""Converted blocks in other modes, shapes and dtypes than the sweep's, and under other eyes."""

import copy
import pickle

import pytest
import torch
import zoo
from test_transformers_sweep import arguments, assert_equal_results, tensors
from torch import nn

from moe_core.errors import InputError
from moe_core.integrations.transformers import convert_block, convert_model

FALLBACKS = pytest.mark.filterwarnings("ignore::moe_core.runner.FallbackWarning")


def block_of(name, **overrides):
    return zoo.build(zoo.find(name), **overrides)


# Noise on the input while training, and a router that draws lots.
RANDOM = [
    ("MixtralSparseMoeBlock", {"router_jitter_noise": 0.1}),
    ("MiniMaxM2SparseMoeBlock", {"router_jitter_noise": 0.1}),
    ("PhimoeSparseMoeBlock", {"router_jitter_noise": 0.5}),
    ("PhimoeSparseMoeBlock", {"router_jitter_noise": 0.5, "input_jitter_noise": 0.1}),
]


@pytest.mark.parametrize(("name", "overrides"), RANDOM, ids=str)
@FALLBACKS
def test_training_is_as_random_as_the_original_s(name, overrides):
    block = block_of(name, **overrides).train()
    converted = convert_block(block)
    found = []
    for module in (block, converted):
        torch.manual_seed(5)
        x = arguments(block)[0].requires_grad_()
        out = module(x * 1.0)
        out.square().sum().backward()
        found.append((out.detach(), x.grad))
    assert_equal_results(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], atol=2e-4, rtol=2e-4)
    assert not torch.equal(converted.eval()(arguments(block)[0]), found[1][0])


@pytest.mark.parametrize("name", ["SwitchTransformersSparseMLP", "NllbMoeSparseMLP"])
@FALLBACKS
def test_dropout_inside_experts_is_refused_while_training(name):
    rates = {"dropout_rate": 0.2, "moe_token_dropout": 0.2}
    converted = convert_block(block_of(name, **rates).train())
    with pytest.raises(InputError, match=r"dropout of 0.2 inside the experts while training"):
        converted(*arguments(converted))
    without = dict.fromkeys((*rates, "router_jitter_noise"), 0.0)
    block = block_of(name, **without).train()
    assert_equal_results(block(*arguments(block)), convert_block(block)(*arguments(block)))


@pytest.mark.parametrize(
    "name",
    [
        "GptOssMLP",
        "OpenAIPrivacyFilterMLP",
        "Llama4TextMoe",
        "Ernie4_5_VLMoeSparseMoeBlock",
        "DbrxFFN",
        "ZayaSparseMoeBlock",
    ],
)
def test_what_is_returned_in_bfloat16(name):
    block = block_of(name).to(torch.bfloat16)
    with torch.no_grad():
        wanted, got = (m(arguments(block)[0].bfloat16()) for m in (block, convert_block(block)))
    assert [(t.shape, t.dtype) for t in tensors(wanted)] == [(t.shape, t.dtype) for t in tensors(got)]


@torch.no_grad()
def test_autocast_brings_another_dtype():
    block = block_of("Qwen2MoeSparseMoeBlock")
    converted = convert_block(block)
    x = arguments(block)[0].bfloat16()
    wanted = converted(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = converted(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted.bfloat16())
    with pytest.raises(InputError, match="dtype"):
        converted(x)


@pytest.mark.parametrize("name", ["DeepseekV3MoE", "AriaTextMoELayer", "MuseSparkMoE", "InklingMoE", "GptOssMLP"])
def test_inference_mode_copies_pickles_and_empty_devices(name):
    block = block_of(name)
    x = arguments(block)
    with torch.no_grad():
        wanted = block(*x)
    converted = convert_block(block)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    with torch.inference_mode():
        assert_equal_results(wanted, converted(*x))
        assert_equal_results(wanted, convert_block(copy.deepcopy(block))(*x))
    with torch.no_grad():
        assert_equal_results(wanted, pickle.loads(pickle.dumps(converted))(*x))
        empty = convert_block(copy.deepcopy(block).to("meta"))
        empty.load_state_dict(state, assign=True)
        assert_equal_results(wanted, empty(*x))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("PhimoeSparseMoeBlock", {"num_experts_per_tok": 4}),  # its router takes two all the same
        ("DeepseekV3MoE", {"n_shared_experts": 0}),  # an MLP of no width
        ("Cohere2MoeSparseMoeBlock", {"num_shared_experts": 0}),
        ("MixtralSparseMoeBlock", {"num_experts_per_tok": 8}),
        ("Qwen2MoeSparseMoeBlock", {"hidden_act": "relu6"}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_settings_at_the_edge(name, overrides, no_transformers_experts):
    block = block_of(name, **overrides)
    wanted = block(*arguments(block))
    converted = convert_block(block)
    with no_transformers_experts():
        assert_equal_results(wanted, converted(*arguments(block)))
    assert converted.state_dict().keys() == block.state_dict().keys()
    converted.load_state_dict(block.state_dict())


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("Step3p7SparseMoeBlock", {"swiglu_limits": [0.3, 0.3], "swiglu_limits_shared": [0.2, 0.2]}),
        ("HYV4MoE", {}),
        ("Llama4TextMoe", {"num_experts_per_tok": 3}),
        ("NemotronHMoE", {"mlp_bias": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_shared_experts_of_another_kind_are_moe_core_s_too(name, overrides, monkeypatch):
    block = block_of(name, **overrides)
    wanted = block(*arguments(block))
    converted = convert_block(block)
    mlp = getattr(block, "shared_expert", None) or block.shared_experts
    monkeypatch.setattr(type(mlp), "forward", None)
    assert_equal_results(wanted, converted(*arguments(block)))
    assert converted.state_dict().keys() == block.state_dict().keys()


@torch.no_grad()
def test_dbrx_takes_rows_for_batches():
    block = block_of("DbrxFFN")
    x = arguments(block)[0].flatten(0, 1)
    assert block(x).shape == (10, 1, zoo.H)
    assert_equal_results(block(x), convert_block(block)(x))


@pytest.mark.parametrize("types", [None, [0] * 10, [1] * 10, [0, 1] * 5], ids=str)
@torch.no_grad()
def test_ernie_s_two_blocks_in_one(types, no_transformers_experts):
    block = block_of("Ernie4_5_VLMoeMoeBlock")
    x = arguments(block)[0]
    seen = None if types is None else torch.tensor(types, dtype=torch.int32).view(2, 5)
    wanted = block(x, seen)
    converted = convert_block(block)
    with no_transformers_experts():
        assert_equal_results(wanted, converted(x, seen))
    assert converted.state_dict().keys() == block.state_dict().keys()


@pytest.mark.parametrize(
    "name", ["MixtralSparseMoeBlock", "AfmoeSparseMoeBlock", "DeepseekV4SparseMoeBlock", "HYV3MoE", "JetMoeMoE"]
)
@torch.no_grad()
def test_the_router_runs_only_where_somebody_watches(name):
    block = block_of(name)
    adapter_router = "router" if hasattr(block, "router") else "gate"
    router, seen = getattr(block, adapter_router), []
    wanted = []
    hook = router.register_forward_hook(lambda module, args, output: wanted.append(output))
    block(*arguments(block))
    hook.remove()
    converted = convert_block(block)
    unwatched = converted(*arguments(block))
    hook = getattr(converted, adapter_router).register_forward_hook(lambda module, args, output: seen.append(output))
    assert_equal_results(converted(*arguments(block)), unwatched)
    hook.remove()
    converted(*arguments(block))
    assert len(seen) == 1
    assert_equal_results(wanted[0], seen[0])


def test_a_block_that_a_model_holds_twice():
    block = block_of("MixtralSparseMoeBlock")
    model = nn.ModuleDict({"first": nn.Sequential(block), "second": nn.Sequential(nn.Identity(), block)})
    assert convert_model(model) == ["first.0", "second.1"]
    assert model["first"][0] is model["second"][1]
