"""The sum over a token's experts, in float32 and in the order of k, with all that a layer adds to it: one launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ..launch import Kernel

NO_LIMIT = 2**31 - 1


def combine_rows(
    part: Tensor,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    out: Tensor,
    *,
    weighted: bool = False,
    limit: int = NO_LIMIT,
    hidden_states: Tensor | None = None,
    zero_experts: tuple[int, int] = (0, 0),
    scale: float = 1.0,
    shared: Tensor | None = None,
    divisor: int = 1,
    pdl: bool = False,
) -> Tensor:
    """out = (scale * sum over k of weight * part + shared) / divisor; a row depends on no other row.

    Args:
        part: [T, K, H] or [T*K, H], any float dtype; [T, H] where topk_ids is None: summed, weighted and scaled.
        topk_ids: [T, K] int32. A pair whose id is outside 0 .. limit - 1 contributes nothing: neither its row nor its
            weight is used, and both may be NaN.
        topk_weights: [T, K] float32; None is a sum with ones.
        out: [T, H], contiguous; it is written and returned.
        weighted: the rows of part carry their weights; topk_weights are for the zero experts only.
        limit: how many experts part has rows of.
        hidden_states: [T, H]: what the zero experts return.
        zero_experts: a pair whose id is in first .. stop - 1 contributes its token times its weight.
        shared: [T, H], any float dtype.
        pdl: launched before the kernel that makes ``part`` has ended (programmatic dependent launch).
    """
    tokens, width = out.shape
    if not out.numel():
        return out
    part, hidden_states, shared = _rows(part, width), _rows(hidden_states, width), _rows(shared, width)
    k = 0 if topk_ids is None else topk_ids.shape[1]
    block = 1024 if tokens >= 64 else 256
    kernel = _kernel(width, k, weighted, limit, *zero_experts, scale, divisor, block, pdl)
    tensors = (part, _contiguous(topk_ids), _contiguous(topk_weights), hidden_states, shared, out)
    kernel(
        (tokens * triton.cdiv(width, block), 1, 1),
        *tensors, part.stride(0), _stride(hidden_states), _stride(shared),
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=1024)
def _kernel(
    width: int,
    k: int,
    weighted: bool,
    limit: int,
    zero_first: int,
    zero_stop: int,
    scale: float,
    divisor: int,
    block: int,
    pdl: bool,
) -> Kernel:
    constants = {
        "H": width,
        "K": k,
        "WEIGHTED": weighted,
        "LIMIT": limit,
        "ZERO_FIRST": zero_first,
        "ZERO_STOP": zero_stop,
        "SCALE": scale,
        "DIVISOR": divisor,
        "BLOCK": block,
        "PDL": pdl,
    }
    return Kernel(combine_kernel, constants, pdl=pdl)


def combine_rows_torch(
    part: Tensor,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    out: Tensor,
    *,
    weighted: bool = False,
    limit: int = NO_LIMIT,
    hidden_states: Tensor | None = None,
    zero_experts: tuple[int, int] = (0, 0),
    scale: float = 1.0,
    shared: Tensor | None = None,
    divisor: int = 1,
) -> Tensor:
    """The twin of :func:`combine_rows`."""
    tokens, width = out.shape
    if topk_ids is None:
        total = part.float()
    else:
        ones = torch.ones_like(topk_ids, dtype=torch.float32)
        weights = ones if topk_weights is None else topk_weights
        rows = part.view(tokens, topk_ids.shape[1], width).float()
        if not weighted:
            rows = rows * weights[..., None]
        rows = rows.masked_fill(((topk_ids < 0) | (topk_ids >= limit))[..., None], 0.0)
        first, stop = zero_experts
        if stop > first:
            assert hidden_states is not None
            is_zero = ((topk_ids >= first) & (topk_ids < stop))[..., None]
            rows = torch.where(is_zero, hidden_states[:, None].float() * weights[..., None], rows)
        total = rows.sum(1) * scale
    if shared is not None:
        total = total + shared.float()
    return out.copy_(total / divisor)


def _rows(tensor: Tensor | None, width: int) -> Tensor | None:
    """[n, width] whose columns lie side by side; the rows may have room between them."""
    if tensor is None:
        return None
    if tensor.dim() > 2 or tensor.stride(-1) != 1:
        tensor = tensor.reshape(-1, width)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


@triton.jit
def _pair(part, topk_ids, topk_weights, x, token, k, stride, h, inside,
          K: tl.constexpr, WEIGHTED: tl.constexpr, LIMIT: tl.constexpr, ZERO_FIRST: tl.constexpr,
          ZERO_STOP: tl.constexpr):  # fmt: skip
    """What the k-th choice of a token contributes."""
    pair = token * K + k
    expert = tl.load(topk_ids + pair)
    held = (expert >= 0) & (expert < LIMIT)
    row = tl.load(part + pair * stride + h, mask=inside & held, other=0.0, eviction_policy="evict_first")
    row = row.to(tl.float32)
    if topk_weights is not None and not WEIGHTED:
        row *= tl.where(held, tl.load(topk_weights + pair), 0.0)
    if ZERO_STOP > ZERO_FIRST:
        weight = 1.0
        if topk_weights is not None:
            weight = tl.load(topk_weights + pair)
        row = tl.where((expert >= ZERO_FIRST) & (expert < ZERO_STOP), x * weight, row)
    return row


@triton.jit
def combine_kernel(
    part, topk_ids, topk_weights, hidden_states, shared, out, part_stride, hidden_stride, shared_stride,
    H: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, LIMIT: tl.constexpr, ZERO_FIRST: tl.constexpr,
    ZERO_STOP: tl.constexpr, SCALE: tl.constexpr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK columns of one row."""
    if PDL:
        gdc_wait()
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    h = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = h < H
    if topk_ids is None:
        total = tl.load(part + token * part_stride + h, mask=inside, other=0.0).to(tl.float32)
    else:
        x = 0.0
        if ZERO_STOP > ZERO_FIRST:
            x = tl.load(hidden_states + token * hidden_stride + h, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        if K <= 16:
            for k in tl.static_range(K):
                total += _pair(part, topk_ids, topk_weights, x, token, k, part_stride, h, inside,
                               K, WEIGHTED, LIMIT, ZERO_FIRST, ZERO_STOP)  # fmt: skip
        else:
            for k in range(K):
                total += _pair(part, topk_ids, topk_weights, x, token, k, part_stride, h, inside,
                               K, WEIGHTED, LIMIT, ZERO_FIRST, ZERO_STOP)  # fmt: skip
        total *= SCALE
    if shared is not None:
        total += tl.load(shared + token * shared_stride + h, mask=inside, other=0.0).to(tl.float32)
    total /= DIVISOR
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=inside)
