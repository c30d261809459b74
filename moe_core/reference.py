"""The reference: every hook in plain torch, in float32, on any device, with autograd.

It is the meaning of the hooks; every other backend is compared with it. It never changes its inputs. On an accelerator
it waits for the device only where it gives gradients, or where the config asks for a check of values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import apply_activation
from .config import MoEConfig
from .errors import StageError
from .hookspecs import hookimpl
from .invariant import elementwise, linear
from .platform import Platform
from .quant.dequantise import dequantise_matrix, slice_of, tensors_of
from .quant.layout import matrix_of, part_of
from .quant.rounding import rounded
from .routing import route, router_logits_of
from .types import PARALLEL_STAGES, STAGES, BackendInfo, Dispatched, ExpertsOut, Pending, Plan, Routing, Verdict
from .weights import MoEWeights

BLOCK = 64
"""Rows of one product of the routed experts on an accelerator."""


@hookimpl
def moe_backend_info() -> BackendInfo:
    """Any device; below all."""
    return BackendInfo(
        name="reference",
        device_types=("cpu", "cuda", "xpu", "mps", "xla", "tpu", "hpu", "npu", "meta"),
        priority=0,
        stages=(*STAGES, *PARALLEL_STAGES),
    )


@hookimpl
def moe_probe(platform: Platform) -> Verdict:
    """Plain torch is always there."""
    return Verdict.yes()


@hookimpl
def moe_supports(config: MoEConfig, stage: str) -> Verdict:
    """Everything; with gradients, except through activations that a scheme rounds."""
    field = {"experts": "w13_weight", "shared_experts": "shared_w13_weight"}.get(stage, "")
    matrix = matrix_of(config, field) if field else None
    return Verdict.yes(supports_backward=matrix is None or matrix.scheme.activations is None)


@hookimpl
def moe_gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:
    """Route by :func:`moe_core.routing.route`."""
    if router_logits is None:
        router_logits = router_logits_of(plan.config, plan.weights, hidden_states)
    return route(plan.config, plan.weights, router_logits, hidden_states=hidden_states, input_ids=input_ids)


@hookimpl
def moe_shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:
    """One dense expert of the shared experts' width, times its sigmoid gate."""
    weights: MoEWeights = plan.weights
    x = hidden_states.float()
    projected = product(plan.config, weights, "shared_w13_weight", x, bias=weights.shared_w13_bias)
    inner = apply_activation(plan.config, projected)
    out = product(plan.config, weights, "shared_w2_weight", inner, bias=weights.shared_w2_bias)
    if plan.config.shared_expert_gate:
        out = out * elementwise(torch.sigmoid, linear(x, _float(weights.shared_gate_weight)))
    return Pending(out)


@hookimpl
def moe_experts(plan: Plan, hidden_states: Tensor, routing: Routing | None) -> ExpertsOut:
    """[T, K, H] float32, unweighted."""
    if routing is None:
        raise StageError("the reference's experts do not own routing, and routing=None; the gate stage has to run")
    config, weights, x = plan.config, plan.weights, hidden_states.float()
    if config.apply_router_weight_on_input:
        x = x * routing.topk_weights
    # Off the CPU a stage that waits for the device stops its caller's queue and cannot be captured into a graph.
    static = x.device.type != "cpu" and not _needs_grad(x, weights)
    run = experts_in_blocks if static else experts_by_runs
    return ExpertsOut(run(config, weights, x, routing.topk_ids.long()), False)


def experts_by_runs(config: MoEConfig, weights: MoEWeights, x: Tensor, topk_ids: Tensor) -> Tensor:
    """[T, K, H] from [T, H] and [T, K] ids: rows grouped by expert, one dense product after the other.

    Waits for the device, which knows how many rows each expert has; the form that gives gradients.
    """
    (tokens, k), flat_ids = topk_ids.shape, topk_ids.reshape(-1)
    order = torch.argsort(flat_ids, stable=True)
    sorted_ids = flat_ids[order]
    # Where the rows of each expert begin in sorted order: -1 lies before the first, foreign ids in between or behind.
    held, first_zero, end = config.num_held_experts, config.num_experts, config.num_router_outputs
    edges = torch.tensor([*range(held + 1), first_zero, end], device=x.device)
    *bounds, zero_start, zero_stop = torch.searchsorted(sorted_ids, edges).tolist()
    source = order // k
    pieces = [x.new_zeros(bounds[0], x.shape[1])]
    for expert in range(held):
        start, stop = bounds[expert], bounds[expert + 1]
        if stop > start:
            pieces.append(dense_expert(config, weights, expert, x[source[start:stop]]))
    pieces.append(x.new_zeros(zero_start - bounds[held], x.shape[1]))
    pieces.append(x[source[zero_start:zero_stop]])  # zero experts hand the token back
    pieces.append(x.new_zeros(tokens * k - zero_stop, x.shape[1]))
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=x.device))
    return torch.cat(pieces)[inverse].view(tokens, k, x.shape[1])


def dense_expert(config: MoEConfig, weights: MoEWeights, expert: int | Tensor, x: Tensor) -> Tensor:
    """One expert on [n, H] float32 rows: activation(x w13^T + b13) w2^T + b2, and the norm behind it.

    ``expert`` is its index, or a tensor [1] that holds it and is not waited for.
    """

    inner = apply_activation(config, product(config, weights, "w13_weight", x, expert, weights.w13_bias))
    return expert_norm(config, weights, product(config, weights, "w2_weight", inner, expert, weights.w2_bias))


def product(
    config: MoEConfig,
    weights: MoEWeights,
    field: str,
    x: Tensor,
    expert: int | Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [n, K] float32 times a matrix transposed, plus bias.

    A quantised matrix is dequantised to float32, and ``x`` rounded as its scheme rounds activations: the product of the
    rounded numbers is what every backend computes.
    """

    def of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or expert is None:
            return tensor
        return tensor[expert] if isinstance(expert, int) else tensor.index_select(0, expert)[0]

    matrix = matrix_of(config, field)
    if matrix is None:
        return linear(x, _float(of(getattr(weights, field))), _maybe_float(of(bias)))
    tensors = tensors_of(weights, matrix)
    if expert is not None:
        tensors = slice_of(matrix, tensors, expert)
    x = rounded(x, matrix, tensors.get(part_of(field, "_input_scale")))
    return linear(x, dequantise_matrix(matrix, tensors), _maybe_float(of(bias)))


def experts_in_blocks(config: MoEConfig, weights: MoEWeights, x: Tensor, topk_ids: Tensor) -> Tensor:
    """The same without waiting: blocks of rows, each of one expert, as many as the worst routing could need.

    Shapes follow from T, K and E alone, so it can be captured; every product has BLOCK rows, so a row does not depend
    on its batch. Blocks that this routing does not need compute rows that nobody reads.
    """
    (tokens, k), flat_ids = topk_ids.shape, topk_ids.reshape(-1)
    slots, held, device = tokens * k, config.num_held_experts, x.device
    blocks = (slots + min(slots, held) * (BLOCK - 1)) // BLOCK if held else 0
    # Slots sorted by expert, those without one behind; the rows of each expert begin at a multiple of BLOCK.
    owner = flat_ids.masked_fill((flat_ids < 0) | (flat_ids >= held), held)
    order = torch.argsort(owner, stable=True)
    counts = torch.zeros(held + 1, dtype=torch.int64, device=device).scatter_add_(0, owner, torch.ones_like(owner))
    room = (counts + BLOCK - 1) // BLOCK * BLOCK
    room_ends, count_ends, owner = room.cumsum(0), counts.cumsum(0), owner[order]
    place = (room_ends - room - count_ends + counts)[owner] + torch.arange(slots, device=device)
    end = blocks * BLOCK
    place = place.masked_fill(owner == held, end)
    # The row of x that belongs at each place; where none does, T, a row of zeros.
    row_at = torch.full((end + 1,), tokens, dtype=torch.int64, device=device).scatter(0, place, order // k)
    firsts = torch.arange(0, end, BLOCK, device=device)
    expert_of = (firsts[:, None] >= room_ends[None, :held]).sum(1).clamp(max=held - 1)
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    rows = [
        dense_expert(config, weights, expert_of[i : i + 1], padded[row_at[i * BLOCK : (i + 1) * BLOCK]])
        for i in range(blocks)
    ]
    rows.append(x.new_zeros(1, x.shape[1]))
    out = torch.cat(rows)[torch.empty_like(order).scatter_(0, order, place)].view(tokens, k, x.shape[1])
    if config.zero_expert_num:
        is_zero = (topk_ids >= config.num_experts) & (topk_ids < config.num_router_outputs)
        out = torch.where(is_zero[..., None], x[:, None], out)
    return out


def expert_norm(config: MoEConfig, weights: MoEWeights, out: Tensor) -> Tensor:
    """The norm behind an expert on its float32 output [n, H]; layers without one get ``out`` back."""
    if config.post_expert_norm_eps is None:
        return out
    norm, width = _float(weights.post_expert_norm_weight), (out.shape[-1],)
    if config.post_expert_norm_scale_first:
        return F.rms_norm(out * norm, width, None, config.post_expert_norm_eps)
    return F.rms_norm(out, width, norm, config.post_expert_norm_eps)


def _needs_grad(x: Tensor, weights: MoEWeights) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or any(tensor.requires_grad for _, tensor in weights.named_tensors())
    )


@hookimpl
def moe_reduce(plan: Plan, routing: Routing | None, experts_out: ExpertsOut, shared: Pending) -> Tensor:
    """Weighted sum in float32, the routed scale where it goes to the output, plus the shared experts."""
    config = plan.config
    out = experts_out.value
    if not experts_out.reduced:
        out = out.float()
        if routing is None:
            raise StageError("unreduced experts need routing weights, and routing=None")
        if config.apply_router_weight_on_input:
            # The weight went into the input; an id of -1 already left zeros.
            out = out.sum(dim=1)
        else:
            out = torch.einsum("tkh,tk->th", out, routing.topk_weights.masked_fill(routing.topk_ids < 0, 0.0))
        if config.apply_routed_scale_to_output:
            out = out * config.routed_scaling_factor
    beside = shared.result()
    if beside is not None:
        out = combine_shared(config, out.float(), beside)
    return out if out.dtype is plan.dtype else out.to(plan.dtype)


@hookimpl
def moe_dispatch(plan: Plan, hidden_states: Tensor, routing: Routing) -> Any:
    """torch.distributed's transfers, in the way that the mesh and the layer suggest."""
    return plan.parallel.exchange.dispatch(plan, hidden_states, routing)


@hookimpl
def moe_combine(plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> ExpertsOut:
    """Back on the same way, summed."""
    found: ExpertsOut = plan.parallel.exchange.combine(plan, experts_out, dispatched)
    return found


def combine_shared(config: MoEConfig, routed: Tensor, shared: Tensor | None) -> Tensor:
    """Routed plus shared, or their average over 1 + ``num_shared_experts``."""
    if shared is None:
        return routed
    total = routed + shared.to(routed.dtype)
    return total / (1 + config.num_shared_experts) if config.shared_expert_combination == "average" else total


def _float(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.float()


def _maybe_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
