"""The oneDNN strategy: prepacked products, in a loop over the experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core import MoEConfig, Verdict
from moe_core.activations import apply_activation
from moe_core.platform import Platform

from .given import Matrices
from .loop import ExpertLoop


def verdict(platform: Platform) -> Verdict:
    """oneDNN with the two operators that this strategy calls; float32, and bfloat16 where the processor has it."""
    if not torch.backends.mkldnn.is_available():
        return Verdict.no(
            "this build of torch has no oneDNN (torch.backends.mkldnn.is_available() is False)",
            "install torch's official CPU wheel for x86-64 or aarch64",
        )
    missing = [name for name in ("_reorder_linear_weight", "_linear_pointwise") if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        return Verdict.no(f"torch {torch.__version__} lacks mkldnn::{missing[0]}", "install torch >= 2.8")
    if platform.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Verdict.no(
            "the processor lacks the vector instructions that oneDNN needs for bfloat16 (AVX-512 or newer)",
            "use float32",
        )
    return Verdict.yes()


@dataclass(frozen=True)
class Linear:
    """One product y = x w^T + b with w in oneDNN's blocked layout."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """From [N, K]; the copy is what oneDNN makes."""
        dense = weight.detach().contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(dense, None)
        return cls(packed, None if bias is None else bias.detach().to(weight.dtype).contiguous())

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """x [n, K] -> [n, N]; ``swish`` is fused."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")  # type: ignore[no-any-return]

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x w^T + b) * other, fused."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PackedExpert:
    """One expert. Plain SwiGLU keeps gate and up apart, so that both are fused into their products."""

    config: MoEConfig
    w13: Linear | None
    gate: Linear | None
    up: Linear | None
    w2: Linear

    @classmethod
    def pack(cls, config: MoEConfig, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None) -> PackedExpert:
        """From [2I, H] and [H, I]."""
        down = Linear.pack(w2, b2)
        if not is_plain_swiglu(config):
            return cls(config, Linear.pack(w13, b13), None, None, down)
        half = w13.shape[0] // 2
        if config.w13_interleaved:
            gate, up = (w13[0::2], w13[1::2])
            gate_bias, up_bias = (None, None) if b13 is None else (b13[0::2], b13[1::2])
        else:
            gate, up = w13[:half], w13[half:]
            gate_bias, up_bias = (None, None) if b13 is None else (b13[:half], b13[half:])
        return cls(config, None, Linear.pack(gate, gate_bias), Linear.pack(up, up_bias), down)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, H] -> [n, H], n > 0."""
        if x.shape[0] == 1:
            # oneDNN has a kernel for one row that sums in another order; a second row costs nothing measurable.
            return self(x.expand(2, -1).contiguous())[:1]
        if self.w13 is not None:
            # The activation runs in float32, as in the reference.
            return self.w2(apply_activation(self.config, self.w13(x).float()).to(x.dtype))
        assert self.gate is not None and self.up is not None
        return self.w2(self.up.times(x, self.gate(x, "swish")))


class OneDnnExperts(ExpertLoop):
    """The experts of one width."""

    @classmethod
    def pack(cls, config: MoEConfig, given: Matrices) -> OneDnnExperts:
        """Tensors, which are only read. One layout serves routed and shared experts."""
        packed = []
        for e in range(given.w13.shape[0]):
            biases = (None if bias is None else bias[e] for bias in (given.b13, given.b2))
            packed.append(PackedExpert.pack(config, given.w13[e], given.w2[e], *biases))
            given.spent("w13", e)
            given.spent("w2", e)
        return cls(tuple(packed))


def is_plain_swiglu(config: MoEConfig) -> bool:
    """Whether an expert's activation is silu(gate) * up and nothing else."""
    return (
        config.gated
        and config.activation == "silu"
        and config.custom_activation_function is None
        and config.swiglu_limit is None
        and config.swiglu_alpha == 1.0
        and config.swiglu_beta == 0.0
    )
