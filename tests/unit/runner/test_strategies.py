"""Which way a stage goes: announced by its verdict, corrected by what was prepared, shown by the report."""

from __future__ import annotations

import dataclasses
import json
from types import MappingProxyType

import toys

from moe_core import MoEWeights, Verdict, explain, hookimpl, use_backend


class Way(toys.Toy):
    """Announces one way; ``done`` is what its prepared weights say."""

    done: object = None

    @hookimpl
    def moe_supports(self, config, stage, platform):
        return Verdict.yes(strategy="fast" if stage == "experts" else "")

    @hookimpl
    def moe_prepare(self, weights):
        prepared = dataclasses.replace(weights)
        if self.done is not None:
            prepared.strategies = self.done
        return prepared


def test_announced(bind) -> None:
    """A stage with one way has no line."""
    runner = bind(Way())
    assert runner.report.strategies == {"experts": "fast"}
    assert "\n  experts: fast" in str(runner.report)
    assert json.loads(json.dumps(runner.report.as_dict()))["strategies"] == {"experts": "fast"}
    with use_backend("toy"):
        assert explain(runner.config).strategies == {"experts": "fast"}


def test_a_stage_of_the_callers_own(bind) -> None:
    """Nobody's strategy runs where the caller passed a function."""

    class Both(Way):
        @hookimpl
        def moe_supports(self, config, stage, platform):
            return Verdict.yes(strategy="fast")

    report = bind(Both(), shared_experts=lambda x: x, gate=lambda x: x[:, :8]).report
    assert report.stages["shared_experts"] == "caller" and set(report.strategies) == {"experts", "reduce"}


def test_what_was_done_counts(bind) -> None:
    toy = Way()
    toy.done = MappingProxyType({"experts": "slow (the compiler failed)", "gate": "", "unknown": "x"})
    runner = bind(toy)
    assert runner.report.strategies == {"experts": "slow (the compiler failed)"}
    assert isinstance(runner.weights, MoEWeights)


def test_something_else_of_that_name_is_left_alone(bind) -> None:
    toy = Way()
    toy.done = "no mapping"
    assert bind(toy).report.strategies == {"experts": "fast"}
