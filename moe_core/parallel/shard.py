"""This rank's part of the weights: its experts, and its slice of their intermediate size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import MoEConfig
from ..errors import WeightsError
from ..weights import MoEWeights
from .mesh import Ranks
from .placement import split_points

BY_EXPERT = (
    "w13_weight",
    "w2_weight",
    "w13_bias",
    "w2_bias",
    "w13_weight_scale",
    "w2_weight_scale",
    "w13_weight_zero_point",
    "w2_weight_zero_point",
    "w13_weight_scale_2",
    "w2_weight_scale_2",
)
"""Tensors whose first dimension counts experts."""


def shard_weights(config: MoEConfig, weights: MoEWeights, ranks: Ranks) -> MoEWeights:
    """What this rank holds.

    Args:
        config: of the whole layer.
        weights: of the whole layer, of which parts are taken; or this rank's part along an axis already, which the
            shapes tell (:func:`moe_core.parallel.load_weights` reads no more than that). A part along "tp" has w2_bias
            and shared_w2_bias on the first rank and zeros on the others.
    Returns:
        MoEWeights of ``ranks.local_config(config)``: views where a part lies together, copies elsewhere.
    Raises:
        WeightsError: shapes of neither.
    """
    found: dict[str, Any] = dict(weights.named_tensors())
    _take_experts(config, found, ranks)
    _take_columns(config, found, ranks)
    _take_shared(config, found, ranks)
    return MoEWeights(**found)


def _take_experts(config: MoEConfig, found: dict[str, Any], ranks: Ranks) -> None:
    slots = ranks.placement.slots[ranks.comms["ep"].rank]
    for name in BY_EXPERT:
        tensor = found.get(name)
        if tensor is None or tensor.ndim == 0:
            continue
        held = tensor.shape[0]
        whole = held == config.num_experts and config.num_local_experts is None
        if not whole:
            if held != len(slots):
                raise WeightsError(
                    f"{name} has {held} experts, expected all {config.num_experts}, or the {len(slots)} that the "
                    f"placement gives rank {ranks.comms['ep'].rank} of axis 'ep'"
                )
            continue
        consecutive = slots == tuple(range(slots[0], slots[0] + len(slots))) if slots else True
        if consecutive:
            first = slots[0] if slots else 0
            found[name] = tensor[first : first + len(slots)]
        else:
            chosen = torch.tensor(slots, dtype=torch.int64, device=tensor.device)
            # Not every torch can choose rows of an 8-bit float; of their bytes every one can.
            found[name] = tensor.view(torch.uint8)[chosen].view(tensor.dtype) if _is_byte(tensor) else tensor[chosen]


def _is_byte(tensor: Tensor) -> bool:
    return tensor.element_size() == 1


def _take_columns(config: MoEConfig, found: dict[str, Any], ranks: Ranks) -> None:
    tp, inner = ranks.comms["tp"], config.intermediate_size
    if tp.size == 1:
        return
    bounds = split_points(inner, tp.size)
    part = slice(bounds[tp.rank], bounds[tp.rank + 1])
    if not _is_whole("w2_weight", found["w2_weight"].shape[2], inner, part, "tp", tp.rank):
        return
    found["w13_weight"] = rows_of(config, found["w13_weight"], 1, inner, part)
    found["w2_weight"] = found["w2_weight"][:, :, part].contiguous()
    if found.get("w13_bias") is not None:
        found["w13_bias"] = rows_of(config, found["w13_bias"], 1, inner, part)
    if found.get("w2_bias") is not None and tp.rank:
        # The ranks' outputs are summed: a bias on each would be added tp times.
        found["w2_bias"] = torch.zeros_like(found["w2_bias"])


def _take_shared(config: MoEConfig, found: dict[str, Any], ranks: Ranks) -> None:
    (index, parts), inner = ranks.shared_part(), config.shared_intermediate_size
    if parts == 1 or inner is None:
        return
    bounds = split_points(inner, parts)
    part = slice(bounds[index], bounds[index + 1])
    axis = " x ".join(ranks.facts.shared_axes)
    if not _is_whole("shared_w2_weight", found["shared_w2_weight"].shape[1], inner, part, axis, index):
        return
    found["shared_w13_weight"] = rows_of(config, found["shared_w13_weight"], 0, inner, part)
    found["shared_w2_weight"] = found["shared_w2_weight"][:, part].contiguous()
    if found.get("shared_w13_bias") is not None:
        found["shared_w13_bias"] = rows_of(config, found["shared_w13_bias"], 0, inner, part)
    if found.get("shared_w2_bias") is not None and index:
        found["shared_w2_bias"] = torch.zeros_like(found["shared_w2_bias"])


def _is_whole(name: str, width: int, inner: int, part: slice, axis: str, rank: int) -> bool:
    if width == inner:
        return True
    if width == part.stop - part.start:
        return False
    raise WeightsError(
        f"{name} has {width} columns, expected all {inner}, or the {part.stop - part.start} of rank {rank} of axis "
        f"{axis!r}"
    )


def rows_of(config: MoEConfig, tensor: Tensor, dim: int, inner: int, part: slice) -> Tensor:
    """Rows of the first product that belong to ``part`` of the intermediate size: of gate and up alike."""
    if not config.gated:
        return _slice(tensor, dim, part).contiguous()
    if config.w13_interleaved:
        return _slice(tensor, dim, slice(2 * part.start, 2 * part.stop)).contiguous()
    up = slice(inner + part.start, inner + part.stop)
    return torch.cat([_slice(tensor, dim, part), _slice(tensor, dim, up)], dim)


def _slice(tensor: Tensor, dim: int, part: slice) -> Tensor:
    return tensor.narrow(dim, part.start, part.stop - part.start)
