"""ggml's CPU kernels, as llama.cpp runs an MoE layer: ``ggml_mul_mat_id`` twice, from libggml in a given folder."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..draw import Draw
from ..registry import Built, Problem, Unavailable

_F32, _I32, _BF16 = 0, 26, 30  # enum ggml_type
_SLACK = 2**20


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    # The first fields of ggml_cplan; the rest is room for what versions have added behind them.
    _fields_ = (("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("rest", ctypes.c_byte * 112))


def build(problem: Problem) -> Built:
    """Weights copied into a context of ggml; one graph for each number of tokens."""
    if problem.dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable("dtype", f"takes float32 and bfloat16, not {problem.dtype}")
    lib = _Library(problem.paths)
    w13, w2 = problem.experts
    kind = _F32 if problem.dtype is torch.float32 else _BF16
    context = lib.context(w13.nbytes + w2.nbytes)
    up, down = lib.tensor(context, kind, w13), lib.tensor(context, kind, w2)
    graphs: dict[int, _Graph] = {}

    def call(draw: Draw) -> Tensor:
        tokens = len(draw.hidden_states)
        if tokens not in graphs:
            graphs[tokens] = _Graph(lib, problem, up, down, tokens)
        return graphs[tokens].run(draw).to(draw.hidden_states.dtype)

    def close() -> None:
        for graph in graphs.values():
            lib.ggml_free(graph.context)
        lib.ggml_free(context)

    return Built(call, f"ggml {lib.version}, ggml_mul_mat_id twice", close=close)


class _Library:
    """The functions of libggml-base and libggml-cpu."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        found = [(_find(paths, f"libggml-{part}.so")) for part in ("base", "cpu")]
        base, cpu = (ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in found)
        # In this order: a look-up in libggml-cpu also finds libggml-base's functions, without the types set here.
        self._libraries = (base, cpu)
        base.ggml_version.restype = ctypes.c_char_p
        self.version = base.ggml_version().decode()
        pointers = ("init", "new_tensor_3d", "new_graph", "mul_mat_id", "swiglu", "mul", "view_2d", "add", "get_data")
        for name in pointers:
            getattr(base, f"ggml_{name}").restype = ctypes.c_void_p
        cpu.ggml_graph_plan.restype = _Plan
        cpu.ggml_cpu_init()

    def __getattr__(self, name: str) -> Any:
        return next(getattr(library, name) for library in self._libraries if hasattr(library, name))

    def context(self, size: int) -> ctypes.c_void_p:
        """An arena; tensors made in it have their data there."""
        return ctypes.c_void_p(self.ggml_init(_InitParams(size + _SLACK, None, False)))

    def empty(self, context: ctypes.c_void_p, kind: int, *sizes: int) -> ctypes.c_void_p:
        """A tensor; sizes from the innermost."""
        return ctypes.c_void_p(self.ggml_new_tensor_3d(context, kind, *map(ctypes.c_int64, sizes)))

    def tensor(self, context: ctypes.c_void_p, kind: int, values: Tensor) -> ctypes.c_void_p:
        """A copy of a contiguous 3-D tensor."""
        made = self.empty(context, kind, *reversed(values.shape))
        ctypes.memmove(self.ggml_get_data(made), values.data_ptr(), values.nbytes)
        return made


class _Graph:
    """The layer for one number of tokens."""

    def __init__(
        self, lib: _Library, problem: Problem, up: ctypes.c_void_p, down: ctypes.c_void_p, tokens: int
    ) -> None:
        shape, pointer = problem.shape, ctypes.c_void_p
        h, i, k = shape.hidden_size, shape.intermediate_size, shape.top_k
        self._lib, self._shape, self._threads = lib, (tokens, h), max(problem.threads, 1)
        self.context = lib.context(4 * tokens * (k * (3 * i + 3 * h + 2) + (k + 2) * h) + 2**20)
        self._x = lib.empty(self.context, _F32, h, 1, tokens)
        self._ids = lib.empty(self.context, _I32, k, tokens, 1)
        self._weights = lib.empty(self.context, _F32, 1, k, tokens)
        inner = pointer(
            lib.ggml_swiglu(self.context, pointer(lib.ggml_mul_mat_id(self.context, up, self._x, self._ids)))
        )
        each = pointer(lib.ggml_mul_mat_id(self.context, down, inner, self._ids))
        each = pointer(lib.ggml_mul(self.context, each, self._weights))
        row = ctypes.c_size_t(4 * h * k)
        columns = [
            pointer(
                lib.ggml_view_2d(
                    self.context, each, ctypes.c_int64(h), ctypes.c_int64(tokens), row, ctypes.c_size_t(4 * h * index)
                )
            )
            for index in range(k)
        ]
        total = columns[0]
        for column in columns[1:]:
            total = pointer(lib.ggml_add(self.context, total, column))
        self._total = total
        self._graph = pointer(lib.ggml_new_graph(self.context))
        lib.ggml_build_forward_expand(self._graph, total)
        self._plan = lib.ggml_graph_plan(self._graph, ctypes.c_int(self._threads), None)
        self._work = ctypes.create_string_buffer(max(self._plan.work_size, 1))
        self._plan.work_data = ctypes.addressof(self._work)

    def run(self, draw: Draw) -> Tensor:
        """[T, H] float32."""
        lib = self._lib
        for target, values in (
            (self._x, draw.hidden_states.float()),
            (self._ids, draw.topk_ids_int32),
            (self._weights, draw.topk_weights),
        ):
            ctypes.memmove(lib.ggml_get_data(target), values.data_ptr(), values.nbytes)
        status = lib.ggml_graph_compute(self._graph, ctypes.byref(self._plan))
        if status:
            raise RuntimeError(f"ggml_graph_compute returned {status}")
        out = torch.empty(self._shape)
        ctypes.memmove(out.data_ptr(), lib.ggml_get_data(self._total), out.nbytes)
        return out


def _find(paths: tuple[Path, ...], name: str) -> Path:
    for path in paths:
        found = sorted(path.rglob(name))
        if found:
            return found[0]
    raise Unavailable(
        "not_installed",
        f"no {name}",
        "build ggml with shared libraries (cmake -DBUILD_SHARED_LIBS=ON) and pass --peer-path FOLDER",
    )
