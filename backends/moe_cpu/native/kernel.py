"""Packed experts, and the call into the kernel; panels.h and tiles.h have the layouts and the order of sums."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core import MoEConfig
from moe_core.activations import apply_activation
from moe_core.errors import StageError

from ..pages import ask_for_huge_pages
from .codes import Coded

ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}
IDENTITY = 0
UP, DOWN, ROUND = 1, 2, 4


class Scales(ctypes.Structure):
    """``struct Scales`` of layer.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("group", "groups")),
    )


class Layer(ctypes.Structure):
    """``struct Layer`` of layer.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "inner", "experts", "top_k", "zero_begin", "zero_end")),
        *((name, ctypes.c_void_p) for name in ("w13", "w2", "b13", "b2")),
        *((name, ctypes.c_int32) for name in ("bfloat16", "tiles", "gated", "activation", "reduce")),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit", "scale")),
        ("bits", ctypes.c_int32),
        *((name, Scales) for name in ("scales13", "scales2")),
        ("table", ctypes.c_void_p),
    )


class Pack(ctypes.Structure):
    """``struct Pack`` of layer.h."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "first_row", "row_step", "rows", "depth")),
        *((name, ctypes.c_int64) for name in ("first_panel", "panel_step", "panels")),
        ("packed", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("bytes", "tiles")),
    )


NO_MEMORY = "no memory to sort the tokens by expert"


class Kernel:
    """The library's functions with their types; calls release the GIL."""

    _lock = threading.Lock()
    _of: ClassVar[dict[ctypes.CDLL, Kernel]] = {}

    @classmethod
    def of(cls, library: ctypes.CDLL) -> Kernel:
        """The one of a library: setting a function's types again would pull them away under another thread's call."""
        with cls._lock:
            if library not in cls._of:
                cls._of[library] = cls(library)
            return cls._of[library]

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.panels = Panels(2 * library.moe_lanes())
        together = library.moe_tiles()
        self.tiles = Tiles(16, together) if together else None
        self.pack: Callable[..., None] = library.moe_pack
        self.pack.argtypes, self.pack.restype = (ctypes.POINTER(Pack), ctypes.c_int), None  # type: ignore[attr-defined]
        self.run: Callable[..., int] = library.moe_run
        self.run.restype = number  # type: ignore[attr-defined]
        self.run.argtypes = (  # type: ignore[attr-defined]
            ctypes.POINTER(Layer),
            *(pointer, pointer, pointer, number, pointer, pointer),
            *(ctypes.c_int, ctypes.c_int),
        )

    def pack_rows(
        self, weights: Tensor | Coded, groups: list[slice], layout: Panels, spent: Callable[[int], None]
    ) -> Tensor:
        """[E, N, K] with E packed matrices: one group of rows, or the panels of several in turn; of codes of four bits
        two in a byte. ``spent`` is called with each as soon as it is packed."""
        experts, rows, depth = weights.shape
        counts = [len(range(*group.indices(rows))) for group in groups]
        panels = sum(layout.panels(count) for count in counts)
        shape, half = (panels * layout.width, layout.depth(depth)), self.panels.width // 2
        coded = isinstance(weights, Coded)
        in_half = coded and weights.bits == 4
        dtype = torch.uint8 if coded else weights.dtype
        size = (math.prod(shape) // 2,) if in_half else shape
        packed = torch.empty(experts, *size, dtype=dtype, device="cpu")
        ask_for_huge_pages(packed)
        whole = torch.empty(shape, dtype=dtype, device="cpu") if in_half else None
        threads = torch.get_num_threads()
        for expert in range(experts):
            source = weights[expert].detach()
            source = source if source.stride(1) == 1 else source.contiguous()
            target = packed[expert] if whole is None else whole
            for place, (group, count) in enumerate(zip(groups, counts, strict=True)):
                begin, _, step = group.indices(rows)
                job = Pack(
                    *(source.data_ptr(), source.stride(0), begin, step, count, depth, place, len(groups), panels),
                    *(target.data_ptr(), target.element_size(), layout.tiles),
                )
                self.pack(job, threads)
            if whole is not None:
                runs = whole.view(-1, 2, half)
                torch.bitwise_or(runs[:, 0], runs[:, 1] << 4, out=packed[expert].view(-1, half))
            spent(expert)
        return packed


@dataclass(frozen=True)
class Panels:
    """The layout of panels.h."""

    width: int
    """Columns of a panel."""
    together: int = 1
    """Panels of bfloat16 that lie in one stream, in tiles."""
    tiles = False

    def panels(self, columns: int) -> int:
        """How many panels hold so many columns."""
        return -(-columns // self.width)

    def depth(self, inputs: int) -> int:
        """Inputs of a column in memory."""
        return inputs


class Tiles(Panels):
    """The layout of tiles.h: panels of 16 columns, in steps of 32 inputs."""

    tiles = True

    def panels(self, columns: int) -> int:
        """An even number."""
        return -(-columns // 32) * 2

    def depth(self, inputs: int) -> int:
        """Whole steps."""
        return -(-inputs // 32) * 32


def pack_bias(bias: Tensor | None, groups: list[slice], layout: Panels) -> Tensor | None:
    """[E, N] as [E, panels, panel] in float32, in the order of :meth:`Kernel.pack_rows`."""
    packed = pack_scales(None if bias is None else bias[..., None], groups, layout)
    return None if packed is None else packed.squeeze(2)


def pack_scales(scales: Tensor | None, groups: list[slice], layout: Panels) -> Tensor | None:
    """[E, N, G] as [E, panels, G, panel] in float32, zeros in columns that are none."""
    if scales is None:
        return None
    parts = []
    for group in groups:
        part = scales[:, group].detach().float()
        room = layout.panels(part.shape[1]) * layout.width
        part = F.pad(part, (0, 0, 0, room - part.shape[1]))
        parts.append(part.unflatten(1, (-1, layout.width)).transpose(2, 3))
    return torch.stack(parts, dim=2).flatten(1, 2).contiguous()


def pack_codes(
    w13: Coded, groups: list[slice], w2: Coded, whole: list[slice], layout: Panels
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """The tensors beside the codes, and the fields of :class:`Layer` that point into them."""
    tensors: list[Tensor | None] = [w13.table]
    fields: dict[str, Any] = {"bits": w13.bits, "table": _address(w13.table)}
    for name, matrix, rows in (("scales13", w13, groups), ("scales2", w2, whole)):
        scales, zeros = pack_scales(matrix.scales, rows, layout), pack_scales(matrix.zeros, rows, layout)
        tensors += [scales, zeros]
        fields[name] = Scales(_address(scales), _address(zeros), matrix.group, matrix.scales.shape[2])
    return tensors, fields


@dataclass(frozen=True)
class PackedExperts:
    """Experts of one width, packed, and what a call needs besides its tensors."""

    kernel: Kernel
    config: MoEConfig
    tensors: tuple[Tensor | None, ...]  # what the structures point into
    layout: Panels
    input_dtype: torch.dtype
    """Of the rows that a call takes."""
    up: Layer
    down: Layer

    @classmethod
    def pack(
        cls,
        kernel: Kernel,
        config: MoEConfig,
        w13: Tensor | Coded,
        w2: Tensor | Coded,
        b13: Tensor | None,
        b2: Tensor | None,
        spent: Callable[[str, int], None],
        **call: Any,
    ) -> PackedExperts:
        """From [E, 2I, H] and [E, H, I], both plain or both codes.

        ``call`` sets fields of :class:`Layer` that are not the experts' own; ``spent`` is called with "w13" or "w2" and
        each expert that is packed.
        """
        rows, inner = w13.shape[1], w2.shape[2]
        custom = config.custom_activation_function is not None or callable(config.activation)
        groups = [slice(0, rows)]
        if config.gated and not custom:
            halves = [slice(0, inner), slice(inner, rows)]
            groups = [slice(0, rows, 2), slice(1, rows, 2)] if config.w13_interleaved else halves
        # A function of the caller's between the products sees them in float32, which tiles have no place for.
        in_tiles = w13.dtype is torch.bfloat16 and not custom
        layout = kernel.tiles if kernel.tiles is not None and in_tiles else kernel.panels
        whole = [slice(0, w2.shape[1])]
        tensors = (
            kernel.pack_rows(w13, groups, layout, functools.partial(spent, "w13")),
            kernel.pack_rows(w2, whole, layout, functools.partial(spent, "w2")),
            pack_bias(b13, groups, layout),
            pack_bias(b2, whole, layout),
        )
        codes: dict[str, Any] = {}
        if isinstance(w13, Coded) and isinstance(w2, Coded):
            more, codes = pack_codes(w13, groups, w2, whole, layout)
            tensors = (*tensors, *more)
        fields: dict[str, Any] = {
            "hidden": w13.shape[2],
            "inner": inner,
            "experts": w13.shape[0],
            "top_k": 1,
            **{name: _address(tensor) for name, tensor in zip(("w13", "w2", "b13", "b2"), tensors[:4], strict=True)},
            "bfloat16": w13.dtype is torch.bfloat16,
            "tiles": layout.tiles,
            "gated": len(groups) == 2,
            "reduce": True,
            "scale": 1.0,
            "alpha": config.swiglu_alpha,
            "beta": config.swiglu_beta,
            "activation": IDENTITY if custom else ACTIVATIONS[str(config.activation)],
            "limit": math.inf if custom or config.swiglu_limit is None else config.swiglu_limit,
            **codes,
            **call,
        }
        down, dtype = Layer(**fields), torch.bfloat16 if layout.tiles else torch.float32
        return cls(kernel, config, tensors, layout, dtype, Layer(**{**fields, "inner": rows}) if custom else down, down)

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, rounded: bool = False) -> Tensor:
        """x [T, H] of :attr:`input_dtype`, ids and weights [T, K] -> float32 [T, H], or [T * K, H] unweighted without
        ``reduce``; sums in ``input_dtype`` where they may be ``rounded``."""
        if topk_ids.dtype is not torch.int32 or topk_weights.dtype is not torch.float32:
            raise StageError(f"routing has {topk_weights.dtype} and {topk_ids.dtype}, expected float32 and int32")
        tokens, k = topk_ids.shape
        x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
        # Where a call of one token finds cold caches, each operator of torch costs up to 50 us: so the kernel rounds,
        # and makes the room between the products.
        phases = UP | DOWN
        if rounded and self.down.tiles and self.down.reduce:
            out, phases = torch.empty_like(x), phases | ROUND
        elif self.down.reduce:
            out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        else:
            out = torch.zeros(tokens * k, x.shape[1], dtype=torch.float32, device="cpu")
        given = (x.data_ptr(), topk_ids.data_ptr(), topk_weights.data_ptr(), tokens)
        threads = torch.get_num_threads()
        if self.up is self.down:
            if self.kernel.run(self.up, *given, None, out.data_ptr(), phases, threads) < 0:
                raise MemoryError(NO_MEMORY)
            return out
        inner = torch.empty(tokens * k, self.up.inner, dtype=torch.float32, device="cpu")
        used = self._run(self.up, *given, inner.data_ptr(), None, UP, threads)
        inner = apply_activation(self.config, inner[:used]).contiguous()
        self._run(self.down, *given, inner.data_ptr(), out.data_ptr(), DOWN, threads)
        return out

    def _run(self, layer: Layer, *arguments: Any) -> int:
        used = self.kernel.run(layer, *arguments)
        if used < 0:
            raise MemoryError(NO_MEMORY)
        return used


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
