"""From router logits to experts: the meaning of every routing field of MoEConfig, in float32.

Selection is descending by selection score with ties to the lowest id; ``torch.topk`` breaks ties arbitrarily, a stable
sort does not. A row depends on nothing but its own logits, to the last bit, except under ``expert_capacity``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MoEConfig
from .errors import InputError, RoutingError
from .invariant import elementwise, linear
from .simulation import simulated_ids
from .types import Routing
from .weights import MoEWeights

SMALLEST_SUM = torch.finfo(torch.float32).tiny
"""Where scores are renormalised, their sum is taken to be at least this: 0 / 0 is 0."""

FEW_IDS = 64
"""Up to so many ids, Python looks at each in less time than an operator of torch takes to start."""


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
        [T, K] int32. ``expert_capacity`` is not applied: see :func:`limit_capacity`.
    Raises:
        RoutingError: a NaN row with ``nan_policy='raise'``, or a custom function that breaks its contract.
        InputError: ``hash_routing`` without ``input_ids``, or with ids that its table does not have.
    Source: the formulas of vLLM, SGLang and transformers, family by family; docs/routing.md has the table.
    """
    logits = router_logits.float()
    if config.router_logit_scale != 1.0:
        logits = logits * config.router_logit_scale
    if config.router_logit_softcap is not None:
        logits = config.router_logit_softcap * elementwise(torch.tanh, logits / config.router_logit_softcap)
    renormalize = config.renormalize
    if topk_ids is not None:
        topk_ids = topk_ids.to(logits.device)
        topk_weights = _weigh(config, logits, topk_ids)
    elif config.custom_routing_function is not None:
        topk_weights, topk_ids = _custom(config, hidden_states, logits)
        renormalize = False  # the function was told, and may have its own way
    elif config.simulated_routing is not None:
        topk_ids = simulated_ids(config, logits.shape[0], logits.device)
        topk_weights = _weigh(config, logits, topk_ids)
    elif config.sparsemixer_jitter is not None:
        topk_ids = top_k_stable(logits, 2)[1]
        topk_weights = _weigh(config, logits, topk_ids)
    elif config.hash_routing:
        topk_ids = look_up_experts(config, weights, input_ids, logits.shape[0])
        topk_weights = _weigh(config, logits, topk_ids)
    elif config.score_before_topk:
        scores = score(config.scoring_func, logits)
        topk_ids = _choose(config, weights, scores)
        topk_weights = scores.gather(1, topk_ids)
    else:
        topk_ids = top_k_stable(_selection(weights, logits), config.top_k)[1]
        topk_weights = score(config.scoring_func, logits.gather(1, topk_ids))
    if renormalize and config.simulated_routing is None:
        topk_weights = topk_weights / _denominator(config, topk_weights)
    if weights.per_expert_scale is not None:
        topk_weights = topk_weights * weights.per_expert_scale.float()[topk_ids.long().clamp(min=0)]
    if config.routed_scaling_factor != 1.0 and not config.apply_routed_scale_to_output:
        topk_weights = topk_weights * config.routed_scaling_factor
    return Routing(apply_nan_policy(config, topk_weights), topk_ids.to(torch.int32))


def limit_capacity(routing: Routing, num_experts: int, capacity: int) -> Routing:
    """Let each expert keep the first ``capacity`` choices that fall on it; the others become -1 with weight 0.

    Args:
        routing: of the tokens that compete: first choices of all of them come before all second choices.
        num_experts: ids from here on (zero experts) take any number.
    """
    tokens, k = routing.topk_ids.shape
    in_order, order = torch.sort(routing.topk_ids.t().reshape(-1), stable=True)
    place = torch.arange(tokens * k, device=in_order.device) - torch.searchsorted(in_order, in_order)
    dropped = torch.empty_like(place, dtype=torch.bool).scatter_(0, order, place >= capacity).view(k, tokens).t()
    dropped = (dropped & (routing.topk_ids < num_experts)) | (routing.topk_ids < 0)
    return Routing(routing.topk_weights.masked_fill(dropped, 0.0), routing.topk_ids.masked_fill(dropped, -1))


def score(scoring_func: str, logits: Tensor) -> Tensor:
    """Scores of float32 logits along the last dimension."""
    if scoring_func == "softmax":
        return torch.softmax(logits, dim=-1)
    return elementwise(torch.sigmoid if scoring_func == "sigmoid" else _sqrt_softplus, logits)


def _sqrt_softplus(logits: Tensor) -> Tensor:
    return torch.sqrt(F.softplus(logits))


def top_k_stable(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties to the lowest index; NaN counts as largest, so ids stay valid and distinct."""
    ordered, index = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered[..., :k], index[..., :k]


def _choose(config: MoEConfig, weights: MoEWeights, scores: Tensor) -> Tensor:
    """[T, K] ids from [T, E] scores, within the kept groups where there are groups."""
    selection = _selection(weights, scores)
    if not config.has_groups:
        return top_k_stable(selection, config.top_k)[1]
    candidates, kept = _candidates(config, selection)
    values = selection.gather(1, candidates)
    if config.group_mask_value == float("-inf") or weights.e_score_correction_bias is None:
        # Scores are never below 0, so no masked expert could win, and of a tie the first candidate does.
        candidates, values = candidates[:, :kept], values[:, :kept]
    else:
        values[:, kept:] = config.group_mask_value
    return candidates.gather(1, top_k_stable(values, config.top_k)[1])


def _candidates(config: MoEConfig, selection: Tensor) -> tuple[Tensor, int]:
    """[T, E] ids, those of the kept groups first, both parts ascending; and how many are in the first part."""
    assert config.num_expert_group is not None and config.topk_group is not None
    rows, size = selection.shape[0], selection.shape[1] // config.num_expert_group
    grouped = selection.view(rows, config.num_expert_group, size)
    if config.group_score == "max":
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = top_k_stable(group_scores, config.topk_group)[1]
    dropped = torch.ones_like(group_scores, dtype=torch.int8).scatter_(1, kept, 0)
    groups = torch.argsort(dropped, dim=1, stable=True)
    ids = groups.unsqueeze(-1) * size + torch.arange(size, device=selection.device)
    return ids.view(rows, selection.shape[1]), config.topk_group * size


def _selection(weights: MoEWeights, values: Tensor) -> Tensor:
    return values if weights.e_score_correction_bias is None else values + weights.e_score_correction_bias


def _weigh(config: MoEConfig, logits: Tensor, topk_ids: Tensor) -> Tensor:
    """[T, K] weights of experts that something else than the scores chose; 0 for -1."""
    if config.custom_routing_function is not None:
        raise InputError(
            "topk_ids cannot be forced on custom_routing_function: its weights come with its own ids; pass "
            "topk_weights and topk_ids to the runner instead"
        )
    none, places = topk_ids < 0, topk_ids.long().clamp(min=0)
    if config.simulated_routing is not None:
        topk_weights = torch.full(topk_ids.shape, 1 / config.top_k, device=logits.device)
    elif config.sparsemixer_jitter is not None:
        topk_weights = _sparsemixer(logits, places, config.sparsemixer_jitter)
    elif config.score_before_topk:
        topk_weights = score(config.scoring_func, logits).gather(1, places)
    else:
        # A softmax over the chosen ones leaves out those that are not there.
        topk_weights = score(config.scoring_func, logits.gather(1, places).masked_fill(none, float("-inf")))
    return topk_weights.masked_fill(none, 0.0)


def _sparsemixer(logits: Tensor, topk_ids: Tensor, jitter: float) -> Tensor:
    """Two choices one after the other, each weighted within its own band of near-maximal logits (PhiMoE, inference)."""
    topk_weights, remaining = [], logits
    for index in topk_ids.split(1, dim=1):
        best = remaining.gather(1, index)
        outside = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        topk_weights.append(torch.softmax(remaining.masked_fill(outside, float("-inf")), dim=-1).gather(1, index))
        remaining = remaining.scatter(1, index, float("-inf"))
    return torch.cat(topk_weights, dim=1)


def _denominator(config: MoEConfig, topk_weights: Tensor) -> Tensor:
    least = SMALLEST_SUM if config.renorm_clamp_min is None else config.renorm_clamp_min
    total = topk_weights.sum(dim=-1, keepdim=True).clamp(min=least)
    return total + config.renorm_eps if config.renorm_eps else total


def look_up_experts(config: MoEConfig, weights: MoEWeights, input_ids: Tensor | None, tokens: int) -> Tensor:
    """[T, K] int64 ids of hash routing; where ids are not checked, a token id that the table lacks gets -1.

    Raises:
        InputError: ids that are missing, of another dtype, number or device, or (where checked) not in the table.
    """
    if input_ids is None:
        raise InputError("input_ids=None: hash_routing looks experts up by token id; pass input_ids of shape [T]")
    table, input_ids = weights.tid2eid, input_ids.reshape(-1)
    assert table is not None
    if input_ids.dtype.is_floating_point or input_ids.dtype.is_complex or input_ids.dtype == torch.bool:
        raise InputError(f"input_ids has dtype {input_ids.dtype}, expected an integer dtype; pass input_ids.long()")
    if input_ids.numel() != tokens:
        raise InputError(f"input_ids has {input_ids.numel()} ids for {tokens} tokens; pass one id a token")
    if input_ids.device != table.device:
        raise InputError(f"input_ids is on {input_ids.device}, expected {table.device}; move it there")
    rows = table.shape[0]
    bad = (input_ids < 0) | (input_ids >= rows)
    if checks_ids(config, input_ids) and bool(bad.any()):
        raise InputError(
            f"input_ids holds {int(input_ids[bad][0])}: expected 0 to {rows - 1}, since tid2eid has {rows} rows; check "
            f"the vocabulary, and give padding tokens an id that is in it"
        )
    found = table[input_ids.long().clamp(min=0, max=rows - 1)].long()
    return found.masked_fill(bad.unsqueeze(-1), -1)


def _custom(config: MoEConfig, hidden_states: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    function, expected = config.custom_routing_function, (logits.shape[0], config.top_k)
    assert function is not None
    # An inference tensor counts no versions, so the function gets one that it may spoil.
    given = logits.clone() if logits.is_inference() else logits
    version = None if given.is_inference() else given._version
    found = function(hidden_states, given, config.top_k, config.renormalize)
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(tensor, Tensor) for tensor in found)):
        raise RoutingError(
            f"custom_routing_function returned {type(found).__name__}, expected two tensors; return "
            f"(topk_weights, topk_ids)"
        )
    topk_weights, topk_ids = found
    if version is not None and given._version != version:
        raise RoutingError(
            "custom_routing_function changed router_logits in place, expected it to leave them; let it work on a clone"
        )
    if tuple(topk_weights.shape) != expected or tuple(topk_ids.shape) != expected:
        raise RoutingError(
            f"custom_routing_function returned weights {tuple(topk_weights.shape)} and ids {tuple(topk_ids.shape)}, "
            f"expected {expected} for both; return (topk_weights, topk_ids), one row a token"
        )
    if not topk_weights.dtype.is_floating_point or topk_ids.dtype.is_floating_point or topk_ids.dtype == torch.bool:
        raise RoutingError(
            f"custom_routing_function returned weights of {topk_weights.dtype} and ids of {topk_ids.dtype}, expected "
            f"float and integer; it returns (topk_weights, topk_ids) in this order"
        )
    if checks_ids(config, topk_ids):
        check_ids(config, topk_ids)
        _check_distinct(topk_ids)
        _check_finite(logits, topk_weights)
    topk_ids = topk_ids.long()
    return topk_weights.float().masked_fill(topk_ids < 0, 0.0), topk_ids


def _check_distinct(topk_ids: Tensor) -> None:
    ordered = topk_ids.sort(dim=-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=-1)
    if bool(twice.any()):
        row = int(twice.nonzero()[0, 0])
        raise RoutingError(
            f"custom_routing_function chose {topk_ids[row].tolist()} for row {row}, expected distinct experts; "
            f"use -1 where there is none to choose"
        )


def _check_finite(logits: Tensor, topk_weights: Tensor) -> None:
    """Weights must be finite where the logits are; for other rows there is ``nan_policy``."""
    bad = torch.isfinite(logits).all(dim=-1) & ~torch.isfinite(topk_weights).all(dim=-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise RoutingError(
            f"custom_routing_function returned weights {topk_weights[row].tolist()} for row {row} with finite logits, "
            f"expected finite weights; guard its division"
        )


def apply_nan_policy(config: MoEConfig, topk_weights: Tensor) -> Tensor:
    """Weights as ``config.nan_policy`` has them.

    Raises:
        RoutingError: a row with NaN or infinity under ``raise``, which waits for the device.
    """
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


def checks_ids(config: MoEConfig, ids: Tensor) -> bool:
    """Whether ids that come from outside the gate are checked: ``config.check_ids``, by default where it is free."""
    return ids.is_cpu if config.check_ids is None else config.check_ids


def check_ids(config: MoEConfig, topk_ids: Tensor, num_ids: int | None = None) -> None:
    """Raise RoutingError for an id outside -1 .. E + zero experts - 1. Waits for the device."""
    limit = config.num_router_outputs if num_ids is None else num_ids
    count = topk_ids.numel()
    if not count:
        return
    if count <= FEW_IDS and topk_ids.ndim == 2:
        rows = topk_ids.tolist()
        low, high = min(map(min, rows)), max(map(max, rows))
    else:
        low, high = (int(bound) for bound in topk_ids.aminmax())
    if low < -1 or high >= limit:
        bad = (topk_ids < -1) | (topk_ids >= limit)
        row, column = bad.nonzero()[0].tolist()
        raise RoutingError(
            f"topk_ids[{row}, {column}]={int(topk_ids[row, column])}: expected -1 (no expert) or 0 to {limit - 1}; "
            f"check that the ids belong to this layer of {config.num_experts} experts"
        )
