"""Which code runs the experts: chosen from what is known before anything is built, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moe_core import Verdict
from moe_core.platform import Platform

from . import ipex, onednn
from .native import build

VARIABLE = "MOE_CORE_CPU_STRATEGY"
VECTORS = {
    "AVX2": "AVX2 vectors",
    "AVX512": "AVX-512 vectors",
    "AVX512_BF16": "AVX-512 vectors with products of bfloat16",
    "AMX": "AVX-512 vectors and AMX tiles for bfloat16",
}


def native(platform: Platform) -> Verdict:
    """The kernel of this backend, where a compiler is found and has not failed in this process."""
    reason = build.obstacle(platform.env, platform.cpu_capability)
    if reason:
        return Verdict.no(reason, build.REMEDY)
    found = build.instructions(platform.env, platform.cpu_capability)
    return Verdict.yes(strategy=f"native, {VECTORS.get(found, 'vectors of 128 bits')}")


def blocked(platform: Platform) -> Verdict:
    """IPEX's kernels."""
    verdict = ipex.verdict(platform)
    return Verdict.yes(strategy="ipex") if verdict.ok else verdict


def prepacked(platform: Platform) -> Verdict:
    """oneDNN's products."""
    verdict = onednn.verdict(platform)
    return Verdict.yes(strategy="onednn") if verdict.ok else verdict


STRATEGIES: Mapping[str, Callable[[Platform], Verdict]] = MappingProxyType(
    {"native": native, "ipex": blocked, "onednn": prepacked}
)
"""Name -> whether it can serve; the first that can is taken: the fastest, by docs/cpu.md."""


CODED = ("native",)
"""Strategies that can compute with quantised weights."""


def choose(platform: Platform, coded: bool = False) -> tuple[str, Verdict]:
    """The strategy's name and a verdict whose trait says which and why; an empty name where there is none.

    ``coded``: for quantised weights.
    """
    asked = platform.env.get(VARIABLE, "").strip()
    if asked in STRATEGIES and coded and asked not in CODED:
        reason = f"strategy {asked} has no kernel for quantised weights ({VARIABLE}={asked})"
        return "", Verdict.no(reason, f"unset {VARIABLE}, or set {' or '.join(CODED)}")
    if asked:
        if asked not in STRATEGIES:
            return "", Verdict.no(
                f"{VARIABLE}={asked!r} is no strategy", f"unset it, or set one of {', '.join(STRATEGIES)}"
            )
        verdict = STRATEGIES[asked](platform)
        if not verdict.ok:
            return "", Verdict.no(f"{verdict.reason} ({VARIABLE}={asked})", f"{verdict.remedy}; or unset {VARIABLE}")
        return asked, Verdict.yes(strategy=f"{verdict.trait('strategy')} (asked for by {VARIABLE})")
    refused: list[tuple[str, Verdict]] = []
    for name in CODED if coded else STRATEGIES:
        verdict = STRATEGIES[name](platform)
        if verdict.ok:
            why = "; ".join(f"not {other}: {no.reason}; {no.remedy}" for other, no in refused)
            strategy = verdict.trait("strategy")
            return name, Verdict.yes(strategy=f"{strategy} ({why})" if why else strategy)
        refused.append((name, verdict))
    reasons = "; ".join(f"{name}: {no.reason}" for name, no in refused)
    return "", Verdict.no(reasons, "; or ".join(no.remedy for _, no in refused))
