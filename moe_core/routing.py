"""From router logits to experts: the meaning of every routing field of MoEConfig, in float32.

Selection is descending by selection score with ties to the lowest id; ``torch.topk`` breaks ties arbitrarily, a stable
sort does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MoEConfig
from .errors import InputError, RoutingError
from .invariant import elementwise, linear
from .types import Routing
from .weights import MoEWeights


def router_logits_of(config: MoEConfig, weights: MoEWeights, hidden_states: Tensor) -> Tensor:
    """[T, E] float32 logits from [T, H]; the product is taken in float32.

    Raises:
        InputError: the layer has no gate weight.
    """
    if weights.gate_weight is None:
        raise InputError(
            "router_logits=None and the layer has no gate_weight; pass router_logits, topk_weights+topk_ids, or gate="
        )
    bias = None if weights.gate_bias is None else weights.gate_bias.float()
    return linear(hidden_states.float(), weights.gate_weight.float(), bias)


def route(
    config: MoEConfig,
    weights: MoEWeights,
    router_logits: Tensor,
    *,
    hidden_states: Tensor | None = None,
    input_ids: Tensor | None = None,
    topk_ids: Tensor | None = None,
) -> Routing:
    """Choose top_k experts for each row of ``router_logits``.

    Args:
        router_logits: [T, E] (E with zero experts), any float dtype, before ``router_logit_softcap``.
        hidden_states: [T, H]; only ``custom_routing_function`` sees it.
        input_ids: [T]; only ``hash_routing`` needs it.
        topk_ids: [T, K] experts that are settled already (a replay): only their weights are computed; -1 gets 0.
    Returns:
        Routing: weights [T, K] float32 with ``routed_scaling_factor`` applied (unless it goes to the output), ids
        [T, K] int32.
    Raises:
        RoutingError: a NaN row with ``nan_policy='raise'``, or a custom function that breaks its contract.
        InputError: ``hash_routing`` without ``input_ids``.
    Source: the formulas of vLLM, SGLang and transformers, family by family; docs/routing.md has the table.
    """
    logits = router_logits.float()
    if config.router_logit_scale != 1.0:
        logits = logits * config.router_logit_scale
    if config.router_logit_softcap is not None:
        logits = config.router_logit_softcap * torch.tanh(logits / config.router_logit_softcap)
    if topk_ids is not None:
        topk_weights, topk_ids = _weigh(config, logits, topk_ids)
    elif config.custom_routing_function is not None:
        topk_weights, topk_ids = _custom(config, hidden_states, router_logits)
    elif config.simulated_routing is not None:
        return _simulated(config, logits)
    elif config.sparsemixer_jitter is not None:
        topk_weights, topk_ids = _sparsemixer(logits, config.sparsemixer_jitter)
    elif config.score_before_topk or config.hash_routing:
        scores = score(config.scoring_func, logits)
        topk_ids = _choose(config, weights, scores, input_ids)
        topk_weights = scores.gather(1, topk_ids)
    else:
        topk_ids = top_k_stable(_selection(weights, logits), config.top_k)[1]
        topk_weights = score(config.scoring_func, logits.gather(1, topk_ids))
    if config.renormalize:
        topk_weights = topk_weights / _denominator(config, topk_weights)
    if weights.per_expert_scale is not None:
        topk_weights = topk_weights * weights.per_expert_scale.float()[topk_ids]
    if config.routed_scaling_factor != 1.0 and not config.apply_routed_scale_to_output:
        topk_weights = topk_weights * config.routed_scaling_factor
    return Routing(_apply_nan_policy(config, topk_weights), topk_ids.to(torch.int32))


def _weigh(config: MoEConfig, logits: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    if config.custom_routing_function is not None or config.sparsemixer_jitter is not None:
        raise InputError(
            "topk_ids cannot be forced on custom_routing_function or sparsemixer: their weights follow from how they "
            "choose; pass topk_weights and topk_ids to the runner instead"
        )
    places = topk_ids.long().clamp(min=0)
    if config.score_before_topk or config.hash_routing:
        topk_weights = score(config.scoring_func, logits).gather(1, places)
    else:
        topk_weights = score(config.scoring_func, logits.gather(1, places))
    return topk_weights.masked_fill(topk_ids < 0, 0.0), topk_ids


def score(scoring_func: str, logits: Tensor) -> Tensor:
    """Scores of float32 logits along the last dimension."""
    if scoring_func == "softmax":
        return torch.softmax(logits, dim=-1)
    if scoring_func == "sigmoid":
        return elementwise(torch.sigmoid, logits)
    return torch.sqrt(elementwise(F.softplus, logits))


def top_k_stable(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties to the lowest index; NaN counts as largest, so ids stay valid and distinct."""
    ordered, index = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered[..., :k], index[..., :k]


def _choose(config: MoEConfig, weights: MoEWeights, scores: Tensor, input_ids: Tensor | None) -> Tensor:
    if config.hash_routing:
        if input_ids is None:
            raise InputError("input_ids=None: hash_routing looks experts up by token id; pass input_ids of shape [T]")
        assert weights.tid2eid is not None
        return weights.tid2eid[input_ids.reshape(-1)].long()
    selection = _selection(weights, scores)
    if config.has_groups:
        selection = _mask_groups(config, selection)
    return top_k_stable(selection, config.top_k)[1]


def _selection(weights: MoEWeights, values: Tensor) -> Tensor:
    return values if weights.e_score_correction_bias is None else values + weights.e_score_correction_bias


def _mask_groups(config: MoEConfig, selection: Tensor) -> Tensor:
    assert config.num_expert_group is not None and config.topk_group is not None
    rows = selection.shape[0]
    size = selection.shape[1] // config.num_expert_group
    grouped = selection.view(rows, config.num_expert_group, size)
    if config.group_score == "max":
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = top_k_stable(group_scores, config.topk_group)[1]
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), config.group_mask_value).view_as(selection)


def _denominator(config: MoEConfig, topk_weights: Tensor) -> Tensor:
    total = topk_weights.sum(dim=-1, keepdim=True)
    if config.renorm_clamp_min is not None:
        total = total.clamp(min=config.renorm_clamp_min)
    return total + config.renorm_eps if config.renorm_eps else total


def _sparsemixer(logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Two sequential top-1 choices, each weighted within its own band of near-maximal logits (PhiMoE, inference)."""
    weights, ids = [], []
    remaining = logits
    for _ in range(2):
        best, index = top_k_stable(remaining, 1)
        outside = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        weights.append(torch.softmax(remaining.masked_fill(outside, float("-inf")), dim=-1).gather(1, index))
        ids.append(index)
        remaining = remaining.scatter(1, index, float("-inf"))
    return torch.cat(weights, dim=1), torch.cat(ids, dim=1)


def _custom(config: MoEConfig, hidden_states: Tensor | None, router_logits: Tensor) -> tuple[Tensor, Tensor]:
    function = config.custom_routing_function
    assert function is not None
    topk_weights, topk_ids = function(hidden_states, router_logits, config.top_k, config.renormalize)
    expected = (router_logits.shape[0], config.top_k)
    if tuple(topk_weights.shape) != expected or tuple(topk_ids.shape) != expected:
        raise RoutingError(
            f"custom_routing_function returned weights {tuple(topk_weights.shape)} and ids {tuple(topk_ids.shape)}, "
            f"expected {expected} for both"
        )
    check_ids(config, topk_ids)
    return topk_weights.float(), topk_ids.long()


def _simulated(config: MoEConfig, logits: Tensor) -> Routing:
    """Distinct random experts, equal for equal T and seed; equal weights. Zipf: popularity ~ 1 / (id + 1) ** skew."""
    tokens = logits.shape[0]
    generator = torch.Generator().manual_seed(config.simulated_seed)
    uniform = torch.rand(tokens, config.num_experts, generator=generator).clamp_(min=1e-30)
    keys = -torch.log(-torch.log(uniform))
    if config.simulated_routing == "zipf":
        keys -= config.simulated_zipf_skew * torch.log(torch.arange(1, config.num_experts + 1, dtype=torch.float32))
    ids = top_k_stable(keys, config.top_k)[1].to(device=logits.device, dtype=torch.int32)
    return Routing(torch.full_like(ids, 1 / config.top_k, dtype=torch.float32), ids)


def _apply_nan_policy(config: MoEConfig, topk_weights: Tensor) -> Tensor:
    if config.nan_policy == "propagate":
        return topk_weights
    bad = ~torch.isfinite(topk_weights).all(dim=-1)
    if config.nan_policy == "zero":
        return topk_weights.masked_fill(bad.unsqueeze(-1), 0.0)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise RoutingError(
            f"routing weights of row {row} are {topk_weights[row].tolist()}, expected finite numbers: its logits hold "
            f"NaN or inf; mend the input, or set nan_policy='zero' or 'propagate'"
        )
    return topk_weights


def check_ids(config: MoEConfig, topk_ids: Tensor, num_ids: int | None = None) -> None:
    """Raise RoutingError for an id outside -1 .. E + zero experts - 1. Waits for the device."""
    limit = config.num_router_outputs if num_ids is None else num_ids
    bad = (topk_ids < -1) | (topk_ids >= limit)
    if topk_ids.numel() and bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise RoutingError(
            f"topk_ids[{row}, {column}]={int(topk_ids[row, column])}: expected -1 (no expert) or 0 to {limit - 1}; "
            f"check that the ids belong to this layer of {config.num_experts} experts"
        )
