"""Shapes of MoE layers: by a name of :data:`SHAPES`, or by numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ..config import MoEConfig
from ..errors import BenchError
from ..quant.config import SCHEMES, QuantConfig

STAGES: Final = ("experts", "layer")
_NUMBERS = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(?:\+(\d+))?")


@dataclass(frozen=True)
class Shape:
    """The sizes of one layer and how it routes.

    Args:
        name: as on the command line.
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K.
        shared_intermediate_size: I_s of the shared experts together, 0 without any.
        routing: further fields of MoEConfig, ``shared_expert_gate`` among them.
        quant: ``scheme`` or ``scheme:group_size`` of the routed experts; empty leaves them as they are.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int = 0
    routing: Mapping[str, Any] = field(default_factory=dict)
    quant: str = ""

    def config(self, stage: str, dtype: str = "bfloat16") -> MoEConfig:
        """The layer; for the stage ``experts`` the same without shared experts. ``dtype`` is a quantised layer's."""
        shared = self.shared_intermediate_size if stage == "layer" else 0
        # Without shared experts there is nothing to gate.
        fields = {name: value for name, value in self.routing.items() if shared or name != "shared_expert_gate"}
        return MoEConfig(
            self.hidden_size,
            self.intermediate_size,
            self.num_experts,
            self.top_k,
            shared_intermediate_size=shared or None,
            quant=self.quant_config(dtype),
            **fields,
        )

    def quant_config(self, dtype: str) -> QuantConfig | None:
        """How routed experts are quantised; blocks have 128 x 128 weights."""
        if not self.quant:
            return None
        scheme, _, group = self.quant.partition(":")
        blocks = (128, 128) if SCHEMES[scheme].scales == "block" else None
        return QuantConfig(scheme, group_size=int(group or -1), block_shape=blocks, dtype=dtype)

    def quantised(self, quant: str) -> Shape:
        """The same layer in a scheme, ``scheme`` or ``scheme:group_size``, with that behind its name.

        Raises:
            BenchError: no such scheme. ConfigError: a group size that it has not.
        """
        scheme, _, group = quant.partition(":")
        if scheme not in SCHEMES or (group and not group.lstrip("-").isdigit()):
            raise BenchError(f"--quant {quant}: expected SCHEME or SCHEME:GROUP_SIZE of {', '.join(SCHEMES)}")
        made = replace(self, name=f"{self.name}/{quant}", quant=quant)
        made.config("layer")
        return made

    @property
    def rounds_activations(self) -> bool:
        """Whether products are of codes on both sides."""
        return bool(self.quant) and SCHEMES[self.quant.partition(":")[0]].activations is not None

    @property
    def plain(self) -> Shape:
        """Without quantisation."""
        return replace(self, quant="")

    def expert_weight_bytes(self, itemsize: int) -> int:
        """Bytes of all routed experts."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size * itemsize

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "shared_intermediate_size": self.shared_intermediate_size,
            "routing": dict(self.routing),
            **({"quant": self.quant} if self.quant else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Shape:
        """The inverse of :meth:`as_dict`."""
        return cls(**values)


_RENORMALIZED: Final = {"renormalize": True}
_DEEPSEEK_V3: Final = {
    "scoring_func": "sigmoid",
    "renormalize": True,
    "renorm_eps": 1e-20,
    "num_expert_group": 8,
    "topk_group": 4,
    "group_score": "top2_sum",
    "e_score_correction_bias": True,
    "routed_scaling_factor": 2.5,
}
# Sizes and routing of the published configs. gpt-oss has biases and a clamped SwiGLU of its own, which most peers lack:
# here its sizes run with plain SwiGLU, and softmax over the chosen logits as the renormalised softmax that it equals.
SHAPES: Final[Mapping[str, Shape]] = {
    shape.name: shape
    for shape in (
        Shape("small", 1024, 512, 32, 4, 0, _RENORMALIZED),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, 0, _RENORMALIZED),
        Shape("olmoe", 2048, 1024, 64, 8),
        Shape("deepseek-v2-lite", 2048, 1408, 64, 6, 2816),
        Shape("qwen1.5-moe-a2.7b", 2048, 1408, 60, 4, 5632, {"shared_expert_gate": True}),
        Shape("qwen2-moe-57b", 3584, 2560, 64, 8, 20480, {"shared_expert_gate": True}),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2, 0, _RENORMALIZED),
        Shape("gpt-oss-120b", 2880, 2880, 128, 4, 0, _RENORMALIZED),
        Shape("deepseek-v3", 7168, 2048, 256, 8, 2048, _DEEPSEEK_V3),
    )
}


def parse_shape(text: str) -> Shape:
    """A name of :data:`SHAPES`, or ``HxIxExK`` or ``HxIxExK+I_s`` (softmax routing, renormalised).

    Raises:
        BenchError: neither.
        ConfigError: numbers that make no layer.
    """
    if text in SHAPES:
        return SHAPES[text]
    match = _NUMBERS.fullmatch(text)
    if match is None:
        raise BenchError(
            f"shape {text!r}: expected one of {', '.join(SHAPES)}, or numbers HxIxExK such as 1024x512x32x4, "
            f"with +I_s behind them for shared experts"
        )
    h, i, e, k, shared = (int(group or 0) for group in match.groups())
    shape = Shape(text, h, i, e, k, shared, _RENORMALIZED)
    shape.config("layer")
    return shape
