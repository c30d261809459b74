"""The native strategy's two stages: what the kernel leaves to torch, around its call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core import ExpertsOut, MoEConfig, Routing
from moe_core.platform import Platform
from moe_core.reference import expert_norm
from moe_core.types import Plan

from ..given import Matrices
from . import build
from .kernel import Kernel, PackedExperts


class NativePacker:
    """Packs experts for the kernel, which it compiles or finds.

    Raises:
        BuildError: there is no kernel; the text says why.
    """

    def __init__(self, platform: Platform) -> None:
        self.kernel = Kernel.of(build.load(platform.env, platform.cpu_capability))

    def __call__(self, config: MoEConfig, given: Matrices) -> NativeExperts:
        matrices = (given.w13, given.w2, given.b13, given.b2, given.spent)
        if not given.routed:
            return NativeExperts(PackedExperts.pack(self.kernel, config, *matrices))
        return NativeExperts(
            PackedExperts.pack(
                *(self.kernel, config, *matrices),
                top_k=config.top_k,
                zero_begin=config.num_experts,
                zero_end=config.num_router_outputs,
                reduce=config.post_expert_norm_eps is None,  # the norm is of one expert's output
                scale=config.output_scale,
            )
        )


@dataclass(frozen=True)
class NativeExperts:
    """Experts of one width."""

    run: PackedExperts

    def routed(self, plan: Plan, x: Tensor, routing: Routing) -> ExpertsOut:
        """[T, H], weighted and summed in float32 (rounded where nothing is added); [T, K, H] where a norm stands behind
        each expert."""
        config, (weights, ids), run = plan.config, routing, self.run
        if config.apply_router_weight_on_input:
            x, weights = x.float() * weights, torch.ones_like(weights)
        dtype = run.input_dtype
        if x.dtype is not dtype:
            x = x.to(dtype)
        out = run(x, ids, weights, plan.dtype is dtype and config.shared_intermediate_size is None)
        if run.down.reduce:
            return ExpertsOut(out, True)
        # A zero expert hands the token back as it is, and a norm of no expert's zeros could be 0/0.
        has_expert = ((ids >= 0) & (ids < config.num_held_experts)).reshape(-1)
        out[has_expert] = expert_norm(config, plan.weights.plain, out[has_expert])
        return ExpertsOut(out.view(*ids.shape, -1), False)

    def shared(self, x: Tensor) -> Tensor:
        """[T, H] float32."""
        ids = torch.zeros(x.shape[0], 1, dtype=torch.int32, device="cpu")
        return self.run(x.to(self.run.input_dtype), ids, torch.ones(x.shape[0], 1, dtype=torch.float32, device="cpu"))
