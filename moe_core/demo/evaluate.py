"""How well a byte-level language model predicts a text; needs torch only."""

from __future__ import annotations

import math
from typing import Any

import torch

from .ngram import PREFIX


@torch.no_grad()
def bits_per_byte(model: Any, data: bytes, context: int, batch: int) -> float:
    """The mean of ``-log2 p(byte | bytes before)`` over every byte of `data`, each scored exactly once.

    The text stands after two newlines, as for the n-gram. Windows of `context` inputs advance by three quarters of
    `context`; the first scores all its targets, every other one only those that no earlier window scored, so a byte
    is predicted from at least ``context // 4`` bytes unless it lies nearer to the start of the text.

    Args:
        model: called as ``model(input_ids=[B, context] int64, use_cache=False)``, answers with ``.logits``
            [B, context, 256], as transformers' causal models do. Put it in eval mode first.
        data: the text; at least one byte.
        context: inputs in a window, at least 4.
        batch: windows in one call.
    Raises:
        ValueError: `data` is empty, `context` is below 4 or `batch` below 1.
    """
    if not data or context < 4 or batch < 1:
        raise ValueError(f"need data, context >= 4 and batch >= 1; got {len(data)} bytes, {context} and {batch}")
    device = next(model.parameters()).device
    ids = torch.frombuffer(bytearray(PREFIX + data), dtype=torch.uint8).long()
    context = min(context, len(ids) - 1)
    last = len(ids) - 1 - context  # where the last window starts
    starts = torch.tensor([*range(0, last, context - context // 4), last])
    windows = ids.unfold(0, context + 1, 1)[starts]

    # Target j of a window is byte start + j + 1 of ids; the prefix is never a target, and none counts twice.
    targets = starts[:, None] + 1 + torch.arange(context)
    done = torch.cat([torch.tensor([len(PREFIX) - 1]), targets[:-1, -1]])
    fresh = targets > done[:, None]

    nats = 0.0
    for window, mask in zip(windows.split(batch), fresh.split(batch), strict=True):
        window = window.to(device)
        logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")
        nats += float(losses[mask.flatten().to(device)].double().sum())
    return nats / len(data) / math.log(2)
