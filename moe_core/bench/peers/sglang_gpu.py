"""SGLang's Triton kernels for a GPU, as its ``fused_experts`` ships them."""

from __future__ import annotations

from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable, require

_HOMES = (  # where the function has lived, newest first
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe",
    "sglang.srt.layers.moe.fused_moe_triton.fused_moe",
)


def build(problem: Problem) -> Built:
    """From an installed SGLang or one in a given folder."""
    require("sglang", paths=problem.paths)
    function = None
    for home in _HOMES:
        try:
            function = require(home).fused_experts
            break
        except (Unavailable, AttributeError) as error:
            failed = error
    if function is None:
        raise Unavailable("broken", f"no fused_experts where this adapter looks for it: {failed}")
    output = require("sglang.srt.layers.moe.topk").StandardTopKOutput
    shape = problem.shape
    config = require("sglang.srt.layers.moe.moe_runner").MoeRunnerConfig(
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size_per_partition=shape.intermediate_size,
        params_dtype=problem.dtype,
        activation="silu",
        inplace=False,  # its default overwrites the input
    )
    w13, w2 = problem.experts

    def call(draw: Draw) -> Tensor:
        routed = output(draw.topk_weights, draw.topk_ids_int32, None)
        return function(draw.hidden_states, w13, w2, routed, config)  # type: ignore[no-any-return]

    return Built(call, f"sglang {getattr(require('sglang'), '__version__', '')}".strip())
