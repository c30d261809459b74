"""What an MoE layer computes, as data: :class:`MoEConfig`.

Field names are those of the field (vLLM's where it has one); impossible combinations are refused here, at
construction, so that no backend ever has to guess what they might mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .activations import ACTIVATIONS
from .config_checks import check_groups, check_router, is_int, is_number, require
from .quant.config import QUANT_SCHEMES as QUANT_SCHEMES
from .quant.config import QuantConfig as QuantConfig


@dataclass(frozen=True)
class MoEConfig:
    """The routing, the experts, the shared experts and the policies of one MoE layer.

    Args:
        hidden_size: H, the width of ``hidden_states``.
        intermediate_size: I, the width inside one routed expert.
        num_experts: E, the global number of routed experts.
        top_k: K, experts chosen for each token.

        scoring_func: scores from logits, in float32.
        score_before_topk: False scores only the selected logits (softmax over the chosen K).
        renormalize: divide the K weights by their sum plus ``renorm_eps``.
        renorm_eps: added to that sum (1e-20 in the DeepSeek-V3 family).
        renorm_clamp_min: lower bound of that sum (ERNIE); None is the smallest normal float32, so that scores which all
            underflow give weights of 0 and not 0/0.
        num_expert_group: G, experts are split into G equal groups; None or 1 has no grouping.
        topk_group: groups kept for each token.
        group_score: a group's score: its ``max`` (DeepSeek-V2) or the sum of its two best (``top2_sum``).
        group_mask_value: selection score of experts outside the kept groups. Where it ties with a kept expert's, and
            always without ``e_score_correction_bias``, the kept one is chosen.
        gate_bias: the router has a bias [E]. None: as the weights have it.
        e_score_correction_bias: a float32 bias used for selection only, on the scores, or on the logits where
            ``score_before_topk`` is False. None: as the weights have it.
        routed_scaling_factor: multiplies the routed weights, or the routed sum with ``apply_routed_scale_to_output``.
        apply_routed_scale_to_output: whoever sums applies the factor, once.
        apply_router_weight_on_input: the weight multiplies the expert's input (Llama-4); top_k must be 1.
        router_logit_scale: multiplies the logits, before anything else.
        router_logit_softcap: logits become cap * tanh(logits / cap).
        zero_expert_num: ids E .. E+n-1 are experts without weights (LongCat); the router has E+n outputs.
        zero_expert_type: what they return: ``identity``.
        per_expert_scale: weights are multiplied by the chosen expert's learnt scale (``MoEWeights.per_expert_scale``).
        hash_routing: ids come from ``MoEWeights.tid2eid[input_ids]``, weights from the scores.
        sparsemixer_jitter: not None routes by sparsemixer (PhiMoE) with this jitter; top_k must be 2.
        custom_routing_function: ``fn(hidden_states, router_logits, top_k, renormalize) -> (weights, ids)`` gets float32
            logits behind scale and cap; it renormalises itself, per_expert_scale and routed_scaling_factor follow.
        simulated_routing: ``uniform`` or ``zipf`` (popularity 1 / (id + 1) ** skew) ignores the router and gives equal
            weights; for benchmarks. A row's experts depend on its place in the call and on the seed.
        simulated_seed, simulated_zipf_skew: of the simulation.
        expert_capacity: an expert takes so many tokens of a call, in their order, first choices before second; a choice
            beyond becomes -1 with weight 0 (Switch). The core applies it behind the gate of any backend.

        activation: a name of :data:`moe_core.activations.ACTIVATIONS` or a callable on a tensor.
        custom_activation_function: ``fn(projected) -> inner`` from the first product [..., 2I] (or [..., I]) to
            [..., I]; replaces ``activation``, the gating and the clamps. Columns are in the order of w13's rows.
        gated: experts compute act(gate) * up; False has one product before the activation.
        w13_interleaved: rows of ``w13_weight`` alternate gate, up, gate, up instead of all gate rows first.
        swiglu_limit: gate is clamped from above, up to both sides; None clamps nothing (0 is refused).
        swiglu_alpha, swiglu_beta: gate * sigmoid(alpha * gate) * (up + beta), with activation ``silu``.
        expert_bias: routed experts have ``w13_bias`` and ``w2_bias``. None: as the weights have it.
        post_expert_norm_eps: not None normalises each expert's output (RMS) by ``MoEWeights.post_expert_norm_weight``.
        post_expert_norm_scale_first: that weight multiplies before the normalisation instead of after it.

        shared_intermediate_size: I_s, the width of the shared experts together; None has none.
        num_shared_experts: how many experts were packed into I_s (``average`` divides by it plus one).
        shared_expert_gate: a sigmoid gate [1, H] scales the shared output.
        shared_expert_bias: shared experts have biases. None: as the weights have it.
        shared_expert_combination: ``sum`` or ``average`` with the routed output.
        shared_experts_order: ``overlap`` on a second stream, ``before``, ``after`` or ``internal`` to the backend.
        shared_experts_stream_token_threshold: overlap only up to this many tokens.

        moe_latent_size: width in which routed experts work, between ``routed_input_transform`` and
            ``routed_output_transform``; None is H.
        num_local_experts: experts whose weights are held here; None is all of them. Stages behind the dispatch then see
            local ids.
        reduce_results: sum over tensor- and expert-parallel ranks inside the layer.
        max_chunk_tokens, max_chunk_bytes: a call of more tokens, or whose intermediates need more bytes, runs chunk by
            chunk; None sets no bound. The result is the same.
        quant: quantisation of the routed and the shared experts; None has none.
        nan_policy: rows whose weights come out NaN or infinite, from logits that are: ``propagate`` (valid ids, those
            weights), ``zero`` (valid ids, weights 0) or ``raise`` (RoutingError; waits for the device).
        check_ids: check ids that come from outside the gate. None: where it costs no device synchronisation.
        check_layout: at bind, compare one expert of weights that a backend has repacked with the dense formula, on two
            tokens (BindError names the likely cause). Experts that own routing are not compared.

    Raises:
        ConfigError: names the field, its value, what was expected and what to change.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    _: dataclasses.KW_ONLY

    scoring_func: str = "softmax"
    score_before_topk: bool = True
    renormalize: bool = False
    renorm_eps: float = 0.0
    renorm_clamp_min: float | None = None
    num_expert_group: int | None = None
    topk_group: int | None = None
    group_score: str = "max"
    group_mask_value: float = -math.inf
    gate_bias: bool | None = None
    e_score_correction_bias: bool | None = None
    routed_scaling_factor: float = 1.0
    apply_routed_scale_to_output: bool = False
    apply_router_weight_on_input: bool = False
    router_logit_scale: float = 1.0
    router_logit_softcap: float | None = None
    zero_expert_num: int = 0
    zero_expert_type: str | None = None
    per_expert_scale: bool = False
    hash_routing: bool = False
    sparsemixer_jitter: float | None = None
    custom_routing_function: Callable[..., Any] | None = None
    simulated_routing: str | None = None
    simulated_seed: int = 0
    simulated_zipf_skew: float = 1.0
    expert_capacity: int | None = None

    activation: str | Callable[..., Any] = "silu"
    custom_activation_function: Callable[..., Any] | None = None
    gated: bool = True
    w13_interleaved: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    swiglu_beta: float = 0.0
    expert_bias: bool | None = None
    post_expert_norm_eps: float | None = None
    post_expert_norm_scale_first: bool = False

    shared_intermediate_size: int | None = None
    num_shared_experts: int = 1
    shared_expert_gate: bool = False
    shared_expert_bias: bool | None = None
    shared_expert_combination: str = "sum"
    shared_experts_order: str = "overlap"
    shared_experts_stream_token_threshold: int = 256

    moe_latent_size: int | None = None
    num_local_experts: int | None = None
    reduce_results: bool = True
    max_chunk_tokens: int | None = None
    max_chunk_bytes: int | None = None
    quant: QuantConfig | None = None
    nan_policy: str = "propagate"
    check_ids: bool | None = None
    check_layout: bool = True

    def __post_init__(self) -> None:
        self._check_sizes()
        check_groups(self)
        check_router(self)
        self._check_experts()
        self._check_shared()
        for field, known in (("nan_policy", ("propagate", "zero", "raise")),):
            value = getattr(self, field)
            require(value in known, field, value, f"one of {', '.join(known)}", "choose one")

    # Derived values that more than one backend needs.

    @property
    def num_router_outputs(self) -> int:
        """E plus the zero experts: the width of ``router_logits``."""
        return self.num_experts + self.zero_expert_num

    @property
    def num_held_experts(self) -> int:
        """How many experts the weights hold: the local ones, or all."""
        return self.num_experts if self.num_local_experts is None else self.num_local_experts

    @property
    def expert_hidden_size(self) -> int:
        """The width in which the routed experts work."""
        return self.moe_latent_size or self.hidden_size

    @property
    def output_scale(self) -> float:
        """What whoever sums the routed experts multiplies their sum by, once."""
        return self.routed_scaling_factor if self.apply_routed_scale_to_output else 1.0

    @property
    def has_shared_experts(self) -> bool:
        """Whether the layer has shared experts."""
        return self.shared_intermediate_size is not None

    @property
    def has_groups(self) -> bool:
        """Whether routing is limited to groups of experts."""
        return self.num_expert_group is not None and self.num_expert_group > 1

    @property
    def w13_rows(self) -> int:
        """Rows of one expert's first product: 2I when gated, I when not."""
        return self.intermediate_size * (2 if self.gated else 1)

    def _check_sizes(self) -> None:
        for field in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            value = getattr(self, field)
            require(is_int(value) and value > 0, field, value, "a positive int", "pass the layer's size")
        optional = (
            "shared_intermediate_size",
            "moe_latent_size",
            "expert_capacity",
            "max_chunk_tokens",
            "max_chunk_bytes",
        )
        for field in optional:
            value = getattr(self, field)
            require(
                value is None or (is_int(value) and value > 0),
                field,
                value,
                "None or a positive int",
                "None leaves it out",
            )
        local = self.num_local_experts
        require(
            local is None or (is_int(local) and 0 <= local <= self.num_experts),
            "num_local_experts",
            local,
            f"None or 0 to num_experts={self.num_experts}",
            "num_experts is the global count; None holds all of them here",
        )
        require(
            is_int(self.zero_expert_num) and self.zero_expert_num >= 0,
            "zero_expert_num",
            self.zero_expert_num,
            "an int of at least 0",
            "0 has no zero experts",
        )
        require(
            self.top_k <= self.num_router_outputs,
            "top_k",
            self.top_k,
            f"at most num_experts + zero_expert_num = {self.num_router_outputs}",
            "a token cannot choose one expert twice: lower top_k or raise num_experts",
        )

    def _check_experts(self) -> None:
        if isinstance(self.activation, str):
            require(
                self.activation in ACTIVATIONS,
                "activation",
                self.activation,
                f"one of {', '.join(ACTIVATIONS)}, or a callable",
                "choose one",
            )
        else:
            require(callable(self.activation), "activation", self.activation, "a name or a callable", "choose one")
        require(
            self.swiglu_limit is None or (is_number(self.swiglu_limit) and self.swiglu_limit > 0),
            "swiglu_limit",
            self.swiglu_limit,
            "None or a positive number",
            "None clamps nothing; 0 would clamp everything",
        )
        require(
            self.custom_activation_function is None or callable(self.custom_activation_function),
            "custom_activation_function",
            self.custom_activation_function,
            "None or a callable",
            "pass fn(projected [..., 2I]) -> [..., I]",
        )
        special = self.swiglu_alpha != 1.0 or self.swiglu_beta != 0.0
        require(
            self.custom_activation_function is None or not (special or self.swiglu_limit is not None),
            "swiglu_limit, swiglu_alpha, swiglu_beta",
            (self.swiglu_limit, self.swiglu_alpha, self.swiglu_beta),
            "None, 1.0 and 0.0 with custom_activation_function",
            "the function replaces gating and clamps: do them in it",
        )
        eps = self.post_expert_norm_eps
        require(
            eps is None or (is_number(eps) and 0 <= eps < math.inf),
            "post_expert_norm_eps",
            eps,
            "None or a finite number of at least 0",
            "None has no norm",
        )
        require(
            not self.post_expert_norm_scale_first or self.post_expert_norm_eps is not None,
            "post_expert_norm_scale_first",
            self.post_expert_norm_scale_first,
            "False without post_expert_norm_eps",
            "set post_expert_norm_eps, or leave both out",
        )
        for field in ("swiglu_alpha", "swiglu_beta"):
            value = getattr(self, field)
            require(
                is_number(value) and math.isfinite(value),
                field,
                value,
                "a finite number",
                "alpha 1 and beta 0 are plain",
            )
        require(
            not special or (self.gated and self.activation == "silu"),
            "swiglu_alpha, swiglu_beta",
            (self.swiglu_alpha, self.swiglu_beta),
            "1.0 and 0.0 unless activation='silu' and gated=True",
            "they are parameters of SwiGLU",
        )
        require(
            self.gated or (self.swiglu_limit is None and not self.w13_interleaved),
            "gated",
            self.gated,
            "True with swiglu_limit or w13_interleaved",
            "experts without a gate have nothing to clamp or to interleave",
        )
        require(
            self.quant is None or isinstance(self.quant, QuantConfig),
            "quant",
            self.quant,
            "None or a QuantConfig",
            "pass QuantConfig(scheme=...)",
        )

    def _check_shared(self) -> None:
        require(
            is_int(self.num_shared_experts) and self.num_shared_experts > 0,
            "num_shared_experts",
            self.num_shared_experts,
            "a positive int",
            "leave shared_intermediate_size=None for none",
        )
        known = ("sum", "average")
        value = self.shared_expert_combination
        require(value in known, "shared_expert_combination", value, "'sum' or 'average'", "choose one")
        orders = ("overlap", "before", "after", "internal")
        value = self.shared_experts_order
        require(value in orders, "shared_experts_order", value, f"one of {', '.join(orders)}", "choose one")
        require(
            self.has_shared_experts or self.quant is None or self.quant.shared_scheme is None,
            "quant.shared_scheme",
            self.quant and self.quant.shared_scheme,
            "None without shared experts",
            "set shared_intermediate_size, or leave it out",
        )
        if not self.has_shared_experts:
            require(
                not self.shared_expert_gate and not self.shared_expert_bias,
                "shared_expert_gate, shared_expert_bias",
                (self.shared_expert_gate, self.shared_expert_bias),
                "False without shared experts",
                "set shared_intermediate_size, or leave them out",
            )
