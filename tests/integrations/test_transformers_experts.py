"""Routed experts on their own: through register(), and in the place of an experts module."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from test_transformers_sweep import assert_equal_results
from torch import nn
from transformers import Qwen2MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from moe_core.integrations.transformers import convert_block, register

GENERATOR = torch.Generator()


def chosen(tokens, count, k):
    """[T, K] distinct ids and weights."""
    GENERATOR.manual_seed(1)
    ids = torch.stack([torch.randperm(count, generator=GENERATOR)[:k] for _ in range(tokens)])
    return ids, torch.rand(tokens, k, generator=GENERATOR)


def rows(tokens, width=zoo.H):
    return torch.randn(tokens, width, generator=GENERATOR.manual_seed(2))


def experts_of(name, implementation="eager"):
    experts = zoo.build(zoo.find(name))
    experts.config._experts_implementation = implementation
    return experts


@torch.no_grad()
def test_k_changes_from_call_to_call():
    register()
    experts = experts_of("MixtralExperts")
    alone = convert_block(experts)
    for tokens, k in ((7, 2), (5, 1), (3, zoo.E), (7, 2)):
        x, (ids, weights) = rows(tokens), chosen(tokens, zoo.E, k)
        experts.config._experts_implementation = "eager"
        wanted = experts(x, ids, weights)
        experts.config._experts_implementation = "moe_core"
        for got in (experts(x, ids, weights), alone(x, ids.int(), weights)):
            assert_equal_results(wanted, got)


@torch.no_grad()
def test_the_id_behind_the_last_is_nobody():
    """What transformers' expert parallelism writes where another rank serves."""
    experts = experts_of("MixtralExperts")
    x, (ids, weights) = rows(9), chosen(9, zoo.E, 3)
    away = torch.rand(9, 3, generator=GENERATOR) < 0.4
    ids, weights = ids.masked_fill(away, zoo.E), weights.masked_fill(away, 0.0)
    assert_equal_results(experts(x, ids, weights), convert_block(experts)(x, ids, weights))


@torch.no_grad()
def test_no_tokens_and_repeated_ids():
    experts = experts_of("MixtralExperts")
    alone = convert_block(experts)
    nothing = alone(rows(0), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert nothing.shape == (0, zoo.H)
    x, (ids, weights) = rows(4), chosen(4, zoo.E, 1)
    ids, weights = ids.expand(-1, zoo.E + 2), weights.expand(-1, zoo.E + 2)
    assert_equal_results(experts(x, ids, weights), alone(x, ids, weights))


@torch.no_grad()
def test_arguments_by_their_names():
    x, (ids, weights) = rows(5), chosen(5, zoo.E, 2)
    for name, names in (
        ("GptOssExperts", ("router_indices", "routing_weights")),
        ("MixtralExperts", ("top_k_index", "top_k_weights")),
    ):
        experts = experts_of(name)
        named = dict(zip(names, (ids, weights), strict=True))
        wanted = experts(hidden_states=x, **named)
        assert_equal_results(wanted, convert_block(experts)(hidden_states=x, **named))
        assert_equal_results(wanted, ALL_EXPERTS_FUNCTIONS["moe_core"](experts, x, ids, weights))


CALLS = {
    "DbrxExperts": lambda: (rows(6).view(2, 3, -1), *chosen(6, zoo.E, 2)),
    "Llama4TextExperts": lambda: (rows(5 * zoo.E),),
    "LongcatFlashExperts": lambda: (rows(6), *chosen(6, zoo.E + 2, 3)),
    "Step3p7Experts": lambda: (rows(6), *chosen(6, zoo.E, 2)),
    "NllbMoeExperts": lambda: (
        rows(6),
        F.one_hot(chosen(6, zoo.E, 1)[0][:, 0], zoo.E),
        torch.rand(6, zoo.E, generator=GENERATOR),
    ),
    "SwitchTransformersExperts": lambda: (
        rows(6),
        F.one_hot(chosen(6, zoo.E, 1)[0], zoo.E) * torch.tensor([1, 1, 0, 1, 1, 0]).view(-1, 1, 1),
        torch.rand(6, 1, generator=GENERATOR),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_experts_that_transformers_calls_in_another_way(name, no_transformers_experts):
    experts = zoo.build(zoo.find(name))
    arguments = CALLS[name]()
    wanted = experts(*arguments)
    alone = convert_block(experts)
    with no_transformers_experts():
        assert_equal_results(wanted, alone(*arguments))
    assert alone.state_dict().keys() == experts.state_dict().keys()


@use_experts_implementation
class GatedByItself(nn.Module):
    """A class that transformers doesn't have, decorated as its own are, with a gating of its own."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2 * zoo.I, zoo.H, generator=GENERATOR) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(4, zoo.H, zoo.I, generator=GENERATOR) * 0.2)
        self.num_experts, self.sharpness = 4, 1.3

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.tanh(self.sharpness * gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for e, weight in zip(ids, weights, strict=True):
                inner = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[e]))
                out[token] += F.linear(inner, self.down_proj[e]) * weight
        return out


@torch.no_grad()
def test_a_class_of_somebody_else_gates_with_its_own_function():
    register()
    config = Qwen2MoeConfig()
    config._experts_implementation = "eager"
    experts = GatedByItself(config)
    x, (ids, weights) = rows(6), chosen(6, 4, 2)
    wanted = experts(x, ids, weights)
    config._experts_implementation = "moe_core"
    assert_equal_results(wanted, experts(x, ids, weights))
    assert_equal_results(wanted, convert_block(experts)(x, ids, weights))


def test_what_register_remembers_follows_the_parameters():
    register()
    experts = experts_of("MixtralExperts", "moe_core")
    x, (ids, weights) = rows(6), chosen(6, zoo.E, 2)
    with torch.no_grad():
        before = experts(x, ids, weights)
        experts.down_proj.mul_(2)
        torch.testing.assert_close(experts(x, ids, weights), 2 * before)
        experts.down_proj = nn.Parameter(experts.down_proj * 2)
        torch.testing.assert_close(experts(x, ids, weights), 4 * before)
        assert experts.to(torch.bfloat16)(x.bfloat16(), ids, weights.bfloat16()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::moe_core.runner.FallbackWarning")
def test_gradients_reach_the_experts_and_the_router_s_weights():
    register()
    experts = experts_of("MixtralExperts")
    ids, weights = chosen(6, zoo.E, 2)
    grads = []
    for implementation in ("eager", "moe_core"):
        experts.config._experts_implementation = implementation
        x, w = rows(6).requires_grad_(), weights.clone().requires_grad_()
        experts.zero_grad()
        experts(x, ids, w).square().sum().backward()
        grads.append([x.grad, w.grad, experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()])
    for wanted, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)
