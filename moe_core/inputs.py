"""What a call brings, checked and flattened; each refusal names the value, what was expected and the remedy."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .config import MoEConfig
from .errors import InputError
from .routing import FEW_IDS, check_ids, checks_ids
from .types import Routing


def flat(name: str, tensor: Tensor, tokens: int, width: int, device: torch.device) -> Tensor:
    """[..., width] as [T, width].

    Raises:
        InputError: another count of rows, another width, another device, or no floats.
    """
    if not tensor.shape or tensor.shape[-1] != width or tensor.numel() != tokens * width:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected [{tokens}, {width}] (one row a token)")
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}, expected {device}; move it there")
    if not tensor.dtype.is_floating_point:
        raise InputError(f"{name} has dtype {tensor.dtype}, expected a float dtype; pass logits, not ids")
    return tensor.reshape(tokens, width)


class Common(NamedTuple):
    """What :func:`common_routing` compares with, read off a config once.

    Args:
        top_k: K. device: of the weights. limit: behind the last id; None where ids are not checked.
    """

    top_k: int
    device: torch.device
    limit: int | None

    @classmethod
    def of(cls, config: MoEConfig, device: torch.device) -> Common:
        """For a layer's weights on a device."""
        checked = device.type == "cpu" if config.check_ids is None else config.check_ids
        limit = config.num_router_outputs if config.num_local_experts is None else config.num_local_experts
        return cls(config.top_k, device, limit if checked else None)


def common_routing(common: Common, tokens: int, topk_weights: Tensor | None, topk_ids: Tensor | None) -> Routing | None:
    """The caller's own routing of few tokens, where all is as it should be; None where :func:`given_routing` decides.

    All in one frame: behind cold caches each one more costs a decode step several microseconds.
    """
    if topk_weights is None or topk_ids is None:
        return None
    k, device, limit = common
    shape = (tokens, k)
    if (
        topk_ids.dtype is not torch.int32
        or topk_weights.dtype is not torch.float32
        or topk_ids.shape != shape
        or topk_weights.shape != shape
        or topk_ids.device != device
        or topk_weights.device != device
    ):
        return None
    if limit is not None:
        if tokens * k > FEW_IDS:
            return None
        for row in topk_ids.tolist():
            for number in row:
                if not -1 <= number < limit:
                    return None
    return Routing(topk_weights, topk_ids)


def given_routing(
    config: MoEConfig,
    tokens: int,
    topk_weights: Tensor | None,
    topk_ids: Tensor | None,
    device: torch.device,
) -> Routing:
    """The caller's own routing of a call of T tokens.

    Raises:
        InputError: one of both is missing, or they do not fit.  RoutingError: ids out of range.
    """
    if topk_weights is None or topk_ids is None:
        missing = "topk_weights" if topk_weights is None else "topk_ids"
        raise InputError(f"{missing}=None: topk_weights and topk_ids come together; pass both or neither")
    if topk_weights.device != device or topk_ids.device != device:
        name, tensor = ("topk_ids", topk_ids) if topk_weights.device == device else ("topk_weights", topk_weights)
        raise InputError(f"{name} is on {tensor.device}, expected {device}; move it there")
    routing = as_routing(config, topk_weights, topk_ids)
    if routing.topk_ids.shape[0] != tokens:
        raise InputError(
            f"topk_ids has {routing.topk_ids.shape[0]} rows, expected {tokens}, one a token of hidden_states"
        )
    return routing


def as_routing(config: MoEConfig, topk_weights: Tensor, topk_ids: Tensor) -> Routing:
    """Weights and ids [..., K] as a Routing; ids checked where that costs no synchronisation.

    Raises:
        InputError: wrong shapes.  RoutingError: ids out of range.
    """
    shape, dtype = topk_ids.shape, topk_ids.dtype
    if len(shape) < 2 or topk_weights.shape != shape or shape[-1] != config.top_k:
        raise InputError(
            f"topk_weights {tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)}: expected [T, K] with "
            f"K = top_k = {config.top_k} for both"
        )
    if dtype is not torch.int32 and (dtype.is_floating_point or dtype is torch.bool):
        raise InputError(f"topk_ids has dtype {dtype}, expected an integer dtype; pass topk_ids.int()")
    if len(shape) > 2:
        topk_weights, topk_ids = topk_weights.reshape(-1, config.top_k), topk_ids.reshape(-1, config.top_k)
    if checks_ids(config, topk_ids):
        check_ids(config, topk_ids, config.num_local_experts)
    # What is as it should be is not touched: each call into torch costs a decode step a microsecond.
    if topk_weights.dtype is not torch.float32:
        topk_weights = topk_weights.to(torch.float32)
    if dtype is not torch.int32:
        topk_ids = topk_ids.to(torch.int32)
    return Routing(topk_weights, topk_ids)


def refuse_hidden_states(
    config: MoEConfig, hidden_states: Tensor, dtype: torch.dtype, device: torch.device
) -> NoReturn:
    """Say what is wrong with an input that is not [..., H] of this dtype on this device.

    Raises:
        InputError: always.
    """
    if not hidden_states.shape or hidden_states.shape[-1] != config.hidden_size:
        raise InputError(
            f"hidden_states has shape {tuple(hidden_states.shape)}, expected [..., H] with H = hidden_size = "
            f"{config.hidden_size}; check which layer this input belongs to"
        )
    if hidden_states.device != device:
        raise InputError(
            f"hidden_states is on {hidden_states.device}, expected {device} like the weights; move it with "
            f".to({str(device)!r})"
        )
    raise InputError(
        f"hidden_states has dtype {hidden_states.dtype}, expected {dtype} as the weights; convert one of them"
    )
