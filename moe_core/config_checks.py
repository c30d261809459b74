"""What a router cannot be: the checks of MoEConfig's routing fields."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import MoEConfig


def require(holds: object, field: str, value: object, expected: str, remedy: str) -> None:
    """Raise ConfigError unless ``holds``."""
    if not holds:
        raise ConfigError(f"{field}={value!r}: expected {expected}; {remedy}")


def is_int(value: object) -> bool:
    """An int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """An int or float that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_router(config: MoEConfig) -> None:
    """Values of single fields, and fields that would have no effect beside each other."""
    _check_scores(config)
    _check_method(config)
    require(
        not (config.apply_router_weight_on_input and config.top_k > 1),
        "top_k",
        config.top_k,
        "1 with apply_router_weight_on_input",
        "a weight on the input equals one on the output only for linear experts: drop the flag or set top_k=1",
    )
    if config.zero_expert_num:
        require(
            config.zero_expert_type == "identity",
            "zero_expert_type",
            config.zero_expert_type,
            "'identity' where zero_expert_num > 0",
            "set it, or zero_expert_num=0",
        )
    if config.expert_capacity is not None:
        for field in ("max_chunk_tokens", "max_chunk_bytes"):
            require(
                getattr(config, field) is None,
                field,
                getattr(config, field),
                "None with expert_capacity",
                "what an expert takes of a call would depend on the chunks",
            )


def _check_scores(config: MoEConfig) -> None:
    known = ("softmax", "sigmoid", "sqrtsoftplus")
    require(
        config.scoring_func in known, "scoring_func", config.scoring_func, f"one of {', '.join(known)}", "choose one"
    )
    eps, least = config.renorm_eps, config.renorm_clamp_min
    require(
        is_number(eps) and 0 <= eps < math.inf,
        "renorm_eps",
        eps,
        "a finite number of at least 0",
        "0 adds nothing",
    )
    require(
        least is None or (is_number(least) and 0 < least < math.inf),
        "renorm_clamp_min",
        least,
        "None or a positive finite number",
        "None has no bound of its own",
    )
    factor, scale, cap = config.routed_scaling_factor, config.router_logit_scale, config.router_logit_softcap
    require(
        is_number(factor) and math.isfinite(factor),
        "routed_scaling_factor",
        factor,
        "a finite number",
        "1.0 scales nothing",
    )
    require(
        is_number(scale) and math.isfinite(scale) and scale != 0,
        "router_logit_scale",
        scale,
        "a finite number other than 0",
        "1.0 scales nothing",
    )
    require(
        cap is None or (is_number(cap) and 0 < cap < math.inf),
        "router_logit_softcap",
        cap,
        "None or a positive finite number",
        "None caps nothing",
    )


def _check_method(config: MoEConfig) -> None:
    """Hash, sparsemixer, custom and simulated routing: one at most, and without the fields that it leaves unread."""
    jitter, function, skew = config.sparsemixer_jitter, config.custom_routing_function, config.simulated_zipf_skew
    require(
        jitter is None or (is_number(jitter) and 0 <= jitter < math.inf),
        "sparsemixer_jitter",
        jitter,
        "None or a finite number of at least 0",
        "None does not route by sparsemixer",
    )
    require(
        jitter is None or config.top_k == 2,
        "top_k",
        config.top_k,
        "2 with sparsemixer_jitter",
        "sparsemixer chooses two experts",
    )
    require(
        config.simulated_routing in (None, "uniform", "zipf"),
        "simulated_routing",
        config.simulated_routing,
        "None, 'uniform' or 'zipf'",
        "choose one",
    )
    require(is_int(config.simulated_seed), "simulated_seed", config.simulated_seed, "an int", "0 is as good as any")
    require(
        is_number(skew) and 0 <= skew < math.inf,
        "simulated_zipf_skew",
        skew,
        "a finite number of at least 0",
        "0 is uniform, 1 is Zipf's law",
    )
    require(
        function is None or callable(function),
        "custom_routing_function",
        function,
        "None or a callable",
        "pass fn(hidden_states, router_logits, top_k, renormalize) -> (weights, ids)",
    )
    methods = {
        "hash_routing": config.hash_routing,
        "sparsemixer_jitter": jitter is not None,
        "custom_routing_function": function is not None,
        "simulated_routing": config.simulated_routing is not None,
    }
    chosen = [name for name, on in methods.items() if on]
    require(len(chosen) < 2, "routing method", chosen, "at most one of these", "leave the others out")
    if not chosen or config.simulated_routing is not None:
        return  # a simulation stands in for whatever router the layer has, and reads nothing of it
    unread = {
        "e_score_correction_bias": bool(config.e_score_correction_bias),
        "num_expert_group": config.has_groups,
    }
    if not config.hash_routing:
        unread |= {
            "scoring_func": config.scoring_func != "softmax",
            "score_before_topk": not config.score_before_topk,
        }
    if function is not None:
        unread |= {
            "renorm_eps": config.renorm_eps != 0,
            "renorm_clamp_min": config.renorm_clamp_min is not None,
        }
    for field, is_set in unread.items():
        require(
            not is_set,
            field,
            getattr(config, field),
            f"its default with {chosen[0]}",
            f"{chosen[0]} does not read it: leave it out",
        )


def check_groups(config: MoEConfig) -> None:
    """Groups of equal size, of which enough are kept."""
    groups, kept = config.num_expert_group, config.topk_group
    known = ("max", "top2_sum")
    require(config.group_score in known, "group_score", config.group_score, f"one of {', '.join(known)}", "choose one")
    if groups is None:
        require(kept in (None, 1), "topk_group", kept, "None without num_expert_group", "pass both or neither")
        return
    require(
        is_int(groups) and 0 < groups <= config.num_experts and config.num_experts % groups == 0,
        "num_expert_group",
        groups,
        f"a divisor of num_experts={config.num_experts}",
        "groups have equal sizes",
    )
    if groups == 1 and kept is None:
        return
    require(
        kept is not None and is_int(kept) and 0 < kept <= groups,
        "topk_group",
        kept,
        f"1 to num_expert_group={groups}",
        "pass the number of groups kept for each token",
    )
    if groups == 1:
        return
    require(
        config.score_before_topk,
        "num_expert_group",
        groups,
        "None with score_before_topk=False",
        "groups are ranked by scores: set score_before_topk=True",
    )
    require(
        config.zero_expert_num == 0,
        "zero_expert_num",
        config.zero_expert_num,
        "0 with groups",
        "zero experts belong to no group",
    )
    size, mask = config.num_experts // groups, config.group_mask_value
    assert kept is not None
    require(
        config.top_k <= kept * size,
        "top_k",
        config.top_k,
        f"at most topk_group * (num_experts / num_expert_group) = {kept * size}",
        "the kept groups hold too few experts: raise topk_group or lower top_k",
    )
    require(
        not (config.group_score == "top2_sum" and size < 2),
        "group_score",
        config.group_score,
        "'max' where a group has one expert",
        "two experts are needed for a sum of two: lower num_expert_group",
    )
    require(
        is_number(mask) and mask <= 0,
        "group_mask_value",
        mask,
        "0 or less",
        "a mask above 0 would win over real scores: pass 0.0 or -inf",
    )
