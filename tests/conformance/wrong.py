"""Backends that are wrong in one way each, a few lines beside a right one; test_rejects.py has the checks for them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from moe_core import ExpertsOut, MoEWeights, Pending, Routing, Verdict, hookimpl, reference
from moe_core.quant import dequantise
from moe_core.routing import router_logits_of
from moe_core.testing import Loopback
from moe_core.testing.loopback import Prepared
from moe_core.types import Plan


def changed(plan: Plan, **tensors: Tensor | None) -> Plan:
    """The plan with some weights replaced."""
    weights = dataclasses.replace(plan.weights, **tensors)
    return dataclasses.replace(plan, weights=weights)


def configured(plan: Plan, **fields: Any) -> Plan:
    """The plan with some fields of its config replaced."""
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, **fields))


class Wrong(Loopback):
    """Right; each subclass spoils one method. Its stages see plain weights."""

    def __init__(self, **traits: Any) -> None:
        super().__init__("wrong", **traits)

    def gate(self, plan: Plan, x: Tensor, logits: Tensor | None, ids: Tensor | None) -> Routing:
        return reference.moe_gate(plan, x, logits, ids)

    def shared(self, plan: Plan, x: Tensor) -> Tensor | None:
        return reference.moe_shared_experts(plan, x).result()

    def experts(self, plan: Plan, x: Tensor, routing: Routing) -> ExpertsOut:
        return reference.moe_experts(plan, x, routing)

    def reduce(self, plan: Plan, routing: Routing, out: ExpertsOut, shared: Tensor | None) -> Tensor:
        return reference.moe_reduce(plan, routing, out, Pending(shared))

    @hookimpl
    def moe_gate(self, plan, hidden_states, router_logits, input_ids):
        return self.gate(self.unwrap(plan, "gate"), hidden_states, router_logits, input_ids)

    @hookimpl
    def moe_shared_experts(self, plan, hidden_states):
        return Pending(self.shared(self.unwrap(plan, "shared_experts"), hidden_states))

    @hookimpl
    def moe_experts(self, plan, hidden_states, routing):
        return self.experts(self.unwrap(plan, "experts"), hidden_states, routing)

    @hookimpl
    def moe_reduce(self, plan, routing, experts_out, shared):
        return self.reduce(self.unwrap(plan, "reduce"), routing, experts_out, shared.result())


class CrashesOnUnknownActivation(Wrong):
    @hookimpl
    def moe_supports(self, config, stage):
        return Verdict.yes(supports_backward={"silu": True}.get(config.activation) or config.activation.upper())


class WrongGroup(Wrong):
    """Takes the best experts of all groups."""

    def gate(self, plan, x, logits, ids):
        return super().gate(configured(plan, num_expert_group=None, topk_group=None), x, logits, ids)


class ForgetsRenormalize(Wrong):
    def gate(self, plan, x, logits, ids):
        return super().gate(configured(plan, renormalize=False, renorm_eps=0.0, renorm_clamp_min=None), x, logits, ids)


class BiasedWeights(Wrong):
    """The bias is for the choice; here the weights have it too."""

    def gate(self, plan, x, logits, ids):
        weights, ids = super().gate(plan, x, logits, ids)
        bias = plan.weights.e_score_correction_bias
        return Routing(weights if bias is None else weights + bias[ids.long()], ids)


class AscendingIds(Wrong):
    def gate(self, plan, x, logits, ids):
        weights, ids = super().gate(plan, x, logits, ids)
        ids, order = ids.sort(dim=1)
        return Routing(weights.gather(1, order), ids)


class HighestIdWinsTies(Wrong):
    def gate(self, plan, x, logits, ids):
        if logits is None:
            logits = router_logits_of(plan.config, plan.weights, x)
        nudge = 1e-5 * torch.arange(logits.shape[1], device=logits.device)
        return Routing(
            super().gate(plan, x, logits, ids).topk_weights, super().gate(plan, x, logits + nudge, ids).topk_ids
        )


class ForgetsEpsilon(Wrong):
    def gate(self, plan, x, logits, ids):
        return super().gate(configured(plan, renorm_eps=0.0), x, logits, ids)


class RouterInLowPrecision(Wrong):
    def gate(self, plan, x, logits, ids):
        weight = plan.weights.gate_weight
        logits = x @ weight.to(x.dtype).t() if logits is None and plan.weights.gate_bias is None else logits
        return super().gate(plan, x, logits, ids)


class NanSpreads(Wrong):
    """Normalises by the largest logit of the batch instead of the row."""

    def gate(self, plan, x, logits, ids):
        if logits is None:
            logits = router_logits_of(plan.config, plan.weights, x)
        return super().gate(plan, x, logits - (logits.amax() - logits.amax()), ids)


class LongIds(Wrong):
    def gate(self, plan, x, logits, ids):
        weights, ids = super().gate(plan, x, logits, ids)
        return Routing(weights, ids.long())


class SwappedGateUp(Wrong):
    def experts(self, plan, x, routing):
        if plan.config.gated and not plan.config.w13_interleaved:
            gate, up = plan.weights.w13_weight.chunk(2, dim=1)
            plan = changed(plan, w13_weight=torch.cat([up, gate], dim=1))
        return super().experts(plan, x, routing)


class IgnoresInterleaving(Wrong):
    def experts(self, plan, x, routing):
        return super().experts(configured(plan, w13_interleaved=False), x, routing)


class IgnoresExpertBias(Wrong):
    def experts(self, plan, x, routing):
        return super().experts(changed(plan, w13_bias=None, w2_bias=None), x, routing)


class WeightOnInputForgotten(Wrong):
    def experts(self, plan, x, routing):
        return super().experts(configured(plan, apply_router_weight_on_input=False), x, routing)


class DropsLastToken(Wrong):
    def experts(self, plan, x, routing):
        value = super().experts(plan, x, routing).value.clone()
        value[-1:] = 0
        return ExpertsOut(value, False)


class ClampedChunks(Wrong):
    """Tiles of 64 whose last one is clamped to start inside: its offset is one row off."""

    def experts(self, plan, x, routing):
        value = super().experts(plan, x, routing).value.clone()
        for start in range(64, len(x), 64):
            value[start : start + 64] = (
                super()
                .experts(plan, x[start - 1 : start + 63], Routing(*(t[start - 1 : start + 63] for t in routing)))
                .value[: len(x) - start]
            )
        return ExpertsOut(value, False)


class MinusOneIsExpertZero(Wrong):
    def experts(self, plan, x, routing):
        return ExpertsOut(
            super().experts(plan, x, Routing(routing.topk_weights, routing.topk_ids.clamp(min=0))).value, False
        )

    def reduce(self, plan, routing, out, shared):
        return super().reduce(plan, Routing(routing.topk_weights, routing.topk_ids.clamp(min=0)), out, shared)


class StaleRows(Wrong):
    """One buffer for all calls, of which a row without an expert is not written."""

    def __init__(self):
        super().__init__()
        self.buffers = {}

    def experts(self, plan, x, routing):
        value = super().experts(plan, x, routing).value
        buffer = self.buffers.setdefault(value.shape, torch.zeros_like(value))
        written = (routing.topk_ids >= 0).any(dim=1)
        buffer[written] = value[written].to(buffer.dtype)
        return ExpertsOut(buffer.clone(), False)

    def reduce(self, plan, routing, out, shared):
        return super().reduce(
            plan, Routing(routing.topk_weights.nan_to_num(posinf=0.0), routing.topk_ids.abs()), out, shared
        )


class DenseWithZeros(Wrong):
    """Runs every expert on every token and multiplies what was not chosen by zero."""

    def experts(self, plan, x, routing):
        ids = torch.arange(plan.config.num_held_experts, dtype=torch.int32, device=x.device).expand(len(x), -1)
        every = super().experts(plan, x, Routing(torch.ones(ids.shape, device=x.device), ids.contiguous())).value
        chosen = torch.zeros(*ids.shape, device=x.device).scatter_add_(1, routing.topk_ids.long(), routing.topk_weights)
        return ExpertsOut(torch.einsum("teh,te->th", every, chosen), True)


class ScalesByTheBatch(Wrong):
    """Quantises on the fly with one scale for the whole batch."""

    def experts(self, plan, x, routing):
        scale = x.float().abs().amax().clamp(min=1e-6) / 2**20
        return super().experts(plan, (x.float() / scale).round().mul(scale).to(x.dtype), routing)


class ReadsThePadding(Wrong):
    """Reads whole tiles of 8 rows, and lets them into a scale."""

    def experts(self, plan, x, routing):
        rows = -len(x) % 8 + len(x)
        room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        tile = x.as_strided((rows, x.shape[1]), x.stride()) if room >= rows * x.shape[1] else x
        extra = tile[len(x) :].float().sum() * 0
        return super().experts(plan, (x.float() + extra).to(x.dtype), routing)


class NeedsEvenWidth(Wrong):
    """Leaves a tail of columns out."""

    def experts(self, plan, x, routing):
        value = super().experts(plan, x, routing).value.clone()
        value[..., value.shape[-1] // 8 * 8 :] = 0
        return ExpertsOut(value, False)


class Squeezes(Wrong):
    def experts(self, plan, x, routing):
        return ExpertsOut(super().experts(plan, x, routing).value.squeeze(), False)


class OverwritesItsInput(Wrong):
    """Without saying ``mutates_input``."""

    def experts(self, plan, x, routing):
        out = super().experts(plan, x, routing)
        x.mul_(0.5)
        return out


class Noisy(Wrong):
    """Differs in the last bits from call to call, as float atomics do."""

    def experts(self, plan, x, routing):
        value = super().experts(plan, x, routing).value
        return ExpertsOut(value * (1 + 1e-6 * torch.rand(1, device=x.device)), False)


class OneScratchForAll(Wrong):
    """A buffer that two threads share; the switch between them is made likely."""

    def __init__(self):
        super().__init__()
        self.scratch = {}

    def experts(self, plan, x, routing):
        self.scratch["x"] = x
        time.sleep(0.002)
        return super().experts(plan, self.scratch["x"], routing)


class HoardsMemory(Wrong):
    """Keeps a workspace as large as the largest call, declaring none."""

    kept: Tensor | None = None

    def experts(self, plan, x, routing):
        if self.kept is None or len(self.kept) < len(x):
            self.kept = torch.empty_like(x)
        return super().experts(plan, x, routing)


class DetachesExperts(Wrong):
    """Claims a backward and loses the experts' part of it."""

    def experts(self, plan, x, routing):
        out = super().experts(plan, x, routing)
        return ExpertsOut(out.value.detach().requires_grad_(out.value.requires_grad), False)


class RemembersRouting(Wrong):
    """Its experts go by what its own gate chose last, not by what they are given."""

    last: Routing | None = None

    def gate(self, plan, x, logits, ids):
        self.last = super().gate(plan, x, logits, ids)
        return self.last

    def experts(self, plan, x, routing):
        return super().experts(plan, x, routing if self.last is None else self.last)


class AssumesContiguousIds(Wrong):
    def experts(self, plan, x, routing):
        ids = routing.topk_ids
        return super().experts(plan, x, Routing(routing.topk_weights, ids.as_strided(ids.shape, (ids.shape[1], 1))))


class AssumesContiguousWeights(Wrong):
    def experts(self, plan, x, routing):
        w = plan.weights.w13_weight
        dense = w.as_strided(w.shape, (w.shape[1] * w.shape[2], w.shape[2], 1))
        return super().experts(changed(plan, w13_weight=dense), x, routing)


class AssumesHiddenSize(Wrong):
    def experts(self, plan, x, routing):
        value = super().experts(plan, x, routing).value
        return ExpertsOut(torch.nn.functional.pad(value, (plan.config.hidden_size - value.shape[-1], 0)), False)


class CrashesWithoutTokens(Wrong):
    def experts(self, plan, x, routing):
        int(routing.topk_ids.max())
        return super().experts(plan, x, routing)


class Alternates(Wrong):
    """Every second call is another kernel."""

    def experts(self, plan, x, routing):
        value = super().experts(plan, x, routing).value
        return ExpertsOut(value * (1 + 1e-6 * (self.calls["experts"] % 2)), False)


class SharedTwice(Wrong):
    def reduce(self, plan, routing, out, shared):
        return super().reduce(plan, routing, out, None if shared is None else shared * 2)


class ScaledTwice(Wrong):
    def reduce(self, plan, routing, out, shared):
        weights = routing.topk_weights * plan.config.routed_scaling_factor
        return super().reduce(plan, Routing(weights, routing.topk_ids), out, shared)


class ScalesSharedToo(Wrong):
    def reduce(self, plan, routing, out, shared):
        scaled = shared is not None and plan.config.apply_routed_scale_to_output
        return super().reduce(plan, routing, out, shared * plan.config.routed_scaling_factor if scaled else shared)


class ForgetsAverage(Wrong):
    def reduce(self, plan, routing, out, shared):
        return super().reduce(configured(plan, shared_expert_combination="sum"), routing, out, shared)


class ForgetsSharedGate(Wrong):
    def shared(self, plan, x):
        return super().shared(configured(plan, shared_expert_gate=False), x)


class AlwaysFloat32(Wrong):
    def reduce(self, plan, routing, out, shared):
        return super().reduce(plan, routing, out, shared).float()


class WeighsInPlace(Wrong):
    def reduce(self, plan, routing, out, shared):
        out.value.mul_(routing.topk_weights.masked_fill(routing.topk_ids < 0, 0.0).unsqueeze(-1))
        return super().reduce(plan, Routing(torch.ones_like(routing.topk_weights), routing.topk_ids), out, shared)


class ReusesItsOutput(Wrong):
    """One output buffer for each T."""

    def __init__(self):
        super().__init__()
        self.buffers = {}

    def reduce(self, plan, routing, out, shared):
        result = super().reduce(plan, routing, out, shared)
        return self.buffers.setdefault(result.shape, torch.empty_like(result)).copy_(result)


class CachesByIdentity(Wrong):
    """Packs weights once for each tensor, and never looks again."""

    def __init__(self):
        super().__init__()
        self.packed = {}

    @hookimpl
    def moe_prepare(self, weights):
        copy = {name: tensor.clone() for name, tensor in weights.named_tensors()}
        found = self.packed.setdefault(weights.w13_weight.data_ptr(), (weights, Prepared(MoEWeights(**copy))))
        return found[1]


class ReleasesWhatItReads(Wrong):
    """Says that it has copies of the weights, and has the weights."""

    @hookimpl
    def moe_prepare(self, weights):
        for expert in range(len(weights.w13_weight)):
            weights.release("w13_weight", expert)
            weights.release("w2_weight", expert)
        return Prepared(MoEWeights(**dict(weights.named_tensors())))


class ReturnsItsInput(Wrong):
    """Writes the result over hidden_states, which nobody allowed."""

    seen: Tensor | None = None

    def gate(self, plan, x, logits, ids):
        self.seen = x
        return super().gate(plan, x, logits, ids)

    def reduce(self, plan, routing, out, shared):
        result = super().reduce(plan, routing, out, shared)
        return result if self.seen is None or self.seen.shape != result.shape else self.seen.copy_(result)


class IgnoresZeroPoints(Wrong):
    def experts(self, plan, x, routing):
        return super().experts(changed(plan, w13_weight_zero_point=None), x, routing)


class HighHalfFirst(Wrong):
    """Reads the two weights of a byte in the other order."""

    def experts(self, plan, x, routing):
        w2 = plan.weights.w2_weight
        return super().experts(changed(plan, w2_weight=(w2 << 4) | (w2 >> 4)), x, routing)


class RoundsNoActivations(Wrong):
    """Its weights are right, but a W8A8 scheme rounds what they are multiplied with."""

    def experts(self, plan, x, routing):
        config, weights = dequantise(plan.config, plan.weights, torch.float32)
        return super().experts(dataclasses.replace(plan, config=config, weights=weights), x, routing)
