"""Buckets: a bounded number of graphs, inert padding, and counts that the report shows."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch_xla
from xla_helpers import on_device, reference_of, relative_error

from moe_core import MoEConfig, MoERunner
from moe_core.errors import InputError
from moe_core.testing.cases import SHARED_VARIANTS, SIZES, random_weights
from moe_core.testing.tolerances import tolerance
from moe_tpu.buckets import Bucketed, bucket_of, buckets_up_to, pad_rows

CONFIG = MoEConfig(**{**SIZES, **SHARED_VARIANTS["shared_gate"], "renormalize": True})
Counted = Callable[[], tuple[int, int, list[str]]]


@pytest.fixture(scope="module")
def runner(device: torch.device) -> MoERunner:
    return MoERunner(CONFIG, on_device(random_weights(CONFIG), device), backend="tpu")


def test_buckets_are_bounded_and_hold_their_tokens() -> None:
    sizes = buckets_up_to(4096)
    assert sizes == [16, 32, 64, 128, 256, 512, 1024, 2048, 2560, 3072, 3584, 4096]
    for tokens in range(1, 4097):
        assert bucket_of(tokens) in sizes
        assert bucket_of(tokens) >= tokens
    assert all(size % 16 == 0 for size in sizes)


def test_fifty_random_token_counts(runner: MoERunner, counted: Counted) -> None:
    """At most one compilation a bucket, no transfer to the host, no operator on it; and the right numbers."""
    choose, bucketed = random.Random(0), Bucketed(runner, 4096)
    weights = random_weights(CONFIG)
    results, seen = [], set()
    with torch.no_grad():
        for _ in range(50):
            tokens = choose.randint(1, 4096)
            seen.add(bucket_of(tokens))
            x = torch.randn(tokens, CONFIG.hidden_size)
            results.append((x, bucketed(x)))
            torch_xla.sync()
    compiled, transfers, fallbacks = counted()
    assert compiled <= len(seen) <= len(bucketed.buckets)
    assert transfers == 0
    assert fallbacks == []
    for x, y in results[::10]:
        assert relative_error(y.cpu(), reference_of(CONFIG, weights, x)) <= tolerance(torch.float32, "layer")


def test_padding_is_inert(runner: MoERunner, device: torch.device) -> None:
    """Rows of NaN behind the real ones change no bit of them."""
    x = torch.randn(21, CONFIG.hidden_size)
    with torch.no_grad():
        clean, poisoned = (runner(pad_rows(x, 32, value).to(device)).cpu() for value in (0.0, float("nan")))
    assert torch.equal(clean[:21], poisoned[:21])
    assert poisoned[21:].isnan().all()


def test_warm_up_compiles_all_and_later_ones_are_counted(runner: MoERunner) -> None:
    bucketed = Bucketed(runner, 64, warm_up=True)
    with torch.no_grad():
        for tokens in (1, 16, 17, 40, 64):
            bucketed(torch.randn(tokens, CONFIG.hidden_size)).cpu()
    assert bucketed.recompilations == 0
    assert bucketed.report.counters["tpu"]["recompilations"] == 0
    assert runner.report.counters["tpu"]["buckets"] >= 3
    assert runner.report.counters["tpu"]["compilations"] > 0
    assert "tpu counts: buckets" in str(runner.report)
    with torch.no_grad():
        (bucketed(torch.randn(64, CONFIG.hidden_size)).value * 3).cpu()
    assert bucketed.recompilations == 1


def test_what_cannot_be_padded_is_refused(runner: MoERunner, device: torch.device) -> None:
    bucketed = Bucketed(runner, 64)
    with pytest.raises(InputError, match="max_tokens = 64"):
        bucketed(torch.randn(65, CONFIG.hidden_size))
    with pytest.raises(InputError, match="expected the CPU"):
        bucketed(torch.randn(5, CONFIG.hidden_size).to(device))
