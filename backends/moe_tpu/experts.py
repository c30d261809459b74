"""Routed experts on XLA: one static graph a token count, whatever the routing."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core import ExpertsOut, MoEConfig, MoEWeights, Routing
from moe_core.activations import apply_activation
from moe_core.reference import expert_norm
from moe_core.types import Plan

from .buckets import bucket_of, pad_rows
from .spec import is_named


def experts(plan: Plan, hidden_states: Tensor, routing: Routing) -> ExpertsOut:
    """[T, H] float32, weighted and summed."""
    plain, ops = plan.weights.plain, plan.weights.ops
    spec = plan.weights.spec(hidden_states.shape[0])
    if spec.form == "dense":
        return ExpertsOut(dense(plan.config, plain, hidden_states, routing), True)
    if not is_named(plan.config):
        return ExpertsOut(in_pieces(plan, hidden_states, routing), True)
    tokens = hidden_states.shape[0]
    rows = bucket_of(tokens)
    plan.weights.seen.add(rows)
    # Between the stages' own shapes and the kernels' lies a bounded set, so that few are traced and lowered.
    out = ops.routed(
        pad_rows(hidden_states, rows),
        pad_rows(routing.topk_weights, rows),
        pad_rows(routing.topk_ids, rows, -1),
        plan.weights.gate,
        plan.weights.up,
        plan.weights.down,
        plain.w13_bias,
        plain.w2_bias,
        plain.post_expert_norm_weight,
        spec.dumps(),
    )
    return ExpertsOut(out if rows == tokens else out[:tokens], True)


def in_pieces(plan: Plan, hidden_states: Tensor, routing: Routing) -> Tensor:
    """The same with an activation that works on torch tensors: only the products are jax functions."""
    config, plain, ops = plan.config, plan.weights.plain, plan.weights.ops
    (tokens, k), held = routing.topk_ids.shape, config.num_held_experts
    x, weights = _weigh_input(config, hidden_states, routing)
    flat = routing.topk_ids.reshape(-1)
    is_held = (flat >= 0) & (flat < held)
    owner = torch.where(is_held, flat, held)
    order = torch.argsort(owner, stable=True)
    sizes = (owner[:, None] == torch.arange(held, device=flat.device)[None, :]).sum(0).to(torch.int32)
    at = owner[order].clamp(max=held - 1).long()

    rows = x[order // k]
    projected = [ops.grouped_linear(rows, w, sizes) for w in (plan.weights.gate, plan.weights.up) if w is not None]
    inner = projected[0] if len(projected) == 1 else _packed(config, *projected)
    inner = inner.float() if plain.w13_bias is None else inner.float() + plain.w13_bias.float()[at]
    inner = apply_activation(config, inner).to(x.dtype)
    out = ops.grouped_linear(inner, plan.weights.down, sizes).float()
    out = expert_norm(config, plain, out if plain.w2_bias is None else out + plain.w2_bias.float()[at])
    slots = torch.where(is_held[:, None], out[torch.argsort(order)], 0.0).view(tokens, k, -1)
    return _weighted_sum(config, slots, x, weights, routing)


def _packed(config: MoEConfig, gate: Tensor, up: Tensor) -> Tensor:
    """[N, 2I] in the order in which the rows of ``w13_weight`` lie."""
    if config.w13_interleaved:
        return torch.stack([gate, up], dim=-1).flatten(-2)
    return torch.cat([gate, up], dim=-1)


def dense(config: MoEConfig, plain: MoEWeights, hidden_states: Tensor, routing: Routing) -> Tensor:
    """Every expert on every row: E / K times the work, and the only form that needs nothing but torch."""
    held = config.num_held_experts
    x, weights = _weigh_input(config, hidden_states, routing)
    projected = torch.einsum("th,enh->etn", x, plain.w13_weight).float()
    if plain.w13_bias is not None:
        projected = projected + plain.w13_bias.float()[:, None]
    inner = apply_activation(config, projected).to(x.dtype)
    out = torch.einsum("eti,ehi->eth", inner, plain.w2_weight).float()
    if plain.w2_bias is not None:
        out = out + plain.w2_bias.float()[:, None]
    out = expert_norm(config, plain, out)
    chosen = routing.topk_ids[None] == torch.arange(held, device=x.device)[:, None, None]
    share = torch.where(chosen, weights[None], 0.0).sum(-1)
    # An expert that was not chosen may overflow, and 0 times inf is NaN.
    routed = (torch.where(chosen.any(-1)[..., None], out, 0.0) * share[..., None]).sum(0)
    none = torch.zeros(*routing.topk_ids.shape, x.shape[1], device=x.device)
    zero = _weighted_sum(config, none, x, weights, routing) if config.zero_expert_num else 0.0
    return _scaled(config, routed) + zero


def _weigh_input(config: MoEConfig, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts' input and the weights that are left for their output."""
    if not config.apply_router_weight_on_input:
        return x, routing.topk_weights
    return (x.float() * routing.topk_weights).to(x.dtype), torch.ones_like(routing.topk_weights)


def _weighted_sum(config: MoEConfig, slots: Tensor, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """[T, K, H] slots, zero where nobody computed one, to [T, H] float32; zero experts hand the token back."""
    if config.zero_expert_num:
        ids = routing.topk_ids
        zero = (ids >= config.num_experts) & (ids < config.num_router_outputs)
        slots = torch.where(zero[..., None], x.float()[:, None], slots)
    total = (slots * weights.masked_fill(routing.topk_ids < 0, 0.0)[..., None]).sum(1)
    return _scaled(config, total)


def _scaled(config: MoEConfig, total: Tensor) -> Tensor:
    return total * config.routed_scaling_factor if config.apply_routed_scale_to_output else total
