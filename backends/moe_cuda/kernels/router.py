"""The router in one launch: logits to scores, bias, groups, the K largest, their weights, all in float32.

Its twin is :func:`moe_core.routing.route`. A row of logits lies in the same lanes whatever the batch, so its bits do
not depend on the rows beside it. Values are compared as integers that order like them, with the id below, so that one
maximum finds the best score and among equals the lowest id; NaN orders above all, so ids stay valid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_core import MoEConfig, MoEWeights, Routing

from ..launch import Kernel, Memo
from . import scores
from .scores import key_of, score, value_of

WIDEST = 4096
"""Columns, padding of groups included, of the widest router that one launch serves."""
ROWS = 4 if triton.knobs.runtime.interpret else 1
"""Of a program: one warp a row needs no barrier, and the interpreter pays by the program."""


def columns_of(config: MoEConfig) -> tuple[int, int]:
    """Groups and columns of a group, as powers of two that hold the config's."""
    groups = config.num_expert_group if config.has_groups and config.num_expert_group is not None else 1
    size = config.num_router_outputs // groups
    return triton.next_power_of_2(groups), max(triton.next_power_of_2(size), 16 if groups == 1 else 2)


def route_rows(
    config: MoEConfig,
    weights: MoEWeights,
    logits: Tensor,
    *,
    gate_bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
    pdl: bool = False,
) -> Routing:
    """Choose top_k experts for each row; what :func:`moe_core.routing.route` gives, but for nan_policy='raise'.

    Args:
        logits: [T, E], any float dtype, or [S, T, E] float32 parts of them, which are summed in order.
        gate_bias: [E], added to the logits: parts come without it.
        topk_ids: [T, K] int32, int64: experts that are settled already, of which only the weights are computed.
        pdl: launched before the kernel in front has ended, as the one behind may be (programmatic dependent launch).
    """
    parts = logits.shape[0] if logits.dim() == 3 else 1
    tokens, width = logits.shape[-2:]
    if parts > 1 or logits.stride(-1) != 1:
        logits = logits.contiguous()
    found = Routing(
        torch.empty(tokens, config.top_k, dtype=torch.float32, device=logits.device),
        torch.empty(tokens, config.top_k, dtype=torch.int32, device=logits.device),
    )
    if not tokens:
        return found
    bias = weights.e_score_correction_bias
    if config.hash_routing or config.sparsemixer_jitter is not None:
        bias = None
    kernels = _kernels(config)
    key = (width, parts, bias is None, pdl)
    kernel = kernels.get(key)
    if kernel is None:
        kernel = kernels[key] = _kernel(config, width, parts, bias is not None, pdl)
    kernel(
        (triton.cdiv(tokens, ROWS), 1, 1), logits, gate_bias, bias, weights.per_expert_scale,
        None if topk_ids is None else topk_ids.contiguous(), *found, tokens, logits.stride(-2),
    )  # fmt: skip
    return found


_kernels = Memo()


def _kernel(config: MoEConfig, width: int, parts: int, biased: bool, pdl: bool) -> Kernel:
    groups, size = columns_of(config)
    masked = config.has_groups and biased and config.group_mask_value != float("-inf")
    scale = 1.0 if config.apply_routed_scale_to_output else config.routed_scaling_factor
    least = torch.finfo(torch.float32).tiny if config.renorm_clamp_min is None else config.renorm_clamp_min
    constants = {
        "E": width,
        "PARTS": parts,
        "K": config.top_k,
        "K_2": triton.next_power_of_2(config.top_k),
        "ROWS": ROWS,
        "GROUPS": config.num_expert_group if config.has_groups else 1,
        "GROUPS_2": groups,
        "SIZE_2": size,
        "KEPT": config.topk_group or 1,
        "TOP2": config.group_score == "top2_sum",
        "MASK_VALUE": float(config.group_mask_value) if masked else None,
        "SCORE": config.scoring_func,
        "SCORE_FIRST": config.score_before_topk,
        "JITTER": config.sparsemixer_jitter,
        "LOGIT_SCALE": float(config.router_logit_scale),
        "SOFTCAP": config.router_logit_softcap,
        "RENORM": config.renormalize,
        "LEAST": float(least),
        "EPS": float(config.renorm_eps),
        "SCALE": float(scale),
        "NAN_ZERO": config.nan_policy == "zero",
        "PDL": pdl,
    }
    return Kernel(route_kernel, constants, num_warps=max(1, groups * size // 1024), pdl=pdl)


@triton.jit
def _packed(key, low):
    """int64 that orders by key, then by ``low`` (16 bits)."""
    return (key.to(tl.int64) << 16) | low.to(tl.int64)


@triton.jit
def _kept_groups(
    selection, inside, column, ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_2: tl.constexpr, SIZE_2: tl.constexpr,
    KEPT: tl.constexpr, TOP2: tl.constexpr,
):  # fmt: skip
    """Whether each column of [ROWS, GROUPS_2 * SIZE_2] is in one of the KEPT best groups of its row."""
    nothing = tl.full([1], -(2**63), tl.int64)
    packed = tl.where(inside, _packed(key_of(selection), 0x7FFF - column), nothing)
    packed = tl.reshape(packed, [ROWS, GROUPS_2, SIZE_2])
    best = tl.max(packed, 2)
    value = value_of((best >> 16).to(tl.int32))
    if TOP2:
        second = tl.max(tl.where(packed == best[:, :, None], nothing, packed), 2)
        value += value_of((second >> 16).to(tl.int32))
    g = tl.arange(0, GROUPS_2)[None, :]
    rank = tl.where(g < GROUPS, _packed(key_of(value), 0x7FFF - g), nothing)
    kept = rank != rank
    for _ in tl.static_range(KEPT):
        chosen = rank == tl.max(rank, 1)[:, None]
        kept |= chosen
        rank = tl.where(chosen, nothing, rank)
    kept = tl.broadcast_to(kept.to(tl.int32)[:, :, None], [ROWS, GROUPS_2, SIZE_2])
    return tl.reshape(kept, [ROWS, GROUPS_2 * SIZE_2]) != 0


@triton.jit
def _at(values, expert, wanted):
    """values[row, wanted[row]], for [rows, columns] values of experts ``expert``; 0 where there is none."""
    return tl.sum(tl.where(expert == wanted[:, None], values, 0.0), 1)


@triton.jit
def _sparsemixer_weight(logits, left, inside, expert, wanted, JITTER: tl.constexpr):
    """The weight of one choice within its band of the experts ``left``; thresholds are of all of them."""
    best = _at(logits, expert, wanted)[:, None]
    magnitude = tl.abs(logits)
    magnitude = tl.where(magnitude < best, best, magnitude)
    far = tl.div_rn(best - logits, magnitude) > 2.0 * JITTER
    return _at(scores.softmax(tl.where(far, float("-inf"), left), inside), expert, wanted)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits_ptr, gate_bias_ptr, bias_ptr, expert_scale_ptr, given_ids_ptr, weights_ptr, ids_ptr, tokens, stride,
    E: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, K_2: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_2: tl.constexpr, SIZE_2: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    MASK_VALUE: tl.constexpr, SCORE: tl.constexpr, SCORE_FIRST: tl.constexpr, JITTER: tl.constexpr,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, RENORM: tl.constexpr, LEAST: tl.constexpr, EPS: tl.constexpr,
    SCALE: tl.constexpr, NAN_ZERO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; a name with _2 is the next power of two."""
    if PDL:
        # In this order: programs that wait behind this kernel too soon would keep others from running.
        gdc_wait()
        gdc_launch_dependents()
    COLUMNS: tl.constexpr = GROUPS_2 * SIZE_2
    SIZE: tl.constexpr = E // GROUPS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < tokens
    column = tl.arange(0, COLUMNS)[None, :]
    # Each group begins at a multiple of SIZE_2; columns stay in the order of ids.
    if GROUPS > 1:
        member = column % SIZE_2
        expert = column // SIZE_2 * SIZE + member
        inside = (member < SIZE) & (expert < E)
        expert = tl.where(inside, expert, 0x7FFF)  # padding has nobody's id
    else:
        expert = column
        inside = column < E
    load = here[:, None] & inside
    at = row.to(tl.int64)[:, None] * stride + expert
    logits = tl.load(logits_ptr + at, mask=load, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):  # unrolled: all parts are on their way at once
        logits += tl.load(logits_ptr + part * (tokens.to(tl.int64) * E) + at, mask=load, other=0.0)
    if gate_bias_ptr is not None:
        logits += tl.load(gate_bias_ptr + expert, mask=inside, other=0.0).to(tl.float32)
    if LOGIT_SCALE != 1.0:
        logits *= LOGIT_SCALE
    if SOFTCAP is not None:
        logits = SOFTCAP * scores.tanh(logits / SOFTCAP)

    if SCORE_FIRST and JITTER is None:
        values = score(logits, inside, SCORE)
    else:
        values = logits
    selection = values
    if bias_ptr is not None:
        selection += tl.load(bias_ptr + expert, mask=inside, other=0.0)
    nothing = tl.full([1], -(2**63), tl.int64)
    k_of = tl.arange(0, K_2)[None, :]
    chosen_ids = tl.full([ROWS, K_2], -1, tl.int32)
    chosen = tl.zeros([ROWS, K_2], tl.float32)

    if given_ids_ptr is None:
        if GROUPS > 1:
            kept = _kept_groups(selection, inside, expert, ROWS, GROUPS, GROUPS_2, SIZE_2, KEPT, TOP2)
            if MASK_VALUE is None:
                packed = tl.where(inside & kept, _packed(key_of(selection), 0x7FFF - expert), nothing)
            else:
                # Of equal ones, an expert of a kept group is chosen.
                selection = tl.where(kept, selection, MASK_VALUE)
                packed = _packed(key_of(selection), (0x7FFF - expert) | (kept.to(tl.int32) << 15))
                packed = tl.where(inside, packed, nothing)
        else:
            packed = tl.where(inside, _packed(key_of(selection), 0x7FFF - expert), nothing)
        for k in range(K):
            best = tl.max(packed, 1)
            wanted = 0x7FFF - (best & 0x7FFF).to(tl.int32)
            packed = tl.where(packed == best[:, None], nothing, packed)
            if bias_ptr is None:
                value = value_of((best >> 16).to(tl.int32))
            else:
                value = _at(values, expert, wanted)
            chosen_ids = tl.where(k_of == k, wanted[:, None], chosen_ids)
            chosen = tl.where(k_of == k, value[:, None], chosen)
    else:
        given = row.to(tl.int64)[:, None] * K + k_of
        chosen_ids = tl.load(given_ids_ptr + given, mask=here[:, None] & (k_of < K), other=-1).to(tl.int32)
        for k in range(K):
            wanted = tl.sum(tl.where(k_of == k, chosen_ids, 0), 1)
            chosen = tl.where(k_of == k, _at(values, expert, wanted)[:, None], chosen)

    there = (k_of < K) & (chosen_ids >= 0)
    if JITTER is not None:
        first = tl.sum(tl.where(k_of == 0, chosen_ids, 0), 1)
        second = tl.sum(tl.where(k_of == 1, chosen_ids, 0), 1)
        left = tl.where(expert == first[:, None], float("-inf"), logits)
        one = _sparsemixer_weight(logits, logits, inside, expert, first, JITTER)
        two = _sparsemixer_weight(logits, left, inside, expert, second, JITTER)
        chosen = tl.where(k_of == 0, one[:, None], two[:, None])
    elif not SCORE_FIRST:
        # A softmax over the chosen ones leaves out those that are not there.
        chosen = score(chosen, there, SCORE)
    chosen = tl.where(there, chosen, 0.0)
    if RENORM:
        total = tl.sum(chosen, 1)
        total = tl.where(total < LEAST, LEAST, total) + EPS
        chosen = tl.div_rn(chosen, tl.broadcast_to(total[:, None], [ROWS, K_2]))
    if expert_scale_ptr is not None:
        chosen *= tl.load(expert_scale_ptr + chosen_ids, mask=there, other=0.0).to(tl.float32)
    if SCALE != 1.0:
        chosen *= SCALE
    if NAN_ZERO:
        finite = tl.abs(chosen) < float("inf")
        bad = tl.max(tl.where(finite, 0, 1), 1)
        chosen = tl.where(bad[:, None] != 0, 0.0, chosen)
    to = row.to(tl.int64)[:, None] * K + k_of
    store = here[:, None] & (k_of < K)
    tl.store(weights_ptr + to, chosen, mask=store)
    tl.store(ids_ptr + to, chosen_ids, mask=store)
