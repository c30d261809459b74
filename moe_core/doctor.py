"""doctor: one tiny layer on every usable backend, compared with the reference."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .api import backends, explain
from .config import MoEConfig
from .errors import MoECoreError
from .layer import MoELayer
from .platform import Platform, device_of
from .plugins import registry
from .runner import FallbackWarning, MoERunner
from .settings import requested
from .testing.tolerances import tolerance
from .types import STAGES


@dataclass(frozen=True)
class Check:
    """The outcome for one backend: ``status`` is pass, FAIL or why it did not run, ``advice`` what makes it faster."""

    backend: str
    status: str
    detail: str
    remedy: str = ""
    error: float | None = None
    advice: tuple[str, ...] = ()


def tiny_config() -> MoEConfig:
    """Small, but with every stage: groups, bias, shared experts and their gate."""
    return MoEConfig(
        64,
        32,
        8,
        2,
        scoring_func="sigmoid",
        renormalize=True,
        e_score_correction_bias=True,
        num_expert_group=4,
        topk_group=2,
        group_score="top2_sum",
        routed_scaling_factor=2.5,
        shared_intermediate_size=48,
        shared_expert_gate=True,
    )


def examine() -> list[Check]:
    """Run the tiny layer on every backend that says it is usable."""
    return [
        _examine(status.name, status.status, status.reason, status.remedy, status.device_types) for status in backends()
    ]


def _examine(name: str, status: str, reason: str, remedy: str, device_types: tuple[str, ...]) -> Check:
    if status != "ok":
        return Check(name, status, reason, remedy)
    device = device_of(device_types)
    generator_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        layer = MoELayer(tiny_config()).to(device)  # random numbers of the CPU: the same layer on every device
        x = torch.randn(17, 64).to(device)
        # What the reference serves instead is no news here: the detail names the backend's own stages.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            expected = MoERunner(layer.config, layer.weights(), backend="reference")(x)
            runner = MoERunner(layer.config, layer.weights(), backend=name)
            error = float((runner(x) - expected).norm() / expected.norm())
    except MoECoreError as problem:
        return Check(name, "FAIL", str(problem).splitlines()[0], "see the message")
    except Exception as problem:  # a backend's own crash is what doctor is there to show
        return Check(name, "FAIL", f"{type(problem).__name__}: {problem}", "report it to the backend's author")
    finally:
        torch.random.set_rng_state(generator_state)
    allowed = tolerance(torch.float32, "layer")
    if not error <= allowed:
        return Check(
            name,
            "FAIL",
            f"relative error {error:.1e} against the reference, allowed {allowed:.0e}",
            f"do not use it: MOE_CORE_DISABLE={name}",
            error,
        )
    served = [stage for stage in STAGES if runner.report.stages.get(stage) == name]
    detail = f"relative error {error:.1e} on {device} · {' '.join(served)}"
    return Check(name, "pass", detail, "", error, _advice(name, device))


def _advice(name: str, device: torch.device) -> tuple[str, ...]:
    """What the backend says; its own crash is what doctor is there to show."""
    plugin = registry().plugins[name]
    if "moe_advise" not in plugin.impls:
        return ()
    try:
        return tuple(plugin.call("moe_advise", platform=Platform.detect(device, torch.float32)))
    except Exception as problem:
        return (f"its advice failed: {type(problem).__name__}: {problem}; report it to the backend's author",)


def automatic_choice() -> str:
    """What selection takes for the tiny layer: on the default device, or where the backend asked for has its."""
    asked = requested(None).names
    devices = [device_of(status.device_types) for status in backends() if status.name in asked[:1]]
    return explain(tiny_config(), devices[0] if devices else None, dtype=torch.float32).backend


def as_json(checks: list[Check], chosen: str, expected: str | None) -> dict[str, Any]:
    """The machine-readable form."""
    return {
        "automatic": chosen,
        "expected": expected,
        "ok": is_healthy(checks, chosen, expected),
        "backends": [asdict(check) for check in checks],
    }


def is_healthy(checks: list[Check], chosen: str, expected: str | None) -> bool:
    """No usable backend failed, and the automatic choice is the expected one."""
    return all(check.status != "FAIL" for check in checks) and expected in (None, chosen)
