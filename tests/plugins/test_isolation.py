"""A broken plugin is shown with its reason and its remedy, and never stops another one."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from moe_core import MoELayer, backends, explain
from moe_core.cli import app
from moe_core.errors import BackendUnavailableError
from moe_core.report import BackendStatus

from .conftest import Distribute, healthy

pytestmark = pytest.mark.filterwarnings("ignore::moe_core.runner.FallbackWarning")  # "good" serves one stage only


@dataclass(frozen=True)
class Fault:
    """One way to be wrong: what the plugin's source is, and what moe_core must say of it."""

    case: str
    source: str
    reason: tuple[str, ...]
    status: str = "broken"


def edited(old: str, new: str) -> str:
    source = healthy("bad")
    assert old in source
    return source.replace(old, new)


EXPERTS = "def moe_experts(plan, hidden_states, routing, router_logits):"
PROBE_BODY = "def moe_probe(platform):\n    return Verdict.yes()"
SUPPORTS_BODY = "def moe_supports(config, stage, platform):\n    return Verdict.yes()"
FAULTS = [
    Fault("syntax error", "def moe_experts(:\n", ("SyntaxError",)),
    Fault("crashing import", "raise ValueError('no luck\\nsecond line')", ("import of plugin_bad_dist", "no luck")),
    Fault("missing dependency", "import not_installed_anywhere", ("ModuleNotFoundError", "not_installed_anywhere")),
    Fault("exit at import", "raise SystemExit(3)", ("SystemExit",)),
    Fault("BaseException at import", "class Odd(BaseException): ...\nraise Odd('out')", ("Odd: out",)),
    Fault("newer hook API", healthy("bad", hook_api=2), ("hook API 2", "has 1"), "incompatible"),
    Fault(
        "newer hook API with a hook that is unknown here",
        healthy("bad", hook_api=2).replace("moe_experts(", "moe_experts_v2("),
        ("hook API 2",),
        "incompatible",
    ),
    Fault(
        "newer hook API with an argument that is unknown here",
        healthy("bad", hook_api=2).replace("router_logits):", "future):"),
        ("hook API 2",),
        "incompatible",
    ),
    Fault("misspelt hook", edited("def moe_experts(", "def moe_exprets("), ("moe_exprets",)),
    Fault(
        "default argument",
        edited(EXPERTS, EXPERTS.replace("router_logits", "router_logits=None")),
        ("moe_experts", "router_logits", "default"),
    ),
    Fault(
        "keyword-only argument",
        edited(EXPERTS, EXPERTS.replace("router_logits", "*, router_logits")),
        ("moe_experts", "router_logits", "keyword-only"),
    ),
    Fault("variadic arguments", edited(EXPERTS, "def moe_experts(*args):"), ("moe_experts", "args")),
    Fault("wrong argument name", edited(EXPERTS, EXPERTS.replace("routing", "routes")), ("moe_experts", "routes")),
    Fault("another name than the entry point's", healthy("other"), ("'other'", "'bad'")),
    Fault("crashing info", edited("return BackendInfo(", "return 1 / 0 or dict("), ("ZeroDivisionError",)),
    Fault("info that exits", edited("return BackendInfo(", "raise SystemExit or dict("), ("SystemExit",)),
    Fault("info of another type", edited("return BackendInfo(", "return dict("), ("moe_backend_info", "BackendInfo")),
    Fault(
        "crashing probe", edited(PROBE_BODY, "def moe_probe(platform):\n    1 / 0"), ("moe_probe", "ZeroDivisionError")
    ),
    Fault("probe that exits", edited(PROBE_BODY, "def moe_probe(platform):\n    raise SystemExit(1)"), ("SystemExit",)),
    Fault("probe returns a bool", edited(PROBE_BODY, "def moe_probe(platform):\n    return True"), ("True", "Verdict")),
    Fault("probe returns nothing", edited(PROBE_BODY, "def moe_probe(platform):\n    pass"), ("None", "Verdict")),
    Fault("no probe", edited("@hookimpl\n" + PROBE_BODY, ""), ("moe_probe is not implemented",), "unavailable"),
    Fault(
        "stages without info", edited("@hookimpl\ndef moe_backend_info", "def moe_backend_info"), ("moe_backend_info",)
    ),
    Fault("no hook at all", "x = 1", ("no hook", "hookimpl")),
]
AT_SELECTION = [
    Fault(
        "crashing supports",
        edited(SUPPORTS_BODY, "def moe_supports(config, stage, platform):\n    raise KeyError('k')"),
        ("moe_supports", "KeyError"),
    ),
    Fault(
        "supports returns a bool",
        edited(SUPPORTS_BODY, "def moe_supports(config, stage, platform):\n    return False"),
        ("False", "Verdict"),
    ),
    Fault("stage without its hook", edited("@hookimpl\n" + EXPERTS, EXPERTS), ("lists stage experts", "moe_experts")),
]


def statuses() -> dict[str, BackendStatus]:
    return {status.name: status for status in backends()}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.case)
def test_a_faulty_plugin_is_listed_and_isolated(fault: Fault, distribute: Distribute, layer: MoELayer) -> None:
    distribute("bad", fault.source)
    distribute("good", healthy("good"))
    bad = statuses()["bad"]
    assert bad.status == fault.status
    for part in fault.reason:
        assert part in bad.reason
    assert "bad" in bad.remedy, "the remedy names the plugin or its distribution"
    assert_shown(fault, layer)
    assert_others_work(layer)


@pytest.mark.parametrize("fault", AT_SELECTION, ids=lambda fault: fault.case)
def test_a_plugin_that_fails_at_selection_is_isolated(fault: Fault, distribute: Distribute, layer: MoELayer) -> None:
    distribute("bad", fault.source)
    distribute("good", healthy("good"))
    assert_shown(fault, layer)
    assert_others_work(layer)


def assert_shown(fault: Fault, layer: MoELayer) -> None:
    """explain, the error of whoever asks for it, and ``moe-core list`` tell the same story."""
    report = explain(layer.config, "cpu", dtype=torch.float32)
    candidate = report.candidate("bad")
    assert candidate is not None
    assert candidate.status == fault.status
    assert candidate.remedy
    with pytest.raises(BackendUnavailableError) as caught:
        explain(layer.config, "cpu", dtype=torch.float32, backend="bad")
    for part in fault.reason:
        assert part in candidate.reason
        assert part in str(report)
        assert part in str(caught.value)
    listed = CliRunner().invoke(app, ["list", "--json"])
    assert listed.exit_code == 0
    assert any(row["name"] == "bad" for row in json.loads(listed.stdout))


def assert_others_work(layer: MoELayer) -> None:
    other = MoELayer(layer.config, backend="good")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(x), layer(x))
    assert other.report.stages["experts"] == "good"
