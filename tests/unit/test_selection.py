"""Selection as a table: who is installed, what is asked for, and who is chosen or why nobody is."""

from __future__ import annotations

import contextlib
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from moe_core import BackendInfo, MoEConfig, MoELayer, Verdict, configure, explain, hookimpl, reference, use_backend
from moe_core.errors import (
    AmbiguousBackendError,
    BackendUnavailableError,
    GradientError,
    SelectionError,
    SettingError,
    UnknownBackendError,
)
from moe_core.platform import Platform
from moe_core.plugins import LoadedPlugin, Registry, check_plugin
from moe_core.report import SelectionReport
from moe_core.select import select
from moe_core.settings import Request

CONFIG = MoEConfig(32, 24, 8, 2, shared_intermediate_size=40)


def plugin(
    name: str,
    priority: int = 10,
    *,
    devices: tuple[str, ...] = ("cpu",),
    usable: bool = True,
    backward: bool = False,
    refuses: tuple[str, ...] = (),
    stages: tuple[str, ...] = ("experts",),
) -> LoadedPlugin:
    """A backend that answers as told; its stages are never run here."""

    def probe() -> Verdict:
        return Verdict.yes() if usable else Verdict.no(f"{name} lacks a part", f"install {name}")

    def supports(stage: str) -> Verdict:
        return Verdict.no("too round", "flatten it") if stage in refuses else Verdict.yes(supports_backward=backward)

    def never() -> None:
        raise AssertionError("selection runs no stage")

    info = BackendInfo(name=name, priority=priority, device_types=devices, stages=stages)
    hooks = {"moe_backend_info": lambda: info, "moe_probe": probe, "moe_supports": supports}
    hooks |= {f"moe_{stage}": never for stage in stages}
    return check_plugin(SimpleNamespace(**{hook: hookimpl(function) for hook, function in hooks.items()}), name)


def choose(
    *plugins: LoadedPlugin, request: Request | None = None, device: str = "cpu", needs_grad: bool = False
) -> SelectionReport:
    installed = Registry([check_plugin(reference, "reference"), *plugins])
    platform = Platform(torch.device(device), torch.float32)
    return select(installed, request or Request(), CONFIG, platform, needs_grad=needs_grad)


def argument(name: str) -> Request:
    return Request((name,), "argument")


def environment(*names: str) -> Request:
    return Request(names, "MOE_CORE_BACKEND")


LOW, HIGH = plugin("low", 10), plugin("high", 20)
GPU = plugin("gpu", 30, devices=("cuda",))
ABSENT = plugin("absent", 90, usable=False)
PICKY = plugin("picky", 50, refuses=("experts",))
NARROW = plugin("narrow", 50, stages=("experts", "reduce"), refuses=("reduce",))
TRAINER = plugin("trainer", 5, backward=True)

CHOSEN = [
    ("nothing but the reference", (), {}, "reference"),
    ("any backend ranks above it", (LOW,), {}, "low"),
    ("highest priority", (LOW, HIGH), {}, "high"),
    ("install order means nothing", (HIGH, LOW), {}, "high"),
    ("an unusable one is passed over", (ABSENT, LOW), {}, "low"),
    ("one for another device is passed over", (GPU, LOW), {}, "low"),
    ("the device of the weights decides", (GPU, LOW), {"device": "cuda"}, "gpu"),
    ("the reference serves any device", (LOW,), {"device": "xpu"}, "reference"),
    ("one that refuses experts is passed over", (PICKY, LOW), {}, "low"),
    ("one that refuses another stage is not", (NARROW, LOW), {}, "narrow"),
    ("gradients need a backward", (HIGH, TRAINER), {"needs_grad": True}, "trainer"),
    ("the reference always has one", (HIGH,), {"needs_grad": True}, "reference"),
    ("by argument", (LOW, HIGH), {"request": argument("low")}, "low"),
    ("by argument: the reference", (LOW, HIGH), {"request": argument("reference")}, "reference"),
    ("asked for by name, only the probe counts", (GPU,), {"request": argument("gpu")}, "gpu"),
    ("a list: its first", (LOW, HIGH), {"request": environment("low", "high")}, "low"),
    ("a list: its first usable", (ABSENT, LOW, HIGH), {"request": environment("absent", "low")}, "low"),
    ("a list without a backward", (HIGH,), {"request": environment("high"), "needs_grad": True}, "reference"),
    (
        "a list that ends with one",
        (HIGH, TRAINER),
        {"request": environment("high", "trainer"), "needs_grad": True},
        "trainer",
    ),
    ("a tie below the best", (LOW, plugin("low2", 10), HIGH), {}, "high"),
    ("a tie of unusable ones", (plugin("a", 20, usable=False), HIGH), {}, "high"),
]
REFUSED = [
    ("tie", (LOW, plugin("low2", 10)), {}, AmbiguousBackendError, ("low, low2", "priority 10", "MOE_CORE_BACKEND")),
    ("unknown", (LOW,), {"request": argument("lwo")}, UnknownBackendError, ("'lwo'", "known: low, reference")),
    ("unknown in a list", (LOW,), {"request": environment("low", "lwo")}, UnknownBackendError, ("'lwo'", "known: low")),
    (
        "unavailable",
        (ABSENT, LOW),
        {"request": argument("absent")},
        BackendUnavailableError,
        ("absent lacks a part", "install absent", "never substituted"),
    ),
    (
        "experts refused",
        (PICKY, LOW),
        {"request": argument("picky")},
        BackendUnavailableError,
        ("experts", "too round", "flatten it"),
    ),
    (
        "another stage refused",
        (NARROW, LOW),
        {"request": argument("narrow")},
        BackendUnavailableError,
        ("reduce", "too round", "flatten it"),
    ),
    (
        "no backward",
        (HIGH,),
        {"request": argument("high"), "needs_grad": True},
        GradientError,
        ("high", "torch.no_grad()"),
    ),
    (
        "an exhausted list",
        (ABSENT, PICKY),
        {"request": environment("absent", "picky")},
        BackendUnavailableError,
        ("absent lacks a part", "install absent", "too round", "MOE_CORE_BACKEND"),
    ),
]


@pytest.mark.parametrize(("plugins", "how", "name"), [row[1:] for row in CHOSEN], ids=[row[0] for row in CHOSEN])
def test_chosen(plugins: tuple[LoadedPlugin, ...], how: dict, name: str) -> None:
    report = choose(*plugins, **how)
    assert report.backend == name
    assert report.stages["experts"] == name
    assert {candidate.name for candidate in report.candidates} == {"reference", *(p.name for p in plugins)}
    assert name in str(report)


@pytest.mark.parametrize(
    ("plugins", "how", "error", "texts"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(plugins: tuple[LoadedPlugin, ...], how: dict, error: type[SelectionError], texts: tuple) -> None:
    with pytest.raises(error) as caught:
        choose(*plugins, **how)
    for text in texts:
        assert text in str(caught.value)
    if error is not UnknownBackendError:
        assert caught.value.report is not None
        for candidate in caught.value.report.candidates:
            assert candidate.name in str(caught.value), "the error prints the whole table"


def test_stages_that_are_missing_or_refused_come_from_the_reference_and_are_reported() -> None:
    report = choose(NARROW)
    assert report.stages == {
        "gate": "reference",
        "shared_experts": "reference",
        "experts": "narrow",
        "reduce": "reference",
    }
    assert report.fallbacks["reduce"] == ("too round", "flatten it")
    assert "does not implement gate" in report.fallbacks["gate"][0]
    assert choose(LOW, request=argument("low")).stages["gate"] == "reference", "missing is not refused"


def test_every_candidate_says_why_not() -> None:
    report = choose(LOW, GPU, ABSENT, PICKY)
    for name, status in (("gpu", "other-device"), ("absent", "unavailable"), ("picky", "unsupported")):
        candidate = report.candidate(name)
        assert candidate is not None
        assert candidate.status == status
        assert candidate.reason
        assert candidate.remedy
        assert candidate.reason in str(report)
        assert candidate.remedy in str(report)


# The order of settings, on the installed backends.


def asked() -> tuple[str, str]:
    report = explain(CONFIG, "cpu", dtype=torch.float32)
    return report.backend, report.why


def test_argument_beats_use_backend_beats_configure_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked()[1].startswith("auto")
    monkeypatch.setenv("MOE_CORE_BACKEND", "reference")
    assert asked() == ("reference", "asked for by MOE_CORE_BACKEND")
    configure(backends=["cpu"])
    assert asked() == ("cpu", "asked for by configure")
    with use_backend("reference"):
        assert asked() == ("reference", "asked for by use_backend")
        with use_backend("cpu"):
            assert asked() == ("cpu", "asked for by use_backend")
        assert asked()[0] == "reference"
        report = explain(CONFIG, "cpu", dtype=torch.float32, backend="cpu")
        assert (report.backend, report.why) == ("cpu", "asked for by argument")
    assert asked() == ("cpu", "asked for by configure")
    configure()
    assert asked()[0] == "reference"


def test_the_environment_is_read_at_bind_and_a_bind_keeps_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_BACKEND", " reference , cpu ")
    with torch.no_grad():
        layer = MoELayer(CONFIG)
        assert layer.report.backend == "reference"
        monkeypatch.setenv("MOE_CORE_BACKEND", "cpu,reference")
        assert layer.report.backend == "reference"
        layer(torch.randn(2, 32))
        assert MoELayer(CONFIG).report.backend == "cpu"


def test_a_preference_that_cannot_train_does_not_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_BACKEND", "cpu")
    layer = MoELayer(CONFIG)
    layer(torch.randn(2, 32)).sum().backward()
    assert layer.w13_weight.grad is not None
    assert layer.report.backend == "cpu"
    assert layer.report.training is not None
    assert layer.report.training.backend == "reference"
    assert "MOE_CORE_BACKEND" in layer.report.training.why


@pytest.mark.parametrize("where", ["argument", "use_backend", "configure", "environment"])
def test_an_unknown_name_lists_the_known(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as settings:
        if where == "use_backend":
            settings.enter_context(use_backend("tpuu"))
        elif where == "configure":
            configure(backends=["tpuu"])
        elif where == "environment":
            monkeypatch.setenv("MOE_CORE_BACKEND", "tpuu")
        with pytest.raises(UnknownBackendError, match=r"'tpuu'.*known: .*cpu.*reference.*tpu"):
            explain(CONFIG, backend="tpuu" if where == "argument" else None)


@pytest.mark.parametrize("backends", ["cpu", [""], [None], [3]])
def test_a_setting_that_is_no_name_is_refused_at_once(backends: object) -> None:
    with pytest.raises(SettingError, match="expected a"):
        configure(backends=backends)  # type: ignore[arg-type]


def test_threads_do_not_see_each_others_use_backend() -> None:
    inside, seen = threading.Barrier(3), {}

    def work(name: str) -> None:
        with use_backend(name):
            inside.wait(10)
            seen[name] = asked()[0]
            inside.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "cpu")]
    for thread in threads:
        thread.start()
    inside.wait(10)
    seen["outside"] = asked()[1].split(":")[0]
    inside.wait(10)
    for thread in threads:
        thread.join()
    assert seen == {"reference": "reference", "cpu": "cpu", "outside": "auto"}


def test_one_line_at_bind_says_what_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moe_core"), torch.no_grad():
        backend = MoELayer(CONFIG).report.backend
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert f"backend {backend} (auto" in line
    assert "gate" in line
