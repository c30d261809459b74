"""Intel's extension for torch: ``deepseek_moe_tpp`` on weights in blocks of 64 x 64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable, require

_BLOCKS = (64, 48, 32, 16)  # its own packing has 16 rows, which takes more than twice the time of 64 at many tokens


def build(problem: Problem) -> Built:
    """The operator reads its block sizes off the packed weights."""
    if problem.dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable("dtype", f"takes float32 and bfloat16, not {problem.dtype}")
    ipex = require("intel_extension_for_pytorch", "intel-extension-for-pytorch", problem.paths)
    w13, w2 = problem.experts
    gate, up, down = ([_blocked(expert) for expert in part] for part in (*w13.chunk(2, dim=1), w2))
    function = torch.ops.torch_ipex.deepseek_moe_tpp

    def call(draw: Draw) -> Tensor:
        weights = draw.topk_weights_cast
        return function(draw.hidden_states, draw.topk_ids, gate, up, down, False, weights, False)  # type: ignore[no-any-return]

    return Built(call, f"ipex {ipex.__version__}, deepseek_moe_tpp, own packing")


def _blocked(weight: Tensor) -> Tensor:
    """[N, K] to [N/n, K/k, k, n], bfloat16 with pairs of k innermost: [N/n, K/k, k/2, n, 2]."""
    rows, columns = (next((block for block in _BLOCKS if size % block == 0), 0) for size in weight.shape)
    if not rows or not columns:
        raise Unavailable("shape", f"takes sizes that {_BLOCKS[-1]} divides, not {tuple(weight.shape)}")
    n, k = weight.shape[0] // rows, weight.shape[1] // columns
    if weight.dtype is torch.bfloat16:
        return weight.view(n, rows, k, columns // 2, 2).permute(0, 2, 3, 1, 4).contiguous()
    return weight.view(n, rows, k, columns).permute(0, 2, 3, 1).contiguous()
