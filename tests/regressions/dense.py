"""The oracle of the regressions: one token's experts after the other in float64, without moe_core's own arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoERunner, MoEWeights
from moe_core.errors import BackendUnavailableError, GradientError
from moe_core.routing import route, router_logits_of
from moe_core.testing import random_weights, tolerance

ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
}


def gated(config: MoEConfig, projected: Tensor) -> Tensor:
    """[n, 2I] (or [n, I]) to [n, I]."""
    if config.custom_activation_function is not None:
        return config.custom_activation_function(projected)
    act = ACTIVATIONS[config.activation] if isinstance(config.activation, str) else config.activation
    if not config.gated:
        return act(projected)
    half = projected.shape[1] // 2
    gate, up = projected[:, :half], projected[:, half:]
    if config.w13_interleaved:
        gate, up = projected[:, ::2], projected[:, 1::2]
    if config.swiglu_limit is not None:
        gate = torch.minimum(gate, torch.tensor(config.swiglu_limit))
        up = torch.minimum(torch.maximum(up, torch.tensor(-config.swiglu_limit)), torch.tensor(config.swiglu_limit))
    if (config.swiglu_alpha, config.swiglu_beta) != (1.0, 0.0):
        return gate / (1 + torch.exp(-config.swiglu_alpha * gate)) * (up + config.swiglu_beta)
    return act(gate) * up


def mlp(config: MoEConfig, x: Tensor, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None) -> Tensor:
    """[n, H] to [n, H], all in float64."""
    projected = x @ w13.double().t()
    inner = gated(config, projected if b13 is None else projected + b13.double())
    out = inner @ w2.double().t()
    return out if b2 is None else out + b2.double()


def expert(config: MoEConfig, weights: MoEWeights, index: int, x: Tensor) -> Tensor:
    """Expert ``index`` on float64 rows, zero experts too."""
    if index >= config.num_experts:
        return x
    biases = (None if b is None else b[index] for b in (weights.w13_bias, weights.w2_bias))
    out = mlp(config, x, weights.w13_weight[index], weights.w2_weight[index], *biases)
    if config.post_expert_norm_eps is None:
        return out
    norm = weights.post_expert_norm_weight.double()
    first, last = (norm, 1.0) if config.post_expert_norm_scale_first else (1.0, norm)
    out = out * first
    return out / torch.sqrt((out * out).mean(-1, keepdim=True) + config.post_expert_norm_eps) * last


def routed(config: MoEConfig, weights: MoEWeights, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """The routed sum, [T, H] float64."""
    x, out = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    for place in range(topk_ids.shape[1]):
        for index in topk_ids[:, place].unique().tolist():
            rows = torch.nonzero(topk_ids[:, place] == index)[:, 0]
            w = topk_weights[rows, place].double()[:, None]
            if index >= 0 and config.apply_router_weight_on_input:
                out[rows] += expert(config, weights, index, w * x[rows])
            elif index >= 0:
                out[rows] += w * expert(config, weights, index, x[rows])
    return out * config.routed_scaling_factor if config.apply_routed_scale_to_output else out


def shared(config: MoEConfig, weights: MoEWeights, x: Tensor) -> Tensor:
    """The shared experts, [T, H] float64; zeros without them."""
    x = x.double()
    if not config.has_shared_experts:
        return torch.zeros_like(x)
    out = mlp(
        config,
        x,
        weights.shared_w13_weight,
        weights.shared_w2_weight,
        weights.shared_w13_bias,
        weights.shared_w2_bias,
    )
    if config.shared_expert_gate:
        out = out / (1 + torch.exp(-(x @ weights.shared_gate_weight.double().t())))
    return out


def layer(config: MoEConfig, weights: MoEWeights, x: Tensor, input_ids: Tensor | None = None) -> Tensor:
    """The whole layer, with the experts that moe_core's public routing function chooses."""
    routing = route(config, weights, router_logits_of(config, weights, x), hidden_states=x, input_ids=input_ids)
    out = routed(config, weights, x, *routing) + shared(config, weights, x)
    return out / (1 + config.num_shared_experts) if config.shared_expert_combination == "average" else out


def bind(backend: str, config: MoEConfig, weights: MoEWeights | None = None, **options: Any) -> MoERunner:
    """A runner on this backend; skips, with its own reason, what it does not serve."""
    weights = random_weights(config) if weights is None else weights
    needs_grad = any(tensor.requires_grad for _, tensor in weights.named_tensors())
    try:
        runner = MoERunner(config, weights, backend=backend, **options)
        if needs_grad and torch.is_grad_enabled():
            runner.bound(needs_grad=True)
        return runner
    except (BackendUnavailableError, GradientError) as error:
        refused = error.report.candidate(backend).refused
        if not refused:
            raise
        stage, (reason, _) = next(iter(refused.items()))
        pytest.skip(f"{backend} refuses {stage}: {reason}")


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Within the one table of tolerances, for a layer of this dtype."""
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    assert (found.double() - wanted).norm() <= tolerance(found.dtype, "layer") * wanted.norm()
