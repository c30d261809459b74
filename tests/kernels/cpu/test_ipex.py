"""The ipex strategy: its layout and refusals anywhere, what it computes where IPEX is installed."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from moe_core import MoEConfig, MoERunner, Pending, Routing, explain, reference
from moe_core.errors import BackendUnavailableError
from moe_core.platform import Platform
from moe_core.testing.cases import EXPERT_VARIANTS, ROUTER_FAMILIES, random_weights
from moe_core.testing.tolerances import tolerance
from moe_core.types import Plan
from moe_cpu import ipex, layout, strategies

DTYPES = [torch.float32, torch.bfloat16]
HERE = ipex.verdict(Platform.detect("cpu"))
needs_ipex = pytest.mark.skipif(not HERE.ok, reason=HERE.reason)


def platform(**changes: Any) -> Platform:
    """A machine that has all that the strategy needs, and no compiler."""
    facts = {"torch_version": "2.8.0+cpu", "cpu_capability": "AVX512", "packages": {ipex.DISTRIBUTION: "2.8.0"}}
    facts |= {"env": {"PATH": "/nowhere"}}
    return Platform(torch.device("cpu"), torch.float32, **{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"packages": {ipex.DISTRIBUTION: None}}, "intel-extension-for-pytorch is not installed"),
        ({"torch_version": "2.9.0"}, "2.8.0 beside torch 2.9.0, expected 2.8 of both"),
        ({"packages": {ipex.DISTRIBUTION: "2.7.0"}}, "2.7.0 beside torch 2.8.0"),
        ({"cpu_capability": "AVX2"}, "need AVX-512, torch uses AVX2"),
    ],
)
def test_who_can_serve(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipex, "_failure", "")
    verdict = ipex.verdict(platform(**changes))
    assert verdict.ok == (not reason) and reason in verdict.reason and bool(verdict.remedy) == bool(reason)


def test_an_import_that_fails_costs_only_the_strategy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one serves, log and verdict say why, and IPEX is not tried again."""
    monkeypatch.setattr(ipex, "MODULE", "no_such_module")
    monkeypatch.setattr(ipex, "_failure", "")
    config = MoEConfig(32, 24, 4, 2)
    name, verdict = strategies.choose(platform())
    assert name == "ipex" and "not native: no C++ compiler" in verdict.trait("strategy")
    with caplog.at_level(logging.WARNING, logger="moe_core"):
        packed = layout.pack(config, random_weights(config), platform())
    assert packed.strategies["experts"].startswith("onednn (not native: ")
    assert "not ipex: no_such_module does not import" in packed.strategies["experts"]
    assert "strategy onednn serves, ipex could not be had: no_such_module" in caplog.text
    assert strategies.choose(platform())[0] == "onednn"


@pytest.mark.skipif(HERE.ok, reason="IPEX is installed")
def test_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_CPU_STRATEGY", "ipex")
    config = MoEConfig(32, 24, 4, 2)
    with pytest.raises(BackendUnavailableError, match="MOE_CORE_CPU_STRATEGY=ipex"):
        MoERunner(config, random_weights(config), backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_keep_every_number(dtype: torch.dtype) -> None:
    """Read back, they hold the weights, and zeros behind them."""
    weights = torch.randn(3, 70, 130).to(dtype).transpose(1, 2)
    packed = ipex.blocked(weights)
    plain = packed if dtype is torch.float32 else packed.transpose(-1, -2).flatten(3, 4)
    assert plain.shape == (3, 3, 2, 64, 64) and packed.is_contiguous()
    found = plain.permute(0, 1, 4, 2, 3).reshape(3, 192, 128)
    assert torch.equal(found[:, :130, :70], weights) and not found[:, 130:].any() and not found[:, :, 70:].any()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("MOE_CORE_CPU_STRATEGY", "ipex")
    return Platform.detect("cpu", torch.float32)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@needs_ipex
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [*EXPERT_VARIANTS, "zero_experts", "output_scaled", "whole_blocks"])
def test_every_variant(asked: Platform, variant: str, dtype: torch.dtype) -> None:
    """Every token with its experts; some without one or with a foreign one; strided rows; none at all."""
    more: dict[str, Any] = {
        "zero_experts": ROUTER_FAMILIES["softmax_bias_zero_experts"],
        "output_scaled": {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
        "whole_blocks": {"hidden_size": 128, "intermediate_size": 192},
    }
    fields = {"hidden_size": 45, "intermediate_size": 37, "num_experts": 5, "top_k": 2}
    config = MoEConfig(**{**fields, **{**EXPERT_VARIANTS, **more}[variant]})
    weights = random_weights(config, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in weights.named_tensors()}
    packed = layout.pack(config, weights, asked)
    assert packed.strategies["experts"].startswith("ipex")
    plan = Plan(config, weights, torch.device("cpu"), torch.float32)
    served = dataclasses.replace(plan, weights=packed)

    def check(x: torch.Tensor, routing: Routing) -> None:
        found = packed.experts.routed(served, x, routing)
        expected = reference.moe_reduce(plan, routing, reference.moe_experts(plan, x, routing), Pending(None))
        assert found.reduced and error(found.value, expected) <= tolerance(dtype, "experts")

    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(23, config.num_experts, generator=generator).argsort(dim=1)[:, : config.top_k].int()
    routing = Routing(torch.rand(23, config.top_k, generator=generator), ids)
    x = torch.randn(23, config.hidden_size, generator=generator).to(dtype)
    check(x, routing)
    check(x.t().contiguous().t(), routing)
    check(3 * x, routing)  # where an approximated activation is farthest off
    ids[3], ids[4:9, 0], ids[9, 0] = -1, -1, 2**31 - 1
    if variant == "zero_experts":
        ids[9:12, 0] = config.num_experts + 1
    check(x, routing)
    assert packed.experts.routed(served, x[:0], Routing(routing.topk_weights[:0], ids[:0])).value.shape[0] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.named_tensors())


@needs_ipex
def test_a_token_that_has_an_expert_twice(asked: Platform) -> None:
    """The operator's threads would lose one of its two sums in some calls, so it is never given such rows."""
    config = MoEConfig(32, 48, 8, 2)
    weights = random_weights(config, dtype=torch.bfloat16)
    packed, plan = layout.pack(config, weights, asked), Plan(config, weights, torch.device("cpu"), torch.float32)
    served = dataclasses.replace(plan, weights=packed)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    routing = Routing(torch.rand(9, 2, generator=torch.Generator().manual_seed(2)), torch.full((9, 2), 3).int())
    expected = reference.moe_reduce(plan, routing, reference.moe_experts(plan, x, routing), Pending(None))
    found = [packed.experts.routed(served, x, routing).value for _ in range(500)]
    assert max(error(out, expected) for out in found) <= tolerance(torch.bfloat16, "experts")


@needs_ipex
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_with_shared_experts(asked: Platform, dtype: torch.dtype) -> None:
    """explain names the strategy without importing it; the bound layer has it for both kinds of experts."""
    config = MoEConfig(96, 80, 8, 3, shared_intermediate_size=56, scoring_func="sigmoid", renormalize=True)
    weights = random_weights(config, dtype=dtype)
    report = explain(config, dtype=dtype)
    assert report.strategies["experts"] == "ipex (asked for by MOE_CORE_CPU_STRATEGY)"
    runner = MoERunner(config, weights, backend="cpu")
    assert runner.report.strategies == report.strategies
    x = torch.randn(17, 96).to(dtype)
    expected = MoERunner(config, weights, backend="reference")(x)
    assert error(runner(x), expected) <= tolerance(dtype, "layer")
    assert torch.equal(runner(x), runner(x))


@needs_ipex
def test_float16_is_refused(asked: Platform) -> None:
    config = MoEConfig(32, 24, 4, 2)
    with pytest.raises(BackendUnavailableError, match="no CPU kernel for float16"):
        MoERunner(config, random_weights(config, dtype=torch.float16), backend="cpu")


def test_nothing_is_imported_to_ask() -> None:
    """Neither by the import of the backend nor by its verdict."""
    code = (
        "import sys\nfrom moe_core import MoEConfig, explain\nimport moe_cpu.layout\n"
        f"explain(MoEConfig(32, 24, 4, 2))\nassert {ipex.MODULE!r} not in sys.modules"
    )
    env = {**os.environ, "MOE_CORE_CPU_STRATEGY": "ipex" if HERE.ok else ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=200)
