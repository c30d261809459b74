"""Quantised experts: against the dequantised oracle, and against the unquantised layer with the error of the scheme."""

from __future__ import annotations

import dataclasses

import torch

from ..config import MoEConfig
from ..quant.error import flip_allowance, predicted_error
from ..types import Routing
from .cases import QUANT_VARIANTS, random_weights
from .harness import Oracle, Subject, error_of, expect, over
from .layer_checks import LayerChecks
from .tolerances import tolerance

MOST_OF_PREDICTED = 1.5
"""A layer may be off by so many times what the arithmetic of its scheme predicts; heavy tails of small layers add."""


class QuantChecks(LayerChecks):
    """Every scheme that the backend says yes to; a no is a refusal like any other."""

    @over(QUANT_VARIANTS, dtypes=True)
    def test_quantised(self, case: str, dtype: torch.dtype) -> None:
        """One, few and many tokens: the reference's numbers, and as near to the unquantised layer as predicted."""
        subject = self.bind({**QUANT_VARIANTS[case], "check_layout": True}, dtype)
        config = subject.oracle.config
        assert config.quant is not None
        plain_config = dataclasses.replace(config, quant=None)
        plain = random_weights(plain_config, dtype=dtype)
        routed = predicted_error(config, plain, subject.oracle.weights)
        predicted = max(routed, predicted_error(config, plain, subject.oracle.weights, "shared_"))
        for tokens in (1, 5, 40):
            x = subject.hidden(tokens)
            routing = subject.oracle.gate(x)
            out, expected = subject.call(x, routing), subject.oracle.layer(x, routing)
            error = error_of(out, expected)
            allowed = tolerance(dtype, "layer") + allowance(config, dtype, tokens)
            expect(error <= allowed, f"T={tokens}: {error:.1e} off the dequantised reference, allowed {allowed:.1e}")
            if tokens < 40:
                continue
            whole = Oracle(plain_config, plain).layer(x, routing)
            error, most = error_of(out, whole), MOST_OF_PREDICTED * predicted + tolerance(dtype, "layer")
            expect(
                error <= most, f"{error:.1e} off the unquantised layer, predicted {predicted:.1e}, allowed {most:.1e}"
            )

    @over(QUANT_VARIANTS)
    def test_quantised_edges(self, case: str) -> None:
        """No token, ids of -1, every token to one expert."""
        subject = self.bind(QUANT_VARIANTS[case])
        x = subject.hidden(9)
        empty = subject.hidden(0)
        expect(subject.call(empty, subject.oracle.gate(empty)).shape == empty.shape, "T=0 changed the shape")
        routing = subject.oracle.gate(x)
        none, same = routing.topk_ids.clone(), torch.full_like(routing.topk_ids, 3)
        none[::2], none[1, -1] = -1, -1
        for ids in (none, same):
            self._compare(subject, x, Routing(routing.topk_weights, ids))

    def _compare(self, subject: Subject, x: torch.Tensor, routing: Routing) -> None:
        error = error_of(subject.call(x, routing), subject.oracle.layer(x, routing))
        allowed = tolerance(subject.dtype, "layer") + allowance(subject.oracle.config, subject.dtype, x.shape[0])
        ids = routing.topk_ids[:2].tolist()
        expect(error <= allowed, f"ids {ids} ...: {error:.1e} off the dequantised reference, allowed {allowed:.1e}")


def allowance(config: MoEConfig, dtype: torch.dtype, tokens: int) -> float:
    """Of routed and shared experts, whichever is more."""
    routed = flip_allowance(config, dtype, tokens * config.top_k * config.intermediate_size)
    shared = flip_allowance(config, dtype, tokens * (config.shared_intermediate_size or 1), "shared_")
    return max(routed, shared)
