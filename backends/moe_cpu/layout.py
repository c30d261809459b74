"""What the CPU backend accepts, and the weights in the layout of the chosen strategy."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_core import ExpertsOut, MoEConfig, MoEWeights, Routing, Verdict
from moe_core.errors import BindError
from moe_core.platform import Platform

from . import strategies
from .ipex import IpexError, IpexPacker
from .native import build
from .native.experts import NativePacker
from .onednn import OneDnnExperts

logger = logging.getLogger("moe_core")


def probe(platform: Platform) -> Verdict:
    """Usable where one of the strategies is, in float32."""
    _, verdict = strategies.choose(dataclasses.replace(platform, dtype=torch.float32))
    return Verdict.yes() if verdict.ok else verdict


def supports(config: MoEConfig, stage: str, platform: Platform) -> Verdict:
    """float32 and bfloat16 where a strategy can; nothing quantised; no backward."""
    if config.quant is not None and stage in ("experts", "shared_experts"):
        return Verdict.no(
            f"no CPU kernel for quantised weights (scheme {config.quant.scheme}) yet", "leave config.quant=None"
        )
    if platform.device.type != "cpu":
        return Verdict.no(f"weights on {platform.device}, expected the CPU", "move the weights with .cpu()")
    if platform.dtype not in (torch.float32, torch.bfloat16, None):
        dtype = str(platform.dtype).removeprefix("torch.")
        return Verdict.no(f"no CPU kernel for {dtype}", "use bfloat16 or float32")
    _, verdict = strategies.choose(platform)
    if verdict.ok and stage not in ("experts", "shared_experts"):
        return Verdict.yes()
    return verdict


class Experts(Protocol):
    """Packed experts of one width."""

    def routed(self, config: MoEConfig, plain: MoEWeights, x: Tensor, routing: Routing) -> ExpertsOut:
        """The experts stage on [T, H]."""

    def shared(self, x: Tensor) -> Tensor:
        """[T, H] through a single expert, unweighted."""


class Packer(Protocol):
    """Packs [E, 2I, H] and [E, H, I] with their biases; ``routed`` tells the routed experts from the shared one."""

    def __call__(
        self, config: MoEConfig, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None, *, routed: bool
    ) -> Experts: ...


@dataclass(frozen=True)
class PackedWeights:
    """The plain weights (the router reads them), the packed experts, and which strategy runs them."""

    plain: MoEWeights
    experts: Experts
    shared: Experts | None
    shared_gate: Tensor | None
    strategies: Mapping[str, str]


def pack(config: MoEConfig, weights: MoEWeights, platform: Platform) -> PackedWeights:
    """Pack every expert; ``weights`` are only read.

    Raises:
        BindError: what was chosen does not load or cannot be built, and no other strategy may serve.
    """
    name, verdict = strategies.choose(platform)
    failure: Exception | None = None
    while name:
        try:
            packer = _packer(name, platform)
            _, verdict = strategies.choose(platform)  # which instructions the compiler takes is known now
            return _packed(config, weights, verdict, packer)
        except (build.BuildError, IpexError) as error:
            failed, failure = name, error
        name, verdict = strategies.choose(platform)  # what failed says no from now on
        if name:
            logger.warning("strategy %s serves, %s could not be had: %s", name, failed, failure)
    raise BindError(f"no kernel for these weights: {verdict.reason}; {verdict.remedy}") from failure


def _packer(name: str, platform: Platform) -> Packer:
    if name == "native":
        return NativePacker(platform)
    return IpexPacker() if name == "ipex" else OneDnnExperts.pack


def _packed(config: MoEConfig, weights: MoEWeights, verdict: Verdict, packer: Packer) -> PackedWeights:
    w13, w2 = weights.w13_weight, weights.w2_weight
    assert w13 is not None and w2 is not None
    experts = packer(config, w13, w2, weights.w13_bias, weights.w2_bias, routed=True)
    shared = None
    if weights.shared_w13_weight is not None and weights.shared_w2_weight is not None:
        one = (weights.shared_w13_weight, weights.shared_w2_weight, weights.shared_w13_bias, weights.shared_w2_bias)
        shared = packer(config, *(None if tensor is None else tensor[None] for tensor in one), routed=False)
    text = verdict.trait("strategy")
    return PackedWeights(
        weights, experts, shared, weights.shared_gate_weight, {"experts": text, "shared_experts": text}
    )
