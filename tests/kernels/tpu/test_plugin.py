"""The backend's own account: where it is usable, what it refuses, and that doctor finds XLA's device."""

from __future__ import annotations

import pytest
import torch

from moe_core import MoEConfig, QuantConfig, doctor
from moe_core.platform import Platform, default_device
from moe_tpu import layout

CONFIG = MoEConfig(32, 24, 8, 2)


def platform(device: str = "xla", dtype: torch.dtype = torch.bfloat16, **packages: str | None) -> Platform:
    found = {"torch_xla": "2.9.0", "torch_tpu": None, **packages}
    return Platform(torch.device("cpu") if device == "tpu" else torch.device(device), dtype, packages=found)


def test_probe_says_what_is_missing() -> None:
    absent = layout.probe(platform(torch_xla=None))
    assert not absent.ok
    assert "torch_xla is not installed" in absent.reason
    assert "moe-core[tpu]" in absent.remedy
    other = layout.probe(platform(torch_xla=None, torch_tpu="0.1"))
    assert "torch_tpu" in other.reason
    assert layout.probe(platform()).ok


def test_probe_does_not_wait_for_a_tpu_that_is_not_there() -> None:
    asked = Platform(torch.device("xla"), packages={"torch_xla": "2.9.0"}, env={"PJRT_DEVICE": "TPU"})
    verdict = layout.probe(asked)
    assert not verdict.ok
    assert "no TPU" in verdict.reason
    assert "PJRT_DEVICE=CPU" in verdict.remedy


@pytest.mark.parametrize(
    ("config", "where", "reason"),
    [
        (CONFIG, platform("cpu"), "weights on cpu"),
        (CONFIG, platform(dtype=torch.float16), "float16"),
        (MoEConfig(32, 24, 8, 2, quant=QuantConfig("mxfp4")), platform(), "mxfp4"),
    ],
)
def test_refusals_have_reasons(config: MoEConfig, where: Platform, reason: str) -> None:
    verdict = layout.supports(config, "experts", where)
    assert not verdict.ok
    assert reason in verdict.reason


def test_doctor_runs_the_layer_on_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_BACKEND", "tpu")
    check = next(check for check in doctor.examine() if check.backend == "tpu")
    assert check.status == "pass"
    assert "xla:0" in check.detail
    assert doctor.automatic_choice() == "tpu"


def test_jax_is_no_device_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchax, which call_jax imports, registers the device type ``jax`` with torch, and no operators for it."""
    import torchax  # noqa: F401

    monkeypatch.delenv("MOE_CORE_BACKEND", raising=False)
    assert str(torch.accelerator.current_accelerator()) == "jax"
    assert default_device() == torch.device("cpu")
    assert doctor.automatic_choice() in ("cpu", "reference")
