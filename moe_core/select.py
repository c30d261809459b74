"""Choosing a backend: a pure function from what is installed, asked for and needed to a report."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from .config import MoEConfig
from .errors import (
    AmbiguousBackendError,
    BackendUnavailableError,
    GradientError,
    SelectionError,
    UnknownBackendError,
    describe,
    show,
)
from .platform import Platform
from .plugins import LoadedPlugin, NoAnswer, Registry
from .report import BackendStatus, Candidate, SelectionReport
from .settings import Request, seconds
from .types import PARALLEL_STAGES, TRAIT_DEFAULTS, Verdict

logger = logging.getLogger("moe_core")
REFERENCE = "reference"
PROBE_SECONDS = 30.0
"""How long a probe may take if MOE_CORE_PROBE_TIMEOUT does not say; a cold import of a large dependency takes ten."""
NO_BACKWARD = "has no backward, and gradients may be needed"


def probe(plugin: LoadedPlugin, platform: Platform) -> BackendStatus:
    """Ask one backend whether it is usable on this host."""
    info = plugin.info
    status, reason, remedy = plugin.status, plugin.reason, plugin.remedy
    if status == "ok" and info is None:
        status = "observer"
        reason = f"no backend: it watches {', '.join(sorted({*plugin.wrappers, *plugin.impls}))}"
    elif status == "ok" and "moe_probe" not in plugin.impls:
        status, reason = "unavailable", "moe_probe is not implemented"
        remedy = f"ask the author of {plugin.origin} to implement it"
    elif status == "ok":
        limit = seconds(platform.env, "MOE_CORE_PROBE_TIMEOUT", PROBE_SECONDS)
        verdict = _ask(plugin, "moe_probe", limit, platform=platform)
        if isinstance(verdict, str):
            status, reason, remedy = "broken", verdict, _report_it(plugin)
        elif not verdict.ok:
            status, reason, remedy = "unavailable", verdict.reason, verdict.remedy
    return BackendStatus(
        plugin.name,
        status,
        reason,
        remedy,
        priority=info.priority if info else 0,
        device_types=info.device_types if info else (),
        stages=info.stages if info else (),
        origin=plugin.origin,
        url=info.url if info else None,
    )


def _ask(plugin: LoadedPlugin, hook: str, limit: float = 0.0, **arguments: Any) -> Verdict | str:
    """The verdict, or the text of what went wrong."""
    try:
        verdict = plugin.call_in_time(hook, limit, **arguments)
    except KeyboardInterrupt:
        raise
    except NoAnswer as error:
        return f"{error}; MOE_CORE_PROBE_TIMEOUT sets the seconds"
    except BaseException as error:  # a third party's code; its reason is kept and shown
        logger.debug("%s of %s crashed", hook, plugin.name, exc_info=True)
        return f"{hook} raised {describe(error)}"
    if type(verdict) is not Verdict:
        return f"{hook} returned {show(verdict)}, expected Verdict.yes(...) or Verdict.no(reason, remedy)"
    return verdict


def _report_it(plugin: LoadedPlugin) -> str:
    url = f" ({plugin.info.url})" if plugin.info and plugin.info.url else ""
    return f"report it to the author of {plugin.origin or plugin.name}{url}, or set MOE_CORE_DISABLE={plugin.name}"


def needed_stages(config: MoEConfig, parallel: bool = False) -> tuple[str, ...]:
    """The stages that a layer of this config runs."""
    stages = ["gate", "experts", "reduce"]
    if config.has_shared_experts:
        stages.insert(1, "shared_experts")
    return (*stages, *(PARALLEL_STAGES if parallel else ()))


def assess(
    plugin: LoadedPlugin, config: MoEConfig, platform: Platform, stages: Iterable[str], *, needs_grad: bool, named: bool
) -> Candidate:
    """One backend as a candidate: probe, then each stage. ``named`` lifts the check of the device type."""
    status = probe(plugin, platform)
    if status.status != "ok":
        return Candidate(plugin.name, status.status, status.reason, status.remedy, status.priority)
    info = plugin.info
    assert info is not None
    if not named and platform.device.type not in info.device_types:
        return Candidate(
            plugin.name,
            "other-device",
            f"serves {', '.join(info.device_types)}; the weights are on {platform.device.type}",
            f"move the weights to {info.device_types[0]}" if info.device_types else "",
            info.priority,
        )
    served: list[str] = []
    refused: dict[str, tuple[str, str]] = {}
    traits: dict[str, Mapping[str, Any]] = {}
    for stage in stages:
        if stage not in info.stages:
            continue
        verdict: Verdict | str = Verdict.yes()
        if "moe_supports" in plugin.impls:
            verdict = _ask(plugin, "moe_supports", config=config, stage=stage, platform=platform)
        if isinstance(verdict, str):
            return Candidate(plugin.name, "broken", verdict, _report_it(plugin), info.priority)
        if not verdict.ok:
            refused[stage] = (verdict.reason, verdict.remedy)
        elif verdict.trait("owns_routing") and config.expert_capacity is not None:
            refused[stage] = (
                f"its experts route by themselves, so expert_capacity={config.expert_capacity} cannot be applied",
                "choose a backend with a gate, or leave expert_capacity=None",
            )
        elif needs_grad and not verdict.trait("supports_backward"):
            refused[stage] = (f"{stage} {NO_BACKWARD}", "predict under torch.no_grad()")
        elif f"moe_{stage}" not in plugin.impls:
            return Candidate(
                plugin.name, "broken", f"lists stage {stage} without moe_{stage}", _report_it(plugin), info.priority
            )
        else:
            served.append(stage)
            traits[stage] = {name: verdict.trait(name) for name in TRAIT_DEFAULTS}
    common = {"priority": info.priority, "stages": tuple(served), "refused": refused, "traits": traits}
    if "experts" in refused or not served:
        reason, remedy = refused.get("experts") or next(iter(refused.values()), ("serves no stage of this layer", ""))
        return Candidate(plugin.name, "unsupported", reason, remedy, **common)  # type: ignore[arg-type]
    return Candidate(plugin.name, "ok", **common)  # type: ignore[arg-type]


def select(
    registry: Registry,
    request: Request,
    config: MoEConfig,
    platform: Platform,
    *,
    needs_grad: bool = False,
    parallel: bool = False,
) -> SelectionReport:
    """Choose.

    Raises:
        UnknownBackendError: a requested name is not registered.
        BackendUnavailableError: an explicit backend cannot be used, or a list of names is exhausted.
        GradientError: an explicit backend has no backward and gradients may be needed.
        AmbiguousBackendError: the best usable candidates tie.
    """
    known = registry.names()
    for name in request.names:
        if name not in known:
            raise UnknownBackendError(
                f"backend {name!r} ({request.source}) is not registered; known: {', '.join(sorted(known))}; "
                f"install the package that ships it, or mend the name"
            )
    stages = needed_stages(config, parallel)
    candidates = tuple(
        sorted(
            (
                assess(plugin, config, platform, stages, needs_grad=needs_grad, named=plugin.name in request.names)
                for plugin in registry
                if plugin.is_backend or plugin.status != "ok"
            ),
            key=lambda c: (-c.priority, c.name),
        )
    )
    by_name = {candidate.name: candidate for candidate in candidates}
    purpose = "training" if needs_grad else "inference"

    def report(backend: str, why: str, **more: Any) -> SelectionReport:
        return SelectionReport(
            backend,
            candidates=candidates,
            why=why,
            purpose=purpose,
            device=str(platform.device),
            dtype=str(platform.dtype).removeprefix("torch.") if platform.dtype else "",
            **more,
        )

    wanted = _requested(request, by_name, report, needs_grad) if request.names else None
    if wanted is not None:
        chosen, why = wanted, f"asked for by {request.source}"
    else:
        chosen = _automatic(candidates, report)
        why = f"auto: weights on {platform.device}" + (", gradients may be needed" if needs_grad else "")
        if request.names:
            why += f", which no backend of {request.source} can give"
    served, fallbacks = {}, {}
    for stage in stages:
        served[stage] = chosen.name if stage in chosen.stages else REFERENCE
        if stage == "gate" and chosen.traits.get("experts", {}).get("owns_routing"):
            served[stage] = chosen.name  # by its experts; no gate is built, so none is missing
        elif served[stage] != chosen.name and stage not in PARALLEL_STAGES:
            fallbacks[stage] = chosen.refused.get(stage) or (
                f"{chosen.name} does not implement {stage}",
                f"expect plain-torch speed for {stage}",
            )
    if fallbacks:
        _check_reference(by_name, fallbacks, report)
    entry = chosen.traits.get("experts", {}).get("entry", "python")
    # torch.library ops hide the weights behind a handle, so nothing that must give gradients goes through one.
    entry = "python" if needs_grad else entry
    return report(chosen.name, why, stages=served, fallbacks=fallbacks, entry=entry)


def _check_reference(by_name: Mapping[str, Candidate], fallbacks: Mapping[str, tuple[str, str]], report: Any) -> None:
    reference = by_name[REFERENCE]
    lost = [stage for stage in fallbacks if stage in reference.refused]
    if lost:
        reason, remedy = reference.refused[lost[0]]
        raise BackendUnavailableError(
            f"no backend serves {', '.join(lost)}: {reason}; {remedy}\n{report('', 'none serves every stage')}",
            report("", "none serves every stage"),
        )


def _requested(request: Request, by_name: Mapping[str, Candidate], report: Any, needs_grad: bool) -> Candidate | None:
    """The one asked for; None where a mere preference lacks nothing but a backward, and training goes on without it."""
    for name in request.names:
        candidate = by_name[name]
        if candidate.status == "ok" and not (request.explicit and candidate.refused):
            return candidate
        if request.explicit:
            _refuse(request, candidate, report, needs_grad)
    if needs_grad and any(_lacks_backward(by_name[name]) for name in request.names):
        return None
    failed = report("", f"asked for by {request.source}")
    reasons = "; ".join(f"{name}: {by_name[name].reason} ({by_name[name].remedy})" for name in request.names)
    raise BackendUnavailableError(
        f"none of the backends asked for by {request.source} can be used: {reasons}\n{failed}", failed
    )


def _lacks_backward(candidate: Candidate) -> bool:
    return any(reason.endswith(NO_BACKWARD) for reason, _ in candidate.refused.values())


def _refuse(request: Request, candidate: Candidate, report: Any, needs_grad: bool) -> None:
    failed = report("", f"asked for by {request.source}")
    if candidate.refused:
        stage, (reason, remedy) = next(iter(candidate.refused.items()))
        text = f"stage {stage} refused: {reason}"
        if reason.endswith(NO_BACKWARD):
            raise GradientError(
                f"backend {candidate.name!r} ({request.source}) has no backward for {stage}, and gradients may be "
                f"needed: call it under torch.no_grad(), or leave the choice to moe_core, which then takes a backend "
                f"with a backward\n{failed}",
                failed,
            )
    else:
        text, remedy = f"{candidate.status}: {candidate.reason}", candidate.remedy
    raise BackendUnavailableError(
        f"backend {candidate.name!r} ({request.source}) can't be used, and an explicit choice is never substituted: "
        f"{text}; remedy: {remedy}\n{failed}",
        failed,
    )


def _automatic(candidates: tuple[Candidate, ...], report: Any) -> Candidate:
    usable = [candidate for candidate in candidates if candidate.status == "ok"]
    if not usable:
        failed = report("", "auto: nothing can be used")
        reference = next((c for c in candidates if c.name == REFERENCE), None)
        reason = f": {reference.reason}; {reference.remedy}" if reference else ""
        raise SelectionError(f"no backend supports this layer{reason}\n{failed}", failed)
    best = [candidate for candidate in usable if candidate.priority == usable[0].priority]
    if len(best) > 1:
        failed = report("", "auto: a tie")
        names = ", ".join(candidate.name for candidate in best)
        raise AmbiguousBackendError(
            f"backends {names} are all usable with priority {best[0].priority}: choose one with "
            f"backend={best[0].name!r}, moe_core.configure(backends=[...]) or MOE_CORE_BACKEND\n{failed}",
            failed,
        )
    return best[0]
