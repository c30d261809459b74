"""The ipex strategy: Intel's extension for torch, its product kernels on weights in blocks of our own.

``torch_ipex::deepseek_moe_tpp`` runs plain SwiGLU in bfloat16, all experts in one call. Its SiLU is an approximation,
off by up to 5e-4 near 8: within bfloat16's rounding, beyond float32's tolerance. So float32, and whatever else an
expert can be, is a loop of products (``torch_ipex::tpp_linear``) with everything between them in torch.
"""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core import ExpertsOut, MoEConfig, Routing, Verdict
from moe_core.activations import apply_activation
from moe_core.errors import describe
from moe_core.platform import Platform
from moe_core.reference import expert_norm
from moe_core.types import Plan

from .given import Matrices
from .loop import ExpertLoop
from .onednn import is_plain_swiglu
from .pages import ask_for_huge_pages

DISTRIBUTION: Final = "intel-extension-for-pytorch"
MODULE: Final = "intel_extension_for_pytorch"
SERIES: Final = "2.8."
"""The release that has these operators in this form. It refuses every torch but its own series."""
REMEDY: Final = 'pip install "moe-core[cpu-ipex]" in an environment with torch 2.8'
BLOCK: Final = 64
"""Rows and columns of a block. IPEX packs 16 x 64 itself, which takes more than twice as long at many tokens."""

_failure = ""
_lock = threading.Lock()


class IpexError(Exception):
    """IPEX does not load; the text says why."""


def verdict(platform: Platform) -> Verdict:
    """IPEX 2.8 beside torch 2.8, as the installed packages say, and AVX-512. Imports nothing."""
    version = platform.version(DISTRIBUTION)
    if version is None:
        return Verdict.no(f"{DISTRIBUTION} is not installed", REMEDY)
    if not version.startswith(SERIES) or not platform.torch_version.startswith(SERIES):
        return Verdict.no(
            f"{DISTRIBUTION} {version} beside torch {platform.torch_version}, expected 2.8 of both", REMEDY
        )
    if not platform.cpu_capability.startswith("AVX512"):
        return Verdict.no(
            f"IPEX's block kernels need AVX-512, torch uses {platform.cpu_capability}",
            "leave the choice to the backend",
        )
    if _failure:
        return Verdict.no(_failure, REMEDY)
    return Verdict.yes()


def load() -> None:
    """Import IPEX, which replaces some of torch's own CPU operators in this process: hence at a bind alone.

    Raises:
        IpexError: it does not import, or lacks an operator; the verdict says so from then on.
    """
    global _failure
    with _lock:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of each operator that it replaces
                importlib.import_module(MODULE)
        except Exception as error:  # its check of torch's version exits, its libraries raise whatever they like
            _failure = f"{MODULE} does not import: {describe(error)}"
        else:
            missing = [name for name in ("deepseek_moe_tpp", "tpp_linear") if not hasattr(torch.ops.torch_ipex, name)]
            _failure = f"{MODULE} lacks torch_ipex::{missing[0]}" if missing else ""
        if _failure:
            raise IpexError(_failure)


def blocked(weights: Tensor, spent: Callable[[int], None] = lambda expert: None) -> Tensor:
    """[E, N, K] to [E, N/64, K/64, 64, 64]: blocks with a row for each k; bfloat16 [E, N/64, K/64, 32, 64, 2], for two.

    A copy, always. Rows and columns that fill the last block are zero. ``spent`` is called with each expert.
    """
    experts, rows, columns = weights.shape[0], *(-(-size // BLOCK) for size in weights.shape[1:])
    depth = BLOCK * weights.element_size() // 4  # in words: two neighbours in bfloat16 stay together
    packed = torch.empty(experts, rows, columns, depth, BLOCK, dtype=torch.int32, device="cpu")
    ask_for_huge_pages(packed)
    for expert, (target, weight) in enumerate(zip(packed, weights.detach(), strict=True)):
        whole = F.pad(weight, (0, -weight.shape[1] % BLOCK, 0, -weight.shape[0] % BLOCK)).contiguous()
        target.copy_(whole.view(torch.int32).view(rows, BLOCK, columns, depth).permute(0, 2, 3, 1))
        spent(expert)
    values = packed.view(weights.dtype)
    return values if weights.dtype is torch.float32 else values.unflatten(-1, (BLOCK, 2))


def _widened(x: Tensor) -> Tensor:
    """[n, K] with zeros up to a multiple of 64, contiguous: of anything else the kernels silently compute nonsense."""
    return F.pad(x, (0, -x.shape[1] % BLOCK)).contiguous()


def _repeats(ids: Tensor) -> bool:
    """Whether a row of [n, K] has an id twice."""
    ordered = ids.sort(dim=1).values
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


@dataclass(frozen=True)
class Linear:
    """One product y = x w^T + b."""

    weight: Tensor
    bias: Tensor | None
    width: int

    @classmethod
    def pack(cls, weights: Tensor, biases: Tensor | None, spent: Callable[[int], None]) -> list[Linear]:
        """From [E, N, K] and [E, N], one an expert."""
        each = [None] * len(weights) if biases is None else biases.detach().float()
        return [cls(weight, bias, weights.shape[1]) for weight, bias in zip(blocked(weights, spent), each, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, K] -> [n, N], float32."""
        out = torch.ops.torch_ipex.tpp_linear(_widened(x), self.weight)[:, : self.width].float()
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class PackedExpert:
    """One expert of any kind, a product after the other."""

    config: MoEConfig
    w13: Linear
    w2: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """[n, H] -> [n, H] float32, n > 0."""
        return self.w2(apply_activation(self.config, self.w13(x)).to(x.dtype))


@dataclass(frozen=True)
class FusedExperts:
    """Plain SwiGLU experts in bfloat16, all in one call.

    The operator indexes by ids unchecked: one of no expert ends the process, so it is given rows that have an expert.
    Its threads add an expert's rows without a lock: a token that has the expert twice would lose one of its sums.
    """

    gate: list[Tensor]
    up: list[Tensor]
    down: list[Tensor]
    hidden_size: int

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [n, H], ids and weights [n, K] -> the weighted sum [n, H] in bfloat16."""
        ids, weights = ids.long().contiguous(), weights.to(x.dtype).contiguous()
        out = torch.ops.torch_ipex.deepseek_moe_tpp(
            *(_widened(x), ids, self.gate, self.up, self.down, False, weights, False)
        )
        return out[:, : self.hidden_size]  # type: ignore[no-any-return]

    def routed(self, plan: Plan, x: Tensor, routing: Routing) -> ExpertsOut:
        """[T, H], weighted and summed in float32 (by the operator in bfloat16 where it may do all of it)."""
        config, (weights, ids) = plan.config, routing
        if config.apply_router_weight_on_input:
            x, weights = (x.float() * weights).to(x.dtype), torch.ones_like(weights)
        least, most = (int(found) for found in ids.aminmax()) if ids.numel() else (0, 0)
        whole = config.post_expert_norm_eps is None and least >= 0 and most < config.num_held_experts
        if whole and not _repeats(ids):
            out = self(x, ids, weights)
            return ExpertsOut(out if config.output_scale == 1.0 else out.float() * config.output_scale, True)
        has_expert = (ids >= 0) & (ids < config.num_held_experts)
        # Every row by itself: foreign ids are left out, repeated ones lie apart, and a norm is of one expert's output.
        out = torch.zeros(x.shape[0], self.hidden_size, dtype=torch.float32, device="cpu")
        source, column = has_expert.nonzero(as_tuple=True)
        ones = torch.ones(len(source), 1, dtype=x.dtype, device="cpu")
        y = expert_norm(config, plan.weights.plain, self(x[source], ids[source, column, None], ones).float())
        out.index_add_(0, source, y * weights[source, column, None])
        source, column = ((ids >= config.num_experts) & (ids < config.num_router_outputs)).nonzero(as_tuple=True)
        out.index_add_(0, source, x[source].float() * weights[source, column, None])  # zero experts
        return ExpertsOut(out * config.output_scale, True)

    def shared(self, x: Tensor) -> Tensor:
        """[T, H] through the one expert there is."""
        ids = torch.zeros(x.shape[0], 1, dtype=torch.int64, device="cpu")
        return self(x, ids, torch.ones_like(ids))


class IpexPacker:
    """Packs experts for IPEX, which it imports.

    Raises:
        IpexError: it does not load.
    """

    def __init__(self) -> None:
        load()

    def __call__(self, config: MoEConfig, given: Matrices) -> FusedExperts | ExpertLoop:
        """Tensors, which are only read."""
        w13, w2, b13, b2 = given.w13, given.w2, given.b13, given.b2
        w13_spent, w2_spent = functools.partial(given.spent, "w13"), functools.partial(given.spent, "w2")
        if w13.dtype is torch.bfloat16 and is_plain_swiglu(config) and b13 is None and b2 is None:
            if config.w13_interleaved:
                gate, up = w13[:, 0::2], w13[:, 1::2]
            else:
                gate, up = w13.chunk(2, dim=1)
            parts = (blocked(gate), blocked(up, w13_spent), blocked(w2, w2_spent))
            return FusedExperts(*([*part] for part in parts), hidden_size=w2.shape[1])
        pairs = zip(Linear.pack(w13, b13, w13_spent), Linear.pack(w2, b2, w2_spent), strict=True)
        return ExpertLoop(tuple(PackedExpert(config, up, down) for up, down in pairs))
