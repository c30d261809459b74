"""Experts that route by themselves are held to the config: a probe at bind, against the reference.

A kernel that owns its routing never shows its ids, so a scoring function or a bias that it ignores would go unseen.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference
from .config import MoEConfig
from .contract import PASSED_ON, experts_fault
from .errors import BindError, ConfigError, describe
from .routing import route, router_logits_of
from .types import ExpertsOut, Pending, Plan, Routing
from .weights import MoEWeights

logger = logging.getLogger("moe_core")
TOKENS = 16


@torch.no_grad()
def check_owned_routing(plan: Plan, weights: MoEWeights, backend: str, experts: Callable[..., Any]) -> None:
    """Run ``experts`` on a few made-up tokens, with logits given and (where there is a gate weight) without.

    Args:
        plan: the experts stage's.
        weights: the plain ones.
        experts: the stage as a function of all of its hook's arguments.
    Raises:
        BindError: the result is not what the config's routing gives; names each field that alone explains it.
    """
    config = plan.config
    if config.hash_routing:
        raise BindError(
            f"backend {backend} routes by itself, but hash_routing=True looks experts up by token id, which the "
            f"experts stage does not get; expected a backend with a gate stage: choose another"
        )
    if not reference.moe_supports(config, "experts") or config.num_held_experts < config.num_experts:
        logger.warning(
            "backend %s routes by itself, which was not checked: the reference cannot compute these experts", backend
        )
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, config.expert_hidden_size, generator=generator).to(plan.device, plan.dtype)
    logits = 2 * torch.randn(TOKENS, config.num_router_outputs, generator=generator).to(plan.device)
    probes: list[Tensor | None] = [logits]
    if weights.gate_weight is not None and config.expert_hidden_size == config.hidden_size:
        probes.append(None)
    for given in probes:
        try:
            found = experts(plan, x.clone(), None, given)
        except PASSED_ON:
            raise
        except BaseException as error:  # a third party's code; chained, with the backend's name
            raise BindError(
                f"experts of backend {backend} failed on {TOKENS} random tokens: {describe(error)}; report it to its "
                f"author, or choose another backend"
            ) from error
        fault = experts_fault(found, TOKENS, config.top_k, config.expert_hidden_size)
        if fault or not (isinstance(found, ExpertsOut) and found.reduced):
            raise BindError(
                f"experts of backend {backend} declare owns_routing and returned {_described(found)}, expected "
                f"ExpertsOut(value [T, H], reduced=True): nobody else has the weights to sum with; report it to "
                f"its author, or choose another backend"
            )
        value = found.value[:, : config.expert_hidden_size].float()
        if not _explains(config, weights, x, given, value):
            _refuse(config, weights, x, given, value, backend)


def _refuse(
    config: MoEConfig, weights: MoEWeights, x: Tensor, logits: Tensor | None, value: Tensor, backend: str
) -> None:
    readings = [
        f"expected {asked}, and its result is that of {done}"
        for (asked, done), other, other_weights in _misreadings(config, weights)
        if _explains(other, other_weights, x, logits, value)
    ]
    if readings:
        raise BindError(
            f"backend {backend} routes by itself and not as the config says: {'; or '.join(readings)}; report it to "
            f"its author, or choose another backend"
        )
    raise BindError(
        f"backend {backend} routes by itself and its result is not that of the config's routing, nor of one field of "
        f"it disregarded; expected what the reference computes for {TOKENS} random tokens: report it to its author, "
        f"or choose another backend"
    )


def _explains(config: MoEConfig, weights: MoEWeights, x: Tensor, logits: Tensor | None, value: Tensor) -> bool:
    """Whether ``value`` is the routed sum of this config, on the rows whose choice of experts is not close."""
    from .testing.tolerances import tolerance  # a bind that checks nothing needs no part of the kit

    if logits is None:
        logits = router_logits_of(config, weights, x)
    routing = route(config, weights, logits, hidden_states=x)
    settled = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    for sign in (-1, 1):  # alternating, because a shift of all logits changes no choice
        shift = sign * 1e-3 * (1 - 2 * (torch.arange(logits.shape[1], device=x.device) % 2))
        near = route(config, weights, logits * (1 + shift), hidden_states=x)
        settled &= (near.topk_ids.sort(1).values == routing.topk_ids.sort(1).values).all(1)
    want = _routed_sum(config, weights, x, routing)[settled]
    error = (value[settled] - want).norm()
    return bool(torch.isfinite(error) and error <= tolerance(x.dtype, "layer") * want.norm())


def _routed_sum(config: MoEConfig, weights: MoEWeights, x: Tensor, routing: Routing) -> Tensor:
    plan = Plan(config, weights, x.device, torch.float32)
    return reference.moe_reduce(plan, routing, reference.moe_experts(plan, x, routing), Pending(None))


def _misreadings(config: MoEConfig, weights: MoEWeights) -> Iterator[tuple[tuple[str, str], MoEConfig, MoEWeights]]:
    """What a kernel may have made of this config: (what was asked, what it did), and how to compute that."""
    changes: list[dict[str, Any]] = [
        {"scoring_func": name} for name in ("softmax", "sigmoid", "sqrtsoftplus") if name != config.scoring_func
    ]
    plain = {"renormalize": False, "renorm_eps": 0.0, "renorm_clamp_min": None}
    changes += [
        {"score_before_topk": not config.score_before_topk},
        plain if config.renormalize else {"renormalize": True},
        {"renorm_eps": 0.0},
        {"renorm_clamp_min": None},
        {"num_expert_group": None, "topk_group": None},
        {"group_score": "max" if config.group_score == "top2_sum" else "top2_sum"},
        {"routed_scaling_factor": 1.0},
        {"routed_scaling_factor": config.routed_scaling_factor**2},
        {"apply_router_weight_on_input": not config.apply_router_weight_on_input},
        {"router_logit_scale": 1.0},
        {"router_logit_softcap": None},
    ]
    for change in changes:
        if all(getattr(config, field) == value for field, value in change.items()):
            continue
        # A change takes along the fields that would contradict it.
        with_groups = {"num_expert_group": None, "topk_group": None} if change.get("score_before_topk") is False else {}
        try:
            other = dataclasses.replace(config, **{**with_groups, **change})
        except ConfigError:
            continue
        field = next(iter(change))
        yield (_pair(config, field), _pair(other, field)), other, weights
    for field in ("e_score_correction_bias", "gate_bias", "per_expert_scale"):
        if getattr(weights, field) is not None:
            without = dataclasses.replace(weights, **{field: None})
            yield (f"{field}=True", f"{field}=False"), config, without


def _pair(config: MoEConfig, field: str) -> str:
    return f"{field}={getattr(config, field)!r}"


def _described(found: object) -> str:
    return "ExpertsOut(reduced=False)" if isinstance(found, ExpertsOut) else type(found).__name__
