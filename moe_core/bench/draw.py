"""Weights and inputs drawn from a seed, and what a layer should answer, in float32."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import reference
from ..config import MoEConfig
from ..errors import BenchError
from ..routing import route, router_logits_of
from ..types import Pending, Plan, Routing
from ..weights import MoEWeights
from .shapes import Shape

_PERTURBATIONS = 8
_ATTEMPTS = 50


@dataclass
class Draw:
    """One input and its routing, in every form that an implementation may want.

    Args:
        hidden_states: [T, H]. topk_weights: [T, K] float32. topk_ids: [T, K] int64.
    """

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor

    @cached_property
    def topk_ids_int32(self) -> Tensor:
        """[T, K] int32."""
        return self.topk_ids.to(torch.int32)

    @cached_property
    def topk_weights_cast(self) -> Tensor:
        """[T, K] in the dtype of ``hidden_states``."""
        return self.topk_weights.to(self.hidden_states.dtype)

    @cached_property
    def experts_hit(self) -> int:
        """How many experts have at least one token."""
        return int(self.topk_ids.unique().numel())

    def prepare(self) -> Draw:
        """Convert now, so that no implementation pays for it inside a timed call."""
        _ = self.topk_ids_int32, self.topk_weights_cast, self.experts_hit
        return self


def make_weights(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> MoEWeights:
    """All tensors of the layer, normal with variance 1 / fan-in.

    One expert is drawn; the others are its rolls by distinct distances: different weights for the price of a copy.
    """
    config = shape.plain.config("layer")
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return drawn.to(device=device, dtype=dtype)

    def experts(rows: int, columns: int) -> Tensor:
        base = draw(rows, columns)
        out = torch.empty(e, rows, columns, dtype=dtype, device=device)
        for index in range(e):
            out[index] = base.roll((index, 7 * index), (0, 1))
        return out

    weights = MoEWeights(gate_weight=draw(e, h), w13_weight=experts(2 * i, h), w2_weight=experts(h, i))
    if config.e_score_correction_bias:
        weights.e_score_correction_bias = (torch.randn(e, generator=generator) * 0.01).to(device)
    if shape.shared_intermediate_size:
        weights.shared_w13_weight = draw(2 * shape.shared_intermediate_size, h)
        weights.shared_w2_weight = draw(h, shape.shared_intermediate_size)
    if config.shared_expert_gate:
        weights.shared_gate_weight = draw(1, h)
    return weights


def experts_only(weights: MoEWeights) -> MoEWeights:
    """The same tensors without router and shared experts."""
    names = [field.name for field in dataclasses.fields(weights) if field.name.startswith(("w13_", "w2_"))]
    return MoEWeights(**{name: getattr(weights, name) for name in names})


def make_draws(shape: Shape, weights: MoEWeights, tokens: int, count: int, seed: int) -> list[Draw]:
    """``count`` inputs of ``tokens`` rows with their routing.

    Tokens whose choice of experts would change if the logits were rounded to the dtype are left out, so that every
    implementation, whatever it routes in, has to choose the same experts.

    Raises:
        BenchError: no such tokens can be found.
    """
    config, dtype, device = shape.plain.config("layer"), weights.dtype, weights.device
    generator = torch.Generator().manual_seed(seed + tokens)
    rows = 2 * tokens + 32
    kept: list[Draw] = []
    pool: list[tuple[Tensor, Routing]] = []
    have = 0
    for _ in range(_ATTEMPTS * count):
        x = torch.randn(rows, shape.hidden_size, generator=generator).to(device=device, dtype=dtype)
        logits = router_logits_of(config, weights, x)
        routing = route(config, weights, logits)
        keep = _is_clear(config, weights, logits, routing, dtype, generator).nonzero()[:, 0]
        pool.append((x[keep], Routing(routing.topk_weights[keep], routing.topk_ids[keep])))
        have += len(keep)
        if have >= tokens:
            kept.append(_first(pool, tokens))
            pool, have = [], 0
        if len(kept) == count:
            return [each.prepare() for each in kept]
    raise BenchError(
        f"shape {shape.name}, {tokens} tokens: too few tokens choose their experts clearly in {dtype}; "
        f"use another --seed or fewer experts"
    )


def _first(pool: list[tuple[Tensor, Routing]], tokens: int) -> Draw:
    x = torch.cat([rows for rows, _ in pool])[:tokens]
    topk_weights = torch.cat([routing.topk_weights for _, routing in pool])[:tokens]
    topk_ids = torch.cat([routing.topk_ids for _, routing in pool])[:tokens]
    return Draw(x.contiguous(), topk_weights.contiguous(), topk_ids.long().contiguous())


def _is_clear(
    config: MoEConfig,
    weights: MoEWeights,
    logits: Tensor,
    routing: Routing,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """[T] bool: the same set of experts under noise of about twice the dtype's rounding error."""
    chosen = routing.topk_ids.sort(dim=1).values
    clear = torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)
    size = max(torch.finfo(dtype).eps, 1e-5)
    for _ in range(_PERTURBATIONS):
        noise = (torch.rand(logits.shape, generator=generator).to(logits.device) * 2 - 1) * size
        other = route(config, weights, logits * (1 + noise) + noise / 2)
        clear &= (other.topk_ids.sort(dim=1).values == chosen).all(dim=1)
    return clear


def expected_output(shape: Shape, stage: str, weights: MoEWeights, draw: Draw) -> Tensor:
    """[T, H] float32 by the reference's functions, never rounded to the dtype of the weights."""
    config = shape.config(stage)
    plan = Plan(config, weights, draw.hidden_states.device, torch.float32)
    shared = Pending(None)
    if stage == "layer" and config.has_shared_experts:
        shared = reference.moe_shared_experts(plan, draw.hidden_states)
    routing = Routing(draw.topk_weights, draw.topk_ids_int32)
    out = reference.moe_experts(plan, draw.hidden_states, routing)
    return reference.moe_reduce(plan, routing, out, shared)


def digest(draws: list[Draw]) -> str:
    """Of the ids: processes that should time the same routing can compare it."""
    found = hashlib.sha256()
    for each in draws:
        found.update(repr(each.topk_ids.tolist()).encode())
    return found.hexdigest()[:16]
