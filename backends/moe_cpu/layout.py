"""What the CPU backend accepts, and the weights in the layout of the chosen strategy."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_core import ExpertsOut, MoEConfig, MoEWeights, Routing, Verdict
from moe_core.errors import BindError
from moe_core.platform import Platform
from moe_core.quant import matrices
from moe_core.types import Plan
from moe_core.weights import layer_dtype

from . import strategies
from .given import Matrices
from .ipex import IpexError, IpexPacker
from .native import build
from .native.codes import SCHEMES, Coded
from .native.experts import NativePacker
from .onednn import OneDnnExperts

logger = logging.getLogger("moe_core")


def probe(platform: Platform) -> Verdict:
    """Usable where one of the strategies is, in float32."""
    _, verdict = strategies.choose(dataclasses.replace(platform, dtype=torch.float32))
    return Verdict.yes() if verdict.ok else verdict


def supports(config: MoEConfig, stage: str, platform: Platform) -> Verdict:
    """float32 and bfloat16 where a strategy can; of quantised weights those whose activations are not; no backward."""
    schemes = coded_schemes(config) if stage in ("experts", "shared_experts") else ()
    if unknown := [scheme for scheme in schemes if scheme not in SCHEMES]:
        return Verdict.no(
            f"no CPU kernel for quantised activations (scheme {unknown[0]})",
            f"use one of {', '.join(SCHEMES)}, or moe_core.quant.dequantise",
        )
    if platform.device.type != "cpu":
        return Verdict.no(f"weights on {platform.device}, expected the CPU", "move the weights with .cpu()")
    if platform.dtype not in (torch.float32, torch.bfloat16, None):
        dtype = str(platform.dtype).removeprefix("torch.")
        return Verdict.no(f"no CPU kernel for {dtype}", "use bfloat16 or float32")
    _, verdict = strategies.choose(platform, coded=bool(schemes))
    if verdict.ok and stage not in ("experts", "shared_experts"):
        return Verdict.yes()
    return verdict


def coded_schemes(config: MoEConfig) -> tuple[str, ...]:
    """The schemes of the layer's quantised matrices, routed ones first."""
    return tuple(dict.fromkeys(matrix.scheme_name for matrix in matrices(config).values()))


class Experts(Protocol):
    """Packed experts of one width."""

    def routed(self, plan: Plan, x: Tensor, routing: Routing) -> ExpertsOut:
        """The experts stage on [T, H]."""

    def shared(self, x: Tensor) -> Tensor:
        """[T, H] through a single expert, unweighted."""


class Packer(Protocol):
    """A strategy's."""

    def __call__(self, config: MoEConfig, given: Matrices) -> Experts: ...


@dataclass(frozen=True)
class PackedWeights:
    """The plain weights (the router reads them), the packed experts, and which strategy runs them."""

    plain: MoEWeights
    experts: Experts
    shared: Experts | None
    shared_gate: Tensor | None
    strategies: Mapping[str, str]


def pack(config: MoEConfig, weights: MoEWeights, platform: Platform) -> PackedWeights:
    """Pack every expert; ``weights`` are only read, and released one by one.

    Raises:
        BindError: what was chosen does not load or cannot be built, and no other strategy may serve.
    """
    coded = bool(coded_schemes(config))
    name, verdict = strategies.choose(platform, coded)
    failure: Exception | None = None
    while name:
        try:
            packer = _packer(name, platform)
            _, verdict = strategies.choose(platform, coded)  # which instructions the compiler takes is known now
            return _packed(config, weights, verdict, packer)
        except (build.BuildError, IpexError) as error:
            failed, failure = name, error
        name, verdict = strategies.choose(platform, coded)  # what failed says no from now on
        if name:
            logger.warning("strategy %s serves, %s could not be had: %s", name, failed, failure)
    raise BindError(f"no kernel for these weights: {verdict.reason}; {verdict.remedy}") from failure


def _packer(name: str, platform: Platform) -> Packer:
    if name == "native":
        return NativePacker(platform)
    return IpexPacker() if name == "ipex" else OneDnnExperts.pack


def _packed(config: MoEConfig, weights: MoEWeights, verdict: Verdict, packer: Packer) -> PackedWeights:
    def spent(matrix: str, expert: int) -> None:
        weights.release(f"{matrix}_weight", expert)

    def shared_spent(matrix: str, expert: int) -> None:
        weights.release(f"shared_{matrix}_weight")

    routed = (_matrix(config, weights, field) for field in ("w13_weight", "w2_weight"))
    experts = packer(config, Matrices(*routed, weights.w13_bias, weights.w2_bias, True, spent))
    shared = None
    if weights.shared_w13_weight is not None:
        pair = (_matrix(config, weights, field) for field in ("shared_w13_weight", "shared_w2_weight"))
        biases = (weights.shared_w13_bias, weights.shared_w2_bias)
        biases = (None if bias is None else bias[None] for bias in biases)
        shared = packer(config, Matrices(*pair, *biases, False, shared_spent))
    text = verdict.trait("strategy")
    return PackedWeights(
        weights, experts, shared, weights.shared_gate_weight, {"experts": text, "shared_experts": text}
    )


def _matrix(config: MoEConfig, weights: MoEWeights, field: str) -> Any:
    """[E, N, K], plain in the layer's dtype or as codes; a shared one is one expert."""
    coded = Coded.of(config, weights, field)
    if coded is not None:
        return coded
    plain = getattr(weights, field)
    plain = plain[None] if field.startswith("shared_") else plain
    return plain if config.quant is None else plain.to(layer_dtype(config, weights))
