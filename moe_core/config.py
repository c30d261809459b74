"""What an MoE layer computes, as data: :class:`MoEConfig` and :class:`QuantConfig`.

Field names are those of the field (vLLM's where it has one); impossible combinations are refused here, at
construction, so that no backend ever has to guess what they might mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .activations import ACTIVATIONS
from .errors import ConfigError

ScoringFunc = Literal["softmax", "sigmoid", "sqrtsoftplus"]
QUANT_SCHEMES = (
    "fp8_tensor",
    "fp8_channel",
    "fp8_block",
    "int8_w8a8",
    "int8_weight_only",
    "int4_weight_only",
    "mxfp4",
    "nvfp4",
)


def _require(holds: object, field: str, value: object, expected: str, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{field}={value!r}: expected {expected}; {remedy}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class QuantConfig:
    """How expert weights are quantised.

    Args:
        scheme: one of :data:`QUANT_SCHEMES` for the routed experts.
        shared_scheme: the same for the shared experts; None keeps them unquantised.
        group_size: elements of K that share a scale in weight-only schemes; -1 is one scale a row.
        block_shape: (rows, columns) that share a scale in ``fp8_block``.
        symmetric: False when the checkpoint carries zero points.

    Raises:
        ConfigError: an unknown scheme, group size or block shape.
    """

    scheme: str
    shared_scheme: str | None = None
    group_size: int = -1
    block_shape: tuple[int, int] | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        for field in ("scheme", "shared_scheme"):
            value = getattr(self, field)
            if field == "scheme" or value is not None:
                _require(value in QUANT_SCHEMES, field, value, f"one of {', '.join(QUANT_SCHEMES)}", "choose one")
        _require(
            self.group_size in (-1, 16, 32, 64, 128),
            "group_size",
            self.group_size,
            "-1, 16, 32, 64 or 128",
            "choose one",
        )
        if self.scheme == "fp8_block":
            _require(
                self.block_shape is not None and len(self.block_shape) == 2 and all(b > 0 for b in self.block_shape),
                "block_shape",
                self.block_shape,
                "two positive sizes with fp8_block",
                "pass (128, 128) as DeepSeek-V3 has it",
            )
        else:
            _require(
                self.block_shape is None, "block_shape", self.block_shape, "None", "only fp8_block has a block shape"
            )


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
        renorm_clamp_min: lower bound of that sum instead (ERNIE); None has none.
        num_expert_group: G, experts are split into G equal groups; None or 1 has no grouping.
        topk_group: groups kept for each token.
        group_score: a group's score: its ``max`` (DeepSeek-V2) or the sum of its two best (``top2_sum``).
        group_mask_value: selection score of experts outside the kept groups.
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
        custom_routing_function: ``fn(hidden_states, router_logits, top_k, renormalize) -> (weights, ids)``.
        simulated_routing: ``uniform`` or ``zipf`` ignores the router; for benchmarks.
        simulated_seed, simulated_zipf_skew: of the simulation.

        activation: a name of :data:`moe_core.activations.ACTIVATIONS` or a callable on a tensor.
        custom_activation_function: ``fn(projected) -> inner`` from the first product [..., 2I] (or [..., I]) to
            [..., I]; replaces ``activation``, the gating and the clamps.
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
        quant: quantisation of the experts.
        nan_policy: rows whose scores are NaN: ``propagate`` (valid ids, NaN weights), ``zero`` (valid ids, weight 0)
            or ``raise`` (RoutingError; waits for the device).
        check_ids: check ids that come from outside the gate. None: where it costs no device synchronisation.
        check_layout: at bind, compare one expert of weights that a backend has repacked with the dense formula, on two
            tokens (BindError names the likely cause). Quantised weights and experts that own routing are not compared.

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
        self._check_gate()
        self._check_groups()
        self._check_experts()
        self._check_shared()
        for field, known in (("nan_policy", ("propagate", "zero", "raise")),):
            value = getattr(self, field)
            _require(value in known, field, value, f"one of {', '.join(known)}", "choose one")

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
            _require(_is_int(value) and value > 0, field, value, "a positive int", "pass the layer's size")
        for field in ("shared_intermediate_size", "moe_latent_size", "max_chunk_tokens", "max_chunk_bytes"):
            value = getattr(self, field)
            _require(
                value is None or (_is_int(value) and value > 0),
                field,
                value,
                "None or a positive int",
                "None leaves it out",
            )
        local = self.num_local_experts
        _require(
            local is None or (_is_int(local) and 0 <= local <= self.num_experts),
            "num_local_experts",
            local,
            f"None or 0 to num_experts={self.num_experts}",
            "num_experts is the global count; None holds all of them here",
        )
        _require(
            _is_int(self.zero_expert_num) and self.zero_expert_num >= 0,
            "zero_expert_num",
            self.zero_expert_num,
            "an int of at least 0",
            "0 has no zero experts",
        )
        _require(
            self.top_k <= self.num_router_outputs,
            "top_k",
            self.top_k,
            f"at most num_experts + zero_expert_num = {self.num_router_outputs}",
            "a token cannot choose one expert twice: lower top_k or raise num_experts",
        )

    def _check_gate(self) -> None:
        known = ("softmax", "sigmoid", "sqrtsoftplus")
        _require(
            self.scoring_func in known, "scoring_func", self.scoring_func, f"one of {', '.join(known)}", "choose one"
        )
        _require(
            self.renorm_eps >= 0 and math.isfinite(self.renorm_eps),
            "renorm_eps",
            self.renorm_eps,
            "a finite number of at least 0",
            "0 adds nothing",
        )
        if self.renorm_eps or self.renorm_clamp_min is not None:
            _require(
                self.renormalize,
                "renormalize",
                self.renormalize,
                "True with renorm_eps or renorm_clamp_min",
                "set renormalize=True or leave both out: they would have no effect",
            )
        _require(
            math.isfinite(self.routed_scaling_factor),
            "routed_scaling_factor",
            self.routed_scaling_factor,
            "a finite number",
            "1.0 scales nothing",
        )
        _require(
            math.isfinite(self.router_logit_scale) and self.router_logit_scale != 0,
            "router_logit_scale",
            self.router_logit_scale,
            "a finite number other than 0",
            "1.0 scales nothing",
        )
        _require(
            self.router_logit_softcap is None or self.router_logit_softcap > 0,
            "router_logit_softcap",
            self.router_logit_softcap,
            "None or a positive number",
            "None caps nothing",
        )
        if not self.score_before_topk:
            _require(
                not self.has_groups,
                "num_expert_group",
                self.num_expert_group,
                "None with score_before_topk=False",
                "groups are ranked by scores: set score_before_topk=True",
            )
        _require(
            not (self.apply_router_weight_on_input and self.top_k > 1),
            "top_k",
            self.top_k,
            "1 with apply_router_weight_on_input",
            "a weight on the input equals one on the output only for linear experts: drop the flag or set top_k=1",
        )
        if self.zero_expert_num:
            _require(
                self.zero_expert_type == "identity",
                "zero_expert_type",
                self.zero_expert_type,
                "'identity' where zero_expert_num > 0",
                "set it, or zero_expert_num=0",
            )
        if self.sparsemixer_jitter is not None:
            _require(
                self.top_k == 2, "top_k", self.top_k, "2 with sparsemixer_jitter", "sparsemixer chooses two experts"
            )
        known_simulations = (None, "uniform", "zipf")
        _require(
            self.simulated_routing in known_simulations,
            "simulated_routing",
            self.simulated_routing,
            "None, 'uniform' or 'zipf'",
            "choose one",
        )
        _require(
            self.custom_routing_function is None or callable(self.custom_routing_function),
            "custom_routing_function",
            self.custom_routing_function,
            "None or a callable",
            "pass fn(hidden_states, router_logits, top_k, renormalize) -> (weights, ids)",
        )
        chosen = [
            name
            for name, on in (
                ("hash_routing", self.hash_routing),
                ("sparsemixer_jitter", self.sparsemixer_jitter is not None),
                ("custom_routing_function", self.custom_routing_function is not None),
                ("simulated_routing", self.simulated_routing is not None),
            )
            if on
        ]
        _require(len(chosen) < 2, "routing method", chosen, "at most one of these", "leave the others out")

    def _check_groups(self) -> None:
        groups, kept = self.num_expert_group, self.topk_group
        known = ("max", "top2_sum")
        _require(self.group_score in known, "group_score", self.group_score, f"one of {', '.join(known)}", "choose one")
        if groups is None:
            _require(kept in (None, 1), "topk_group", kept, "None without num_expert_group", "pass both or neither")
            return
        _require(
            _is_int(groups) and 0 < groups <= self.num_experts and self.num_experts % groups == 0,
            "num_expert_group",
            groups,
            f"a divisor of num_experts={self.num_experts}",
            "groups have equal sizes",
        )
        if groups == 1 and kept is None:
            return
        _require(
            kept is not None and _is_int(kept) and 0 < kept <= groups,
            "topk_group",
            kept,
            f"1 to num_expert_group={groups}",
            "pass the number of groups kept for each token",
        )
        if groups == 1:
            return
        size = self.num_experts // groups
        _require(
            self.zero_expert_num == 0,
            "zero_expert_num",
            self.zero_expert_num,
            "0 with groups",
            "zero experts belong to no group",
        )
        assert kept is not None
        _require(
            self.top_k <= kept * size,
            "top_k",
            self.top_k,
            f"at most topk_group * (num_experts / num_expert_group) = {kept * size}",
            "the kept groups hold too few experts: raise topk_group or lower top_k",
        )
        _require(
            not (self.group_score == "top2_sum" and size < 2),
            "group_score",
            self.group_score,
            "'max' where a group has one expert",
            "two experts are needed for a sum of two: lower num_expert_group",
        )
        _require(
            not math.isnan(self.group_mask_value) and self.group_mask_value <= 0,
            "group_mask_value",
            self.group_mask_value,
            "0 or less",
            "a mask above 0 would win over real scores: pass 0.0 or -inf",
        )

    def _check_experts(self) -> None:
        if isinstance(self.activation, str):
            _require(
                self.activation in ACTIVATIONS,
                "activation",
                self.activation,
                f"one of {', '.join(ACTIVATIONS)}, or a callable",
                "choose one",
            )
        else:
            _require(callable(self.activation), "activation", self.activation, "a name or a callable", "choose one")
        _require(
            self.swiglu_limit is None or self.swiglu_limit > 0,
            "swiglu_limit",
            self.swiglu_limit,
            "None or a positive number",
            "None clamps nothing; 0 would clamp everything",
        )
        _require(
            self.custom_activation_function is None or callable(self.custom_activation_function),
            "custom_activation_function",
            self.custom_activation_function,
            "None or a callable",
            "pass fn(projected [..., 2I]) -> [..., I]",
        )
        _require(
            not self.post_expert_norm_scale_first or self.post_expert_norm_eps is not None,
            "post_expert_norm_scale_first",
            self.post_expert_norm_scale_first,
            "False without post_expert_norm_eps",
            "set post_expert_norm_eps, or leave both out",
        )
        special = self.swiglu_alpha != 1.0 or self.swiglu_beta != 0.0
        _require(
            not special or (self.gated and self.activation == "silu"),
            "swiglu_alpha, swiglu_beta",
            (self.swiglu_alpha, self.swiglu_beta),
            "1.0 and 0.0 unless activation='silu' and gated=True",
            "they are parameters of SwiGLU",
        )
        _require(
            self.gated or (self.swiglu_limit is None and not self.w13_interleaved),
            "gated",
            self.gated,
            "True with swiglu_limit or w13_interleaved",
            "experts without a gate have nothing to clamp or to interleave",
        )
        _require(
            self.quant is None or isinstance(self.quant, QuantConfig),
            "quant",
            self.quant,
            "None or a QuantConfig",
            "pass QuantConfig(scheme=...)",
        )

    def _check_shared(self) -> None:
        _require(
            _is_int(self.num_shared_experts) and self.num_shared_experts > 0,
            "num_shared_experts",
            self.num_shared_experts,
            "a positive int",
            "leave shared_intermediate_size=None for none",
        )
        known = ("sum", "average")
        value = self.shared_expert_combination
        _require(value in known, "shared_expert_combination", value, "'sum' or 'average'", "choose one")
        orders = ("overlap", "before", "after", "internal")
        value = self.shared_experts_order
        _require(value in orders, "shared_experts_order", value, f"one of {', '.join(orders)}", "choose one")
        if not self.has_shared_experts:
            _require(
                not self.shared_expert_gate and not self.shared_expert_bias,
                "shared_expert_gate, shared_expert_bias",
                (self.shared_expert_gate, self.shared_expert_bias),
                "False without shared experts",
                "set shared_intermediate_size, or leave them out",
            )
