"""One line for each of transformers' MoE blocks: which router, which attribute names, what forward returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import experts, routers
from .experts import Part
from .routers import Reader


@dataclass(frozen=True)
class Adapter:
    """How to read one block class.

    Args:
        route: reads the router, or the block that has the router's settings.
        router: the router's attribute; that module stays, under its name.
        reads_block: ``route`` reads the block.
        router_dims: dimensions of the router's input: 2 for [T, H], 3 for [B, S, H].
        random_router: while training the router draws lots, and then it routes itself.
        experts: reads the routed experts off the block; None: they are its attribute ``experts``.
        shared: the shared experts' attribute; a block without it (or with None there) has none.
        shared_gate: the attribute of their sigmoid gate.
        combination: the attribute that says how shared and routed experts combine: ``sum`` or ``average``.
        output_scale: the block's attribute that scales the routed sum.
        input_transform, output_transform: attributes around the routed experts, in the order of their calls.
        after: a module that the sum passes through, or a parameter that is added to it.
        jitter: the dotted attribute with the noise on the input while training.
        result: ``hidden``, in the input's shape; ``batches`` for [B, -1, H]; ``scores`` for (hidden, topk_weights);
            ``shares`` for the same with float32 weights over k; ``logits`` for (hidden [T, H], router_logits);
            ``flat`` for the same, both flattened to one dimension.
    """

    route: Reader
    router: str = "gate"
    reads_block: bool = False
    router_dims: int = 2
    random_router: bool = False
    experts: Callable[[Any], Part] | None = None
    shared: str | None = None
    shared_gate: str | None = None
    combination: str | None = None
    output_scale: str | None = None
    input_transform: tuple[str, ...] = ()
    output_transform: tuple[str, ...] = ()
    after: str | None = None
    jitter: str | None = None
    result: str = "hidden"


def _qwen(route: Reader) -> Adapter:
    return Adapter(route, shared="shared_expert", shared_gate="shared_expert_gate")


_DEEPSEEK_V3 = Adapter(routers.deepseek_v3, shared="shared_experts")
_DEEPSEEK_V2 = Adapter(routers.deepseek_v2, shared="shared_experts")
_MISTRAL4 = Adapter(routers.mistral4, shared="shared_experts")
_GRANITE = Adapter(routers.topk_softmax, router="router")
_BLOCK_BIAS = "e_score_correction_bias"

ADAPTERS: dict[str, Adapter] = {
    "AXK1MoE": Adapter(routers.deepseek_v3, shared="shared_experts", after="post_mlp_layernorm"),
    "AXK2MoE": Adapter(routers.sigmoid_groups_zero_mask, shared="shared_experts"),
    "AfmoeSparseMoeBlock": Adapter(routers.afmoe, router="router", router_dims=3, shared="shared_experts"),
    "AriaTextMoELayer": Adapter(routers.topk_softmax, router="router", shared="shared_experts"),
    "BailingHybridMoE": _DEEPSEEK_V3,
    "BeamMoE": Adapter(routers.deepseek_v3, output_scale="routed_scaling_factor"),
    "Cohere2MoeSparseMoeBlock": Adapter(
        routers.cohere2, shared="shared_experts", combination="shared_expert_combination_strategy"
    ),
    "DbrxFFN": Adapter(
        routers.dbrx, router="router", reads_block=True, jitter="router.moe_jitter_eps", result="batches"
    ),
    "DeepseekOcr2TextMoe": _DEEPSEEK_V2,
    "DeepseekV2Moe": _DEEPSEEK_V2,
    "DeepseekV32MoE": _DEEPSEEK_V3,
    "DeepseekV3MoE": _DEEPSEEK_V3,
    "DeepseekV4SparseMoeBlock": Adapter(routers.deepseek_v4, shared="shared_experts"),
    "Dots1MoE": _DEEPSEEK_V3,
    "Dots3NoteTextMoE": _DEEPSEEK_V3,
    "Dots3NoteVisionMoE": Adapter(routers.sigmoid_bias(_BLOCK_BIAS, routers.EPS, "router_scaling_factor")),
    "Ernie4_5_MoeSparseMoeBlock": Adapter(routers.ernie, shared="shared_experts"),
    "Ernie4_5_VLMoeSparseMoeBlock": Adapter(routers.ernie, result="flat"),
    "ExaoneMoeSparseMoEBlock": _DEEPSEEK_V3,
    "FlexOlmoSparseMoeBlock": Adapter(routers.softmax),
    "FlintSparseMoeBlock": Adapter(routers.flint, shared="shared_expert"),
    "Glm4MoeLiteMoE": _DEEPSEEK_V3,
    "Glm4MoeMoE": _DEEPSEEK_V3,
    "Glm4vMoeTextMoE": _DEEPSEEK_V3,
    "Glm5NextTextMoE": _DEEPSEEK_V3,
    "GlmMoeDsaMoE": _DEEPSEEK_V3,
    "GptOssMLP": Adapter(routers.topk_softmax_bias, router="router", result="scores"),
    "GraniteMoeHybridMoE": _GRANITE,
    "GraniteMoeMoE": _GRANITE,
    "GraniteMoeSWAMoE": _GRANITE,
    "GraniteMoeSharedMoE": _GRANITE,
    "HYV3MoE": Adapter(
        routers.sigmoid_bias(_BLOCK_BIAS, routers.EPS, "router_scaling_factor"), shared="shared_experts"
    ),
    "HYV4MoE": _DEEPSEEK_V3,
    "HunYuanMoEV1Moe": Adapter(routers.hunyuan, shared="shared_mlp"),
    "Inkling2SparseMoeBlock": Adapter(routers.deepseek_v4),
    "JambaSparseMoeBlock": Adapter(routers.softmax_plain, router="router"),
    "JetMoeMoE": Adapter(routers.jetmoe, router="router", experts=experts.jetmoe, after="bias"),
    "KimiLinearMoE": _DEEPSEEK_V3,
    "Kolibri1SparseMoeBlock": Adapter(routers.kolibri, shared="shared_experts"),
    "LagunaSparseMoeBlock": Adapter(routers.laguna, shared="shared_experts", output_scale="routed_scaling_factor"),
    "Lfm2MoeSparseMoeBlock": Adapter(routers.lfm2),
    "Llama4TextMoe": Adapter(routers.llama4, router="router", shared="shared_expert", result="logits"),
    "LongcatFlashMoE": Adapter(routers.longcat, router="router"),
    "MellumSparseMoeBlock": Adapter(routers.softmax),
    "MiMoV2FlashMoE": Adapter(routers.deepseek_v3),
    "MiniMaxM2SparseMoeBlock": Adapter(routers.sigmoid_bias(_BLOCK_BIAS), jitter="jitter_noise"),
    "MiniMaxM3VLSparseMoeBlock": Adapter(
        routers.sigmoid_bias(), shared="shared_experts", output_scale="routed_scaling_factor"
    ),
    "MiniMaxSparseMoeBlock": Adapter(routers.softmax_renormalized, jitter="jitter_noise"),
    "Mistral4MoE": _MISTRAL4,
    "MistralLarge4TextMoE": _MISTRAL4,
    "MixtralSparseMoeBlock": Adapter(routers.softmax_renormalized, jitter="jitter_noise"),
    "MuseSparkMoE": Adapter(
        routers.muse_spark,
        input_transform=("pre_expert_proj", "pre_expert_norm"),
        output_transform=("post_expert_proj",),
    ),
    "NemotronHMoE": Adapter(
        routers.deepseek_v3,
        shared="shared_experts",
        input_transform=("fc1_latent_proj",),
        output_transform=("fc2_latent_proj",),
    ),
    "OlmoeSparseMoeBlock": Adapter(routers.softmax),
    # Its router divides by k and the block multiplies by it, so neither is done here.
    "OpenAIPrivacyFilterMLP": Adapter(routers.topk_softmax_bias, router="router", result="shares"),
    "PhimoeSparseMoeBlock": Adapter(routers.phimoe, router="router", random_router=True, jitter="input_jitter_noise"),
    "Qwen2MoeSparseMoeBlock": _qwen(routers.softmax),
    "Qwen3MoeSparseMoeBlock": Adapter(routers.softmax),
    "Qwen3NextSparseMoeBlock": _qwen(routers.softmax),
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": _qwen(routers.softmax),
    "Qwen3OmniMoeThinkerTextSparseMoeBlock": Adapter(routers.softmax),
    "Qwen3VLMoeTextSparseMoeBlock": Adapter(routers.softmax_renormalized),
    "Qwen3_5MoeSparseMoeBlock": _qwen(routers.softmax_renormalized),
    "Qwen4ExpTextSparseMoeBlock": _qwen(routers.softmax),
    "SolarOpenMoE": _DEEPSEEK_V3,
    "Step3p7SparseMoeBlock": Adapter(
        routers.sigmoid_bias(), shared="shared_experts", output_scale="routed_scaling_factor"
    ),
    "UnlimitedOcrTextMoe": _DEEPSEEK_V2,
}
