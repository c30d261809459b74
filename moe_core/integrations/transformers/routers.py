"""transformers' routers, as MoEConfig fields and slots: one small reader a family, not one a model.

Every reader gets the router and its path in the block with the dot. What a family computes is in docs/routing.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConversionError
from .experts import Part
from .slots import FlatFloat, Slot

Reader = Callable[[Any, str], Part]
EPS = 1e-20


def softmax(router: Any, prefix: str) -> Part:
    """Softmax, then top-k; renormalised where the router says so."""
    return _linear(router, prefix, renormalize=bool(router.norm_topk_prob))


def softmax_renormalized(router: Any, prefix: str) -> Part:
    """Softmax, then top-k, then divided by the sum."""
    return _linear(router, prefix, renormalize=True)


def softmax_plain(router: Any, prefix: str) -> Part:
    """Softmax, then top-k."""
    return _linear(router, prefix)


def topk_softmax(router: Any, prefix: str) -> Part:
    """Top-k of the logits, then softmax over those."""
    return _linear(router, prefix, score_before_topk=False)


def topk_softmax_bias(router: Any, prefix: str) -> Part:
    """Top-k of the logits, which have a bias, then softmax over those."""
    part = topk_softmax(router, prefix)
    part.slots.append(Slot("gate_bias", (f"{prefix}bias",)))
    return part


def jetmoe(router: Any, prefix: str) -> Part:
    """Top-k of the logits, then softmax over those, from a linear layer."""
    return _linear(router, prefix, weight="layer.weight", score_before_topk=False)


def deepseek_v2(router: Any, prefix: str) -> Part:
    """Softmax, groups by their best expert; weights are scaled and not renormalised."""
    fields: dict[str, Any] = {"routed_scaling_factor": float(router.routed_scaling_factor)}
    if router.topk_method == "group_limited_greedy":
        fields |= groups(router, group_score="max", group_mask_value=0.0)
    elif router.topk_method != "greedy":
        raise ConversionError(f"topk_method={router.topk_method!r}: expected 'greedy' or 'group_limited_greedy'")
    return _linear(router, prefix, **fields)


def deepseek_v3(router: Any, prefix: str) -> Part:
    """Sigmoid plus bias, groups by the sum of their two best, masked with -inf."""
    return _sigmoid_groups(router, prefix, -math.inf)


def sigmoid_groups_zero_mask(router: Any, prefix: str) -> Part:
    """Sigmoid plus bias, groups by the sum of their two best where it has any, masked with 0."""
    return _sigmoid_groups(router, prefix, 0.0)


def _sigmoid_groups(router: Any, prefix: str, mask: float) -> Part:
    fields: dict[str, Any] = {
        "scoring_func": "sigmoid",
        "routed_scaling_factor": float(getattr(router, "routed_scaling_factor", 1.0)),
        **groups(router, group_score="top2_sum", group_mask_value=mask),
        **renormalized(router.norm_topk_prob, EPS),
    }
    return with_bias(_linear(router, prefix, **fields), f"{prefix}e_score_correction_bias")


def mistral4(router: Any, prefix: str) -> Part:
    """Softmax, groups by the sum of their two best without a bias."""
    fields: dict[str, Any] = {
        "routed_scaling_factor": float(router.routed_scaling_factor),
        **groups(router, group_score="top2_sum", group_mask_value=0.0),
        **renormalized(getattr(router, "norm_topk_prob", True), EPS),
    }
    return _linear(router, prefix, **fields)


def sigmoid_bias(bias: str | None = None, eps: float = 0.0, scale: str | None = None) -> Reader:
    """Sigmoid plus bias, no groups, renormalised.

    Args:
        bias: the bias's name in the block; None: in the router.
        eps: added to the sum. scale: the router's attribute with the scaling factor.
    """

    def read(router: Any, prefix: str) -> Part:
        factor = 1.0 if scale is None else float(getattr(router, scale))
        name = bias or f"{prefix}e_score_correction_bias"
        part = _linear(
            router, prefix, scoring_func="sigmoid", routed_scaling_factor=factor, renormalize=True, renorm_eps=eps
        )
        return with_bias(part, name)

    read.__doc__ = "Sigmoid plus bias, renormalised."
    return read


def afmoe(router: Any, prefix: str) -> Part:
    """Sigmoid plus the block's bias; the router is a linear layer of its own."""
    part = _linear(
        router,
        prefix,
        weight="gate.weight",
        scoring_func="sigmoid",
        routed_scaling_factor=float(router.route_scale),
        renormalize=True,
        renorm_eps=EPS,
    )
    return with_bias(part, "expert_bias")


def muse_spark(router: Any, prefix: str) -> Part:
    """Sigmoid of scaled logits, plus bias."""
    part = sigmoid_bias(eps=float(router.norm_topk_prob_eps), scale="routed_scaling_factor")(router, prefix)
    part.fields["router_logit_scale"] = float(router.output_multiplier)
    return part


def laguna(router: Any, prefix: str) -> Part:
    """Sigmoid of capped logits, plus bias."""
    part = sigmoid_bias()(router, prefix)
    if router.router_logit_softcapping > 0.0:
        part.fields["router_logit_softcap"] = float(router.router_logit_softcapping)
    return part


def lfm2(router: Any, prefix: str) -> Part:
    """Sigmoid, the block's bias if it is used, and an epsilon of its own."""
    fields = {
        "scoring_func": "sigmoid",
        "routed_scaling_factor": float(router.routed_scaling_factor),
        **renormalized(router.norm_topk_prob, 1e-6),
    }
    part = _linear(router, prefix, **fields)
    return with_bias(part, "expert_bias") if router.use_expert_bias else part


def flint(router: Any, prefix: str) -> Part:
    """Sigmoid without a bias."""
    return _linear(router, prefix, scoring_func="sigmoid", renormalize=bool(router.norm_topk_prob))


def kolibri(router: Any, prefix: str) -> Part:
    """Top-k of logits plus bias; the sigmoid of the chosen logits."""
    part = _linear(
        router, prefix, scoring_func="sigmoid", score_before_topk=False, renormalize=bool(router.norm_topk_prob)
    )
    return with_bias(part, f"{prefix}e_score_correction_bias")


def cohere2(router: Any, prefix: str) -> Part:
    """Top-k of the logits, then softmax over those, or their sigmoids."""
    sigmoid = router.expert_selection_fn == "sigmoid"
    return _linear(
        router,
        prefix,
        score_before_topk=False,
        scoring_func=router.expert_selection_fn,
        renormalize=sigmoid and bool(router.norm_topk_prob),
    )


def ernie(router: Any, prefix: str) -> Part:
    """Softmax plus bias; the sum of the weights is bounded from below."""
    part = _linear(router, prefix, renormalize=True, renorm_clamp_min=float(router.norm_min))
    return with_bias(part, f"{prefix}moe_statics.e_score_correction_bias")


def hunyuan(router: Any, prefix: str) -> Part:
    """Softmax, renormalised, from a linear layer."""
    return _linear(router, prefix, weight="wg.weight", renormalize=True)


def longcat(router: Any, prefix: str) -> Part:
    """Softmax plus bias over experts and zero experts, not renormalised.

    transformers leaves the classifier's own bias out of the logits.
    """
    part = _linear(
        router, prefix, weight="classifier.weight", routed_scaling_factor=float(router.routed_scaling_factor)
    )
    return with_bias(part, f"{prefix}e_score_correction_bias")


def llama4(router: Any, prefix: str) -> Part:
    """Top-k of the logits, their sigmoids, on the experts' inputs."""
    return _linear(router, prefix, scoring_func="sigmoid", score_before_topk=False, apply_router_weight_on_input=True)


def phimoe(router: Any, prefix: str) -> Part:
    """Sparsemixer, as at inference: two experts, whatever ``top_k`` says."""
    part = _linear(router, prefix, sparsemixer_jitter=float(router.router_jitter_noise))
    part.fields["top_k"] = 2
    return part


_SCORES = {"SqrtSoftplusActivation": "sqrtsoftplus", "Sigmoid": "sigmoid", "Softmax": "softmax"}


def deepseek_v4(router: Any, prefix: str) -> Part:
    """A score function by name, plus bias; or ids by token."""
    kind = type(router.score_fn).__name__
    if kind not in _SCORES:
        raise ConversionError(f"score_fn is a {kind}, expected one of {', '.join(_SCORES)}")
    part = _linear(
        router,
        prefix,
        scoring_func=_SCORES[kind],
        routed_scaling_factor=float(router.routed_scaling_factor),
        renormalize=True,
        renorm_eps=EPS,
    )
    if hasattr(router, "tid2eid"):
        part.fields["hash_routing"] = True
        part.slots.append(Slot("tid2eid", (f"{prefix}tid2eid",)))
        return part
    return with_bias(part, f"{prefix}e_score_correction_bias")


@dataclass(frozen=True)
class SoftmaxPNorm:
    """Softmax, top-k, divided by the p-norm: the custom routing of DBRX where p is not 1."""

    p: float

    def __call__(
        self, hidden_states: Tensor, router_logits: Tensor, top_k: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        scores, ids = torch.sort(router_logits.float().softmax(dim=-1), dim=-1, descending=True, stable=True)
        topk_weights = scores[:, :top_k]
        return topk_weights / torch.norm(topk_weights, p=self.p, dim=-1, keepdim=True), ids[:, :top_k]


def dbrx(block: Any, prefix: str) -> Part:
    """Softmax, top-k, divided by a p-norm; the settings are the block's."""
    p = block.moe_normalize_expert_weights
    fields: dict[str, Any] = {"top_k": int(block.top_k)}
    if p == 1:
        fields["renormalize"] = True
    elif p is not None:
        fields["custom_routing_function"] = SoftmaxPNorm(float(p))
    return Part(fields, [Slot("gate_weight", (f"{prefix}layer.weight",))])


def groups(router: Any, **fields: Any) -> dict[str, Any]:
    """Group fields where there is more than one group."""
    if router.num_group is None or router.num_group == 1:
        return {}
    return {"num_expert_group": int(router.num_group), "topk_group": int(router.topk_group), **fields}


def renormalized(on: Any, eps: float) -> dict[str, Any]:
    """``renormalize`` with an epsilon, or nothing."""
    return {"renormalize": True, "renorm_eps": eps} if on else {}


def with_bias(part: Part, name: str) -> Part:
    """The correction bias, in float32 whatever the model's dtype."""
    part.slots.append(Slot("e_score_correction_bias", (name,), FlatFloat()))
    return part


def _linear(router: nn.Module, prefix: str, *, weight: str = "weight", **fields: Any) -> Part:
    fields["top_k"] = int(router.top_k)  # type: ignore[arg-type]
    return Part(fields, [Slot("gate_weight", (f"{prefix}{weight}",))])
