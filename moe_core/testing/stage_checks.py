"""First what the backend says, then what must hold of any routing, then each stage against the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..types import ExpertsOut, Pending, Routing
from .cases import CALL_FAMILIES, EXPERT_VARIANTS, ROUTER_FAMILIES, SHARED_VARIANTS
from .harness import FULL, PLAIN, TOKENS, Harness, Subject, expect, expect_close, over

ROUTERS = {**ROUTER_FAMILIES, **CALL_FAMILIES}
EXPERTS = {
    **EXPERT_VARIANTS,
    "zero_experts": ROUTER_FAMILIES["softmax_bias_zero_experts"],
    "output_scaled": {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
}
REDUCES = {"plain": PLAIN, "full": FULL, "output_scaled": EXPERTS["output_scaled"], **SHARED_VARIANTS}
REDUCES["weight_on_input"] = EXPERT_VARIANTS["weight_on_input"]
TIED = [name for name in ROUTER_FAMILIES if name not in ("sqrtsoftplus_hash", "custom")]
SIGMOIDS = ("sigmoid_bias", "sigmoid_bias_eps", "group_top2_bias", "sigmoid_renorm", "topk_sigmoid_bias")
BAD_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda z: torch.full_like(z, float("nan")),
    "one_nan": lambda z: z.masked_fill(torch.arange(len(z)) == 3, float("nan")),
    "inf": lambda z: z.masked_fill(torch.arange(len(z)) == 5, float("inf")),
    "all_minus_inf": lambda z: torch.full_like(z, float("-inf")),
}


def expect_valid_ids(subject: Subject, routing: Routing, tokens: int) -> None:
    """[T, K] int32 in range, distinct within a row, within as many groups as the config keeps."""
    config = subject.oracle.config
    ids = routing.topk_ids.cpu().long()
    expect(
        ids.shape == (tokens, config.top_k),
        f"topk_ids has shape {list(ids.shape)}, not [T, K] = [{tokens}, K={config.top_k}]",
    )
    expect(routing.topk_ids.dtype is torch.int32, f"topk_ids has dtype {routing.topk_ids.dtype}, not int32")
    limit = config.num_router_outputs
    outside = ids[(ids < 0) | (ids >= limit)]
    expect(not outside.numel(), f"topk_ids holds {outside[:4].tolist()}, outside 0 .. {limit - 1}")
    distinct = torch.zeros(tokens, limit).scatter_add_(1, ids, torch.ones(ids.shape)).amax(dim=1) <= 1
    expect(distinct.all(), f"rows {(~distinct).nonzero().flatten()[:4].tolist()} choose an expert twice")
    if config.has_groups and config.group_mask_value < 0:
        assert config.num_expert_group is not None
        groups = ids // (config.num_experts // config.num_expert_group)
        most = max(len(set(row)) for row in groups.tolist()) if tokens else 0
        expect(most <= (config.topk_group or 1), f"a row uses {most} groups, more than topk_group={config.topk_group}")


class StageChecks(Harness):
    """From invariants to the four stages one by one."""

    def test_usable(self) -> None:
        """At least one layer of the tables is served; with --require-backend a backend that serves none fails."""
        refusals = {self.refusal(self.config(f), dtype) for f in (PLAIN, FULL) for dtype in self.dtypes}
        refusals |= {self.refusal(self.config(f), self.dtype) for f in (*ROUTERS.values(), *EXPERTS.values())}
        if "" not in refusals:
            self.unusable("it refuses every layer of the kit: " + " | ".join(sorted(refusals)[:3]))

    @over(dtypes=True)
    def test_answers(self, dtype: torch.dtype) -> None:
        """Yes or a reasoned no to every layer of the tables, with and without gradients; never a crash."""
        for fields in (*ROUTERS.values(), *EXPERTS.values(), *SHARED_VARIANTS.values()):
            for needs_grad in (False, True):
                self.refusal(self.config(fields), dtype, needs_grad=needs_grad)

    @over(ROUTERS)
    def test_ids(self, case: str) -> None:
        """Ids are valid, weights are finite float32, their sum is what the config says, and counts add up."""
        subject = self.bind(ROUTERS[case])
        gate, x, input_ids = subject.stage("gate"), subject.hidden(), subject.input_ids()
        config = subject.oracle.config
        routing = gate(x, None, input_ids)
        expect_valid_ids(subject, routing, TOKENS)
        weights = routing.topk_weights.cpu()
        expect(
            weights.shape == (TOKENS, config.top_k) and weights.dtype is torch.float32, "topk_weights: not [T, K] fp32"
        )
        expect(torch.isfinite(weights).all(), "topk_weights holds NaN or inf for finite inputs")
        plain_sum = config.renormalize and not config.renorm_eps and config.renorm_clamp_min is None
        if plain_sum and not config.per_expert_scale and config.simulated_routing is None:
            expected = torch.full((TOKENS,), config.routed_scaling_factor)
            expect_close(weights.sum(dim=1), expected, torch.float32, "gate", "the sum of a row's weights")
        with subject.runner.recording() as record:
            subject.runner(x, input_ids=input_ids)
        if config.expert_capacity is None:
            counted = int(record.tokens_per_expert.sum())
            expect(counted == TOKENS * config.top_k, f"{counted} choices were counted, expected T * K")

    @over(["softmax_renorm", "zero_experts", "output_scaled"])
    def test_minus_one(self, case: str) -> None:
        """An id of -1 contributes nothing, whatever its weight or its row holds, and whatever an earlier call left."""
        subject = self.bind({**ROUTER_FAMILIES, **EXPERTS}[case])
        x = subject.hidden()
        routing = subject.oracle.gate(x)
        subject.call(x, routing)
        some, none = routing.topk_ids.clone(), routing.topk_ids.clone()
        some[::2, -1], none[4:6] = -1, -1
        weights = routing.topk_weights.masked_fill(some < 0, float("inf"))
        expected = subject.oracle.layer(x, Routing(weights, some))
        subject.expect_layer(subject.call(x, Routing(weights, some)), expected, "ids of -1 with weights of inf")
        bad = x.clone()
        bad[4], bad[5] = float("inf"), float("nan")
        out = subject.call(bad, Routing(routing.topk_weights, none)).cpu()
        expect(not out[4:6].any(), f"a row with no expert at all is not zero: {out[4, :3].tolist()}")
        expected = subject.oracle.layer(x, Routing(routing.topk_weights, none))
        subject.expect_layer(out, expected, "rows beside those without an expert")

    @over(ROUTERS, dtypes=True)
    def test_gate(self, case: str, dtype: torch.dtype) -> None:
        """Ids, their order and weights, from logits and from hidden states."""
        subject = self.bind(ROUTERS[case], dtype)
        gate, x, input_ids = subject.stage("gate"), subject.hidden(33), subject.input_ids(33)
        logits = subject.oracle.logits(x)
        clear = subject.oracle.clear_rows(x, input_ids)
        expect(clear.sum() >= 16, "too few rows without a close call: the kit's own inputs are at fault")
        for given in (subject.here(logits), None):
            routing, expected = gate(x, given, input_ids), subject.oracle.gate(x, logits, input_ids)
            what = "from hidden_states" if given is None else "from router_logits"
            ids = routing.topk_ids.cpu()
            same = (ids == expected.topk_ids).all(dim=1) | ~clear
            row = int((~same).int().argmax())
            expect(
                same.all(), f"{what}: row {row} chose {ids[row].tolist()}, expected {expected.topk_ids[row].tolist()}"
            )
            actual = routing.topk_weights.cpu()[clear]
            expect_close(actual, expected.topk_weights[clear], dtype, "gate", f"topk_weights {what}")

    @over(TIED)
    def test_gate_ties(self, case: str) -> None:
        """Equal scores go to the lowest id, in every column and whatever the batch."""
        subject = self.bind(ROUTERS[case])
        gate, x = subject.stage("gate"), subject.hidden()
        width = subject.oracle.config.num_router_outputs
        steps = torch.randint(-1, 2, (TOKENS, width), generator=torch.Generator().manual_seed(3)).float()
        for logits in (steps, torch.zeros(TOKENS, width)):
            ids = gate(x, subject.here(logits), None).topk_ids.cpu()
            expected = subject.oracle.gate(x, logits).topk_ids
            expect(torch.equal(ids, expected), f"ties: chose {ids[0].tolist()}, expected {expected[0].tolist()}")

    @over(SIGMOIDS)
    def test_gate_tiny_scores(self, case: str) -> None:
        """Scores near and below what float32 holds: renorm_eps counts, and nothing is 0/0."""
        subject = self.bind(ROUTERS[case])
        gate, x = subject.stage("gate"), subject.hidden()
        logits = subject.oracle.logits(x)
        for shift in (-14.0, -200.0):
            actual, expected = gate(x, subject.here(logits + shift), None), subject.oracle.gate(x, logits + shift)
            expect_valid_ids(subject, actual, TOKENS)
            expect(torch.isfinite(actual.topk_weights).all(), f"logits of {shift:g}: topk_weights holds NaN or inf")
            clear = (actual.topk_ids.cpu() == expected.topk_ids).all(dim=1)
            found, wanted = actual.topk_weights.cpu()[clear], expected.topk_weights[clear]
            expect_close(found, wanted, torch.float32, "gate", f"topk_weights of logits around {shift:g}")

    @over([f"{kind}-{policy}" for kind in BAD_LOGITS for policy in ("propagate", "zero")])
    def test_gate_bad_logits(self, case: str) -> None:
        """A row of NaN or inf gets valid ids, weights by ``nan_policy``, and leaves the other rows alone."""
        kind, policy = case.split("-")
        subject = self.bind({**PLAIN, "nan_policy": policy})
        gate, x = subject.stage("gate"), subject.hidden()
        logits = subject.oracle.logits(x)
        clean = gate(x, subject.here(logits), None)
        bad = logits.clone()
        bad[6] = BAD_LOGITS[kind](bad[6])
        routing = gate(x, subject.here(bad), None)
        expect_valid_ids(subject, routing, TOKENS)
        others = torch.arange(TOKENS) != 6
        for name, found, before in zip(Routing._fields, routing, clean, strict=True):
            expect(torch.equal(found.cpu()[others], before.cpu()[others]), f"{name} of other rows changed")
        if policy == "zero":
            expect(not routing.topk_weights[6].any(), f"nan_policy='zero': weights {routing.topk_weights[6].tolist()}")

    @over(SHARED_VARIANTS, dtypes=True)
    def test_shared_experts(self, case: str, dtype: torch.dtype) -> None:
        """The shared experts, their sigmoid gate included."""
        subject = self.bind(SHARED_VARIANTS[case], dtype)
        x = subject.hidden()
        out = subject.stage("shared_experts")(x).result()
        expected = subject.oracle.shared(x)
        assert expected is not None
        expect_close(out, expected, dtype, "shared_experts", "shared experts")

    @over(EXPERTS, dtypes=True)
    def test_experts(self, case: str, dtype: torch.dtype) -> None:
        """The routed experts, reduced or not, given the reference's routing."""
        subject = self.bind(EXPERTS[case], dtype)
        oracle, x = subject.oracle, subject.hidden(29)
        routing = oracle.gate(x)
        expected = oracle.experts(x, routing)
        out = run_experts(subject, x, routing)
        if out.reduced:
            expected = ExpertsOut(oracle.reduce(routing, expected, None), True)
        expect_close(out.value, expected.value, dtype, "experts", f"experts with reduced={out.reduced}")

    @over(REDUCES, dtypes=True)
    def test_reduce(self, case: str, dtype: torch.dtype) -> None:
        """Weights, scale and shared experts, each exactly once."""
        subject = self.bind(REDUCES[case], dtype)
        reduce, oracle, x = subject.stage("reduce"), subject.oracle, subject.hidden()
        routing, shared = oracle.gate(x), oracle.shared(x)
        experts_out = oracle.experts(x, routing)
        expected = oracle.reduce(routing, experts_out, shared)
        forms = [experts_out]
        if subject.serves("experts") and run_experts(subject, x, routing).reduced:
            forms.append(ExpertsOut(oracle.reduce(routing, experts_out, None), True))
        for form in forms:
            pending = Pending(None if shared is None else subject.here(shared))
            out = reduce(subject.routing(routing), ExpertsOut(subject.here(form.value), form.reduced), pending)
            expect(pending.consumed, "shared.result() was not called")
            expect(out.dtype is dtype, f"the result has dtype {out.dtype}, not that of the layer, {dtype}")
            expect_close(out, expected, dtype, "reduce", f"reduce of experts with reduced={form.reduced}")

    @over(["gate", "shared_experts", "experts", "reduce"])
    def test_no_tokens(self, case: str) -> None:
        """Every stage is defined for T = 0."""
        subject = self.bind(FULL)
        x, oracle = subject.hidden(0), subject.oracle
        routing, stage = subject.routing(oracle.gate(x)), subject.stage(case)
        if case == "gate":
            expect_valid_ids(subject, stage(x, None, None), 0)
            return
        if case == "experts":
            shape = list(run_experts(subject, x, routing).value.shape)
            expect(shape[0] == 0 and shape[-1] == x.shape[1], f"experts of no tokens have shape {shape}")
            return
        if case == "shared_experts":
            out = stage(x).result()
        else:
            out = stage(routing, oracle.experts(x, oracle.gate(x)), Pending(x.clone()))
        expect(out.shape == x.shape, f"{case} of no tokens has shape {list(out.shape)}, not {list(x.shape)}")


def run_experts(subject: Subject, x: Tensor, routing: Routing) -> ExpertsOut:
    """The experts stage; its logits lead to the same routing where it routes by itself."""
    stage = subject.stage("experts")
    logits = subject.here(subject.oracle.logits(x))
    out: ExpertsOut = stage(x.clone(), None if subject.owns_routing else subject.routing(routing), logits)
    expect(isinstance(out.reduced, bool), f"ExpertsOut.reduced is {out.reduced!r}, not a bool")
    return out
