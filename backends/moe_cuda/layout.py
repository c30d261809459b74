"""What the CUDA backend accepts, and the weights as its kernels read them: where they lie, without a copy."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, Verdict
from moe_core.platform import Platform

from . import tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def probe(platform: Platform) -> Verdict:
    """triton, and a device or Triton's interpreter."""
    if platform.version("triton") is None:
        return Verdict.no("triton is not installed", 'pip install "moe-core[cuda]"')
    if platform.env.get("TRITON_INTERPRET", "0") == "1":
        return Verdict.yes()
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return Verdict.no(
                f"torch {torch.__version__} is a build without CUDA",
                "install a CUDA build of torch, on a machine with a GPU",
            )
        return Verdict.no(
            "torch sees no CUDA device", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or set TRITON_INTERPRET=1 to test"
        )
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 7:
            return Verdict.no(
                f"compute capability {major}.{minor}; Triton's kernels need 7.0", "use MOE_CORE_BACKEND=reference"
            )
    return Verdict.yes()


def supports(config: MoEConfig, stage: str, platform: Platform) -> Verdict:
    """bfloat16, float16 and float32; no backward."""
    if platform.dtype is not None and platform.dtype not in DTYPES:
        return Verdict.no(f"dtype {platform.dtype}", "use bfloat16, float16 or float32")
    if platform.dtype is torch.bfloat16 and not _has_bfloat16(platform):
        return Verdict.no(f"{platform.device} has no bfloat16 products", "use float16 or float32")
    if stage in ("experts", "shared_experts"):
        reason = _refused_experts(config, stage, platform)
        if reason is not None:
            return Verdict.no(*reason)
    if stage == "experts":
        return Verdict.yes(entry="op", strategy=_unverified(platform))
    return Verdict.yes(strategy=_why_plain_gate(config)) if stage == "gate" else Verdict.yes()


def _why_plain_gate(config: MoEConfig) -> str:
    from .gate import why_reference

    reason = why_reference(config)
    return f"plain torch on the device: {reason}" if reason else ""


def _unverified(platform: Platform) -> str:
    # What these kernels ran on: compute capability 9.0, and Triton's interpreter.
    if platform.device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        return "unverified on ROCm: these kernels never ran there"
    major, minor = torch.cuda.get_device_capability(platform.device)
    return "" if (major, minor) == (9, 0) else f"unverified on compute capability {major}.{minor}: never ran there"


def _has_bfloat16(platform: Platform) -> bool:
    if platform.device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(platform.device)[0] >= 8


def _refused_experts(config: MoEConfig, stage: str, platform: Platform) -> tuple[str, str] | None:
    from . import quantised
    from .kernels.activation import activation_constants

    if activation_constants(config) is None:
        return "the activation is a Python function, which no kernel can call", "name one, or use backend='reference'"
    if stage == "experts" and config.post_expert_norm_eps is not None:
        return "no kernel for a norm behind each expert", "use backend='reference' for this layer"
    on_gpu = platform.device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return quantised.refused(config, stage, torch.cuda.get_device_capability(platform.device) if on_gpu else None)


@dataclass(frozen=True)
class CudaWeights:
    """Canonical weights and all that a call needs to know about them.

    ``plain`` is what the gate and the shared experts read. ``first`` and ``second`` are the compile-time constants of
    the two products, ``sum`` those of a sum over the experts. ``kernels`` and ``tiles`` cache kernels by the choice
    that they were made for and descriptors for the tensor memory accelerator by their box, ``strategies`` is for the
    report.
    """

    plain: MoEWeights
    w13: Tensor
    w2: Tensor
    b13: Tensor | None
    b2: Tensor | None
    first: dict[str, Any]
    second: dict[str, Any]
    sum: dict[str, Any]
    choices: tuning.Choices
    strategies: dict[str, str]
    upcast: bool
    tma: bool
    loader: bool
    pdl: bool
    multiprocessors: int
    kernels: dict[Any, Any] = field(default_factory=dict)
    tiles: dict[tuple[str, int, int], Any] = field(default_factory=dict)

    def w13_tiles(self, n: int, k: int) -> Any:
        """Boxes of n gate rows and n up rows, k wide."""
        experts, rows, hidden = self.w13.shape
        half = rows // 2
        strides = (rows * hidden, half * hidden, hidden, 1)
        return self._tiles(("w13", n, k), (experts, 2, half, hidden), strides, [1, 2, n, k])

    def w2_tiles(self, n: int, k: int) -> Any:
        """Boxes of n rows, k wide."""
        experts, hidden, inner = self.w2.shape
        return self._tiles(("w2", n, k), (experts * hidden, inner), (inner, 1), [n, k])

    def loader_tiles(self, name: str, n: int) -> Any:
        """``w13`` or ``w2`` in boxes for ``kernels/hopper.py``."""
        found = self.tiles.get((name, n, 0))
        if found is None:
            from .kernels.hopper import boxes

            found = self.tiles[name, n, 0] = boxes(getattr(self, name), n)
        return found

    def gate_and_up(self) -> Any:
        """``w13`` in boxes for ``kernels/hopper_turned.py``."""
        found = self.tiles.get(("w13", 0, 0))
        if found is None:
            from .kernels.hopper_turned import gate_and_up

            found = self.tiles["w13", 0, 0] = gate_and_up(self.w13)
        return found

    def _tiles(
        self, key: tuple[str, int, int], shape: tuple[int, ...], strides: tuple[int, ...], box: list[int]
    ) -> Any:
        found = self.tiles.get(key)
        if found is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            tensor = self.w13 if key[0] == "w13" else self.w2
            found = self.tiles[key] = TensorDescriptor(tensor, list(shape), list(strides), box)
        return found


@dataclass(frozen=True)
class QuantisedWeights:
    """What a quantised layer's stages read: ``plain`` as the user gave it, and the products of what is quantised."""

    plain: MoEWeights
    routed: Any
    shared: Any
    strategies: dict[str, str]
    pdl: bool

    def choices(self, tokens: int) -> Any:
        """For a call of ``tokens`` > 0."""
        return self.routed.forms(tokens)


def prepare(config: MoEConfig, weights: MoEWeights, platform: Platform) -> CudaWeights | QuantisedWeights:
    """References to ``weights``; only tensors that are not contiguous are copied."""
    from .launch import why_not_direct

    if config.quant is not None:
        return _prepare_quantised(config, weights, platform)
    assert weights.w13_weight is not None and weights.w2_weight is not None
    w13, w2 = weights.w13_weight.detach().contiguous(), weights.w2_weight.detach().contiguous()
    b13, b2 = _contiguous(weights.w13_bias), _contiguous(weights.w2_bias)
    hidden, inner = config.expert_hidden_size, config.intermediate_size
    device = platform.device
    on_gpu = device.type == "cuda" and not interpreted()
    nvidia = on_gpu and torch.version.hip is None
    hopper = nvidia and torch.cuda.get_device_capability(device)[0] >= 9
    first, second = product_constants(
        config, hidden, inner, config.num_held_experts, config.top_k, b13 is not None, b2 is not None
    )
    # The accelerator copies boxes whose rows begin at multiples of 16 bytes.
    aligned = all(size * w13.element_size() % 16 == 0 for size in (hidden, inner))
    aligned = aligned and w13.data_ptr() % 16 == 0 and w2.data_ptr() % 16 == 0
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    choices = tuning.choices(
        # Tokens come with ids of every expert, also where other ranks hold most of them.
        tuning.Shape(hidden, inner, config.num_experts, config.top_k),
        str(w13.dtype).removeprefix("torch."),
        name,
        not on_gpu,
        ".".join(map(str, torch.cuda.get_device_capability(device))) if nvidia else "",
    )
    tma = (hopper or not on_gpu) and aligned and w13.element_size() == 2
    loader = nvidia and has_loader(torch.cuda.get_device_capability(device))
    if not (loader and tma and loads_both(first, second)):
        choices = choices.without_tall_tiles()
    return CudaWeights(
        weights,
        w13,
        w2,
        b13,
        b2,
        first,
        second,
        {
            "ZERO_START": config.num_experts,
            "ZERO_STOP": config.num_router_outputs,
            "SCALE": float(config.output_scale),
        },
        choices,
        {
            "experts": "; ".join(
                filter(None, (choices.source, _unverified(platform), why_not_direct() if on_gpu else ""))
            )
        },
        upcast=not on_gpu and w13.dtype is torch.bfloat16,
        tma=tma,
        loader=loader,
        pdl=hopper,
        multiprocessors=_multiprocessors(device.index) if on_gpu else 1,
    )


def product_constants(
    config: MoEConfig, hidden: int, inner: int, held: int, top_k: int, bias13: bool, bias2: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time constants of both products of so many experts of these sizes."""
    from .kernels.activation import activation_constants

    both = {"HELD": held, "H": hidden, "I": inner, "K": top_k, "WEIGHT_ON_INPUT": config.apply_router_weight_on_input}
    row, up = (2, 1) if config.w13_interleaved and config.gated else (1, inner)
    columns = {"GATED": config.gated, "ROW": row, "UP": up, "BIAS": bias13}
    return {**both, **columns, **(activation_constants(config) or {})}, {**both, "BIAS": bias2}


def _prepare_quantised(config: MoEConfig, weights: MoEWeights, platform: Platform) -> QuantisedWeights:
    from . import quantised
    from .kernels.activation import activation_constants
    from .quant_tuning import Forms, forms, scheme_of

    device = platform.device
    on_gpu = device.type == "cuda" and not interpreted()
    hopper = on_gpu and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    shape = tuning.Shape(config.expert_hidden_size, config.intermediate_size, config.num_held_experts, config.top_k)
    alone = tuning.Shape(config.hidden_size, config.shared_intermediate_size or 1, 1, 1)

    def products(prefix: str) -> Any:
        assert config.quant is not None
        scheme = config.quant.shared_scheme if prefix else config.quant.scheme
        quant = scheme_of(scheme or "", config.quant.group_size)

        def find(kind: str, width: int | None) -> Forms:
            return forms(alone if prefix else shape, kind, name, not on_gpu, width, quant)

        return quantised.products(
            config,
            weights,
            prefix,
            find,
            activation_constants(config) or {},
            on_gpu=on_gpu,
            hopper=hopper,
            loader=hopper and has_loader(torch.cuda.get_device_capability(device)),
            multiprocessors=_multiprocessors(device.index) if on_gpu else 1,
        )

    routed = products("")
    source = {"experts": "; ".join(filter(None, (routed.forms.source, _unverified(platform))))}
    return QuantisedWeights(weights, routed, products("shared_"), source, hopper)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


def has_loader(capability: tuple[int, int]) -> bool:
    """Whether kernels in Gluon run, ``kernels/hopper*.py``: their instructions are of compute capability 9.0 alone."""
    import triton

    # Gluon changes with every version of Triton.
    return capability == (9, 0) and triton.__version__.startswith("3.6.")


def loads_both(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether ``kernels/hopper_products.py`` has both products of a layer of these constants, where it runs."""
    from .kernels.hopper import DEPTH

    plain = first.get("GATED", False) and first["ROW"] == 1
    return plain and second["H"] % DEPTH == 0 and second["I"] % DEPTH == 0


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index or 0).multi_processor_count)
