"""What the TPU backend accepts, and what its stages get in place of plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, Verdict
from moe_core.platform import Platform

from .spec import FORMS, Spec, spec_of
from .target import ahead_of_time, chip

NEEDED_BY_CALL_JAX = ("jax", "jaxlib", "flax")
"""torch_xla's torchax needs flax without declaring it."""
FORM_VARIABLE = "MOE_TPU_FORM"


def probe(platform: Platform) -> Verdict:
    """torch_xla for tensors of device type ``xla``; nothing yet for torch_tpu's ``tpu``."""
    install = 'pip install "moe-core[tpu]" in an environment with torch 2.9'
    if platform.version("torch_xla") is None:
        if platform.version("torch_tpu") is not None:
            return Verdict.no(
                "torch_tpu is installed (device type tpu), and this version of moe-core has an adapter for torch_xla "
                "(device type xla) only",
                install,
            )
        return Verdict.no("torch_xla is not installed", install)
    if platform.device.type == "tpu":
        return Verdict.no(
            "weights on device type tpu (torch_tpu), and this version of moe-core has an adapter for torch_xla (device "
            "type xla) only",
            "move the weights to torch_xla.device()",
        )
    wanted = platform.env.get("PJRT_DEVICE", "")
    if wanted == "TPU":
        from torch_xla._internal import tpu

        if not tpu.num_available_chips():
            return Verdict.no(
                "PJRT_DEVICE=TPU, and this host has no TPU: torch_xla would wait for one for minutes",
                "set PJRT_DEVICE=CPU for XLA's own CPU device",
            )
    try:
        import torch_xla  # noqa: F401  # this makes the device type known; it starts no device
    except (ImportError, OSError) as error:
        return Verdict.no(f"torch_xla is installed and cannot be imported: {error}", install)
    return Verdict.yes()


def missing_for_jax(platform: Platform) -> list[str]:
    """The packages without which torch_xla cannot call jax functions."""
    return [name for name in NEEDED_BY_CALL_JAX if platform.version(name) is None]


def supports(config: MoEConfig, stage: str, platform: Platform) -> Verdict:
    """float32 and bfloat16 on XLA tensors; nothing quantised; no backward."""
    if config.quant is not None and stage in ("experts", "shared_experts"):
        return Verdict.no(
            f"no XLA form for quantised weights (scheme {config.quant.scheme}) yet",
            "dequantise them to bfloat16 and leave config.quant=None",
        )
    if platform.device.type != "xla":
        return Verdict.no(
            f"weights on {platform.device}, expected an XLA device", "move the weights to torch_xla.device()"
        )
    if platform.dtype is torch.float16:
        return Verdict.no("a TPU has no float16 product", "use bfloat16 or float32")
    if platform.env.get(FORM_VARIABLE, FORMS[0]) not in FORMS:
        return Verdict.no(
            f"{FORM_VARIABLE}={platform.env[FORM_VARIABLE]!r}, expected one of {', '.join(FORMS)}",
            f"unset {FORM_VARIABLE}",
        )
    return Verdict.yes()


@dataclass(frozen=True)
class XlaWeights:
    """The plain weights (router, shared experts and the dense form read them) and the packed experts.

    Args:
        gate, up, down: [E, H, I] twice (no ``up`` where the experts are not gated) and [E, I, H]: XLA's grouped product
            for TPUs contracts the middle dimension, and would copy all experts at each call to bring it there. None
            with the form ``dense``.
        ops: the operators of the adapter for these tensors.
        base: the spec of the layer, without a form.
        form: the one that was asked for; None leaves it to the tuning table.
        top_k, hidden: of the layer; H is that of its experts.
        chip: the kind of TPU, or ``cpu`` for XLA's own CPU device.
        seen: buckets that were traced.
        compiled_before: compilations of this process when the layer was bound.
    """

    plain: MoEWeights
    gate: Tensor | None
    up: Tensor | None
    down: Tensor | None
    ops: Any
    base: Spec
    form: str | None
    top_k: int
    hidden: int
    chip: str
    seen: set[int] = field(default_factory=set)
    compiled_before: int = 0

    def spec(self, tokens: int) -> Spec:
        """The spec for calls of so many tokens."""
        from .tuning import choose

        return choose(self.base, self.form, self.chip, tokens, self.top_k, self.hidden)

    def counters(self) -> Mapping[str, int]:
        """For the report: this layer's buckets, and what XLA compiled in this process since it was bound."""
        from .metrics import compilations

        return {"buckets": len(self.seen), "compilations": compilations() - self.compiled_before}


def prepare(config: MoEConfig, weights: MoEWeights, platform: Platform) -> XlaWeights:
    """Choose the operators, and transpose the experts once; ``weights`` are only read."""
    import torch_xla.runtime

    if torch_xla.runtime.is_spmd():
        from .parallel import check_not_marked

        check_not_marked(weights)
    missing = missing_for_jax(platform)
    form = platform.env.get(FORM_VARIABLE)
    if missing:
        from . import plain_ops as ops

        form = "dense"
    else:
        from . import adapter as ops  # type: ignore[no-redef]
    from .metrics import compilations

    packed = (None, None, None) if form == "dense" else pack(config, weights)
    return XlaWeights(
        weights,
        *packed,
        ops,
        spec_of(config),
        form,
        config.top_k,
        config.expert_hidden_size,
        chip(),
        compiled_before=compilations(),
    )


def pack(config: MoEConfig, weights: MoEWeights) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gate, up and down of all experts transposed; computed now, or they would be part of the first call's graph."""
    w13, w2 = weights.w13_weight, weights.w2_weight
    assert w13 is not None and w2 is not None
    experts, hidden, inner, dtype = (
        config.num_held_experts,
        config.expert_hidden_size,
        config.intermediate_size,
        w13.dtype,
    )
    if ahead_of_time():
        from torch_xla.core.xla_builder import create_placeholder_tensor as empty

        into = [empty((experts, hidden, inner), dtype) for _ in range(2 if config.gated else 1)]
        return into[0], into[1] if config.gated else None, empty((experts, inner, hidden), dtype)
    import torch_xla.core.xla_model as xm

    # The adapter's own operator, because views of weights are refused where a compiled graph binds anew.
    from .adapter import packed

    up = None
    if not config.gated:
        gate = packed(w13, 0, inner, 1)
    elif config.w13_interleaved:
        gate, up = packed(w13, 0, inner, 2), packed(w13, 1, inner, 2)
    else:
        gate, up = packed(w13, 0, inner, 1), packed(w13, inner, inner, 1)
    down = packed(w2, 0, config.expert_hidden_size, 1)
    xm.unlazy([tensor for tensor in (gate, up, down) if tensor is not None])
    return gate, up, down
