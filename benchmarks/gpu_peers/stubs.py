"""What the GPU peers' kernel files import beside torch and Triton, as far as a kernel's call needs it.

assemble.py puts this file beside the peers' own. Whatever else they import is an Absent name: it may be imported,
subclassed and written in a signature, and raises when it is called, so nothing runs that is not the peer's own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import lzma
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

HERE = Path(__file__).resolve().parent
_CUDA = torch.cuda.is_available()


class _Names(type):
    def __getattr__(cls, name: str) -> type:
        return _absent(cls.__qualname__, name)


class Absent(metaclass=_Names):
    """Something of a peer's that was left out."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{type(self).__qualname__} is not part of the assembled peers")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last: modules that were neither assembled nor stubbed."""

    roots: tuple[str, ...] = ("vllm.", "sglang.", "sgl_kernel")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith(self.roots) else None

    def create_module(self, spec: Any) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = functools.partial(_absent, spec.name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def _absent(module: str, name: str) -> type:
    if name.startswith("_"):
        raise AttributeError(name)
    return _Names(name, (Absent,), {"__qualname__": f"{module}.{name}"})


def _stub(name: str, **values: Any) -> None:
    """A module of ours, whose folder may hold assembled ones and whose other names are absent."""
    module = ModuleType(name)
    module.__path__ = [str(HERE.joinpath(*name.split(".")))]
    module.__getattr__ = functools.partial(_absent, name)  # type: ignore[method-assign]
    vars(module).update(values)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _start() -> None:
    if not any(isinstance(found, _Finder) for found in sys.meta_path):
        sys.meta_path.append(_Finder())
    if not hasattr(logging.Logger, "warning_once"):
        logging.Logger.warning_once = lambda self, *a, **_: self.info(*a)  # type: ignore[attr-defined]
        logging.Logger.info_once = lambda self, *a, **_: self.debug(*a)  # type: ignore[attr-defined]
    if _CUDA:
        load_compiled()


@functools.cache
def load_compiled() -> None:
    """vLLM's compiled operators, unpacked once for this machine."""
    folder = Path(tempfile.gettempdir()) / "moe-core-gpu-peers"
    folder.mkdir(exist_ok=True)
    for packed in sorted((HERE / "so").glob("*.xz")):
        library = folder / packed.stem
        if not library.exists():
            partial = library.with_suffix(f".{id(packed)}")
            partial.write_bytes(lzma.decompress(packed.read_bytes()))
            partial.rename(library)
        torch.ops.load_library(str(library))


class _Platform:
    """vLLM's current_platform: CUDA, whatever else it is asked."""

    simple_compile_backend = "inductor"

    def is_cuda(self) -> bool:
        return True

    is_cuda_alike = is_cuda

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def has_device_capability(self, least: int) -> bool:
        major, minor = torch.cuda.get_device_capability() if _CUDA else (9, 0)
        return 10 * major + minor >= least

    def is_device_capability(self, exact: int) -> bool:
        return self.has_device_capability(exact) and not self.has_device_capability(exact + 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("is_", "has_", "supports_", "use_")):
            return lambda *_, **__: False
        raise AttributeError(name)


@functools.cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")


def _register(namespace: str, name: str, function: Callable[..., Any], fake: Any, mutates: list[str]) -> None:
    """An operator for every device; as the peers do it, without torch.library.custom_op's dearer wrapper."""
    library = _library(namespace)
    library.define(name + torch.library.infer_schema(function, mutates_args=mutates))
    library.impl(name, function, "CompositeExplicitAutograd")
    if fake is not None:
        library._register_fake(name, fake)


def _vllm_operator(
    op_name: str, op_func: Any, mutates_args: list[str] | None = None, fake_impl: Any = None, **_: Any
) -> None:
    _register("vllm", op_name, op_func, fake_impl, mutates_args or [])


def _device_name() -> str:
    return torch.cuda.get_device_name() if _CUDA else "NVIDIA H100 80GB HBM3"


class _GroupShape(NamedTuple):
    """vLLM's: rows and columns that share a scale, -1 for all of them."""

    row: int
    col: int


_GroupShape.PER_TENSOR, _GroupShape.PER_TOKEN = _GroupShape(-1, -1), _GroupShape(1, -1)  # type: ignore[attr-defined]


class _Experts:
    """vLLM's modular experts, of which fused_experts uses one sum."""

    @staticmethod
    def adjust_N_for_activation(N: int, activation: Any) -> int:
        return N // 2 if activation.is_gated else N


def _align(  # vLLM's name and order; expert_map and scatter_idx are for expert parallelism
    ids: Any, experts: int, block: int, rows: Any, of: Any, total: Any, expert_map: Any = None, scatter: Any = None
) -> None:
    torch.ops._moe_C.moe_align_block_size(ids, experts, block, rows, of, total, expert_map, scatter)


def _sum(parts: Any, out: Any, ids: Any = None, expert_map: Any = None) -> None:
    torch.ops._moe_C.moe_sum(parts, out, ids, expert_map)


def _group_quant(x: Any, size: int, column_major_scales: bool = False) -> tuple[Any, Any]:
    """vLLM's per_token_group_quant_fp8 by its compiled operator, in the one form that fused_experts asks for."""
    assert not column_major_scales and x.is_contiguous()
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty((*x.shape[:-1], x.shape[-1] // size), dtype=torch.float32)
    limit = torch.finfo(torch.float8_e4m3fn).max
    torch.ops._C.per_token_group_fp8_quant(x, codes, scales, size, 1e-10, -limit, limit, False, False, False)
    return codes, scales


def vllm() -> None:
    """Stubs of vLLM 0.33."""
    _start()
    config: list[Any] = [None]

    @contextlib.contextmanager
    def override_config(value: Any) -> Iterator[None]:
        before, config[0] = config[0], value
        yield
        config[0] = before

    _stub("vllm.envs", VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None, VLLM_TRITON_USE_TD=None)
    _stub("vllm.logger", init_logger=logging.getLogger)
    _stub("vllm.platforms", current_platform=_Platform())
    _stub("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
    _stub("vllm.utils")
    _stub("vllm.utils.torch_utils", direct_register_custom_op=_vllm_operator)
    _stub("vllm.utils.platform_utils", get_device_name_as_file_name=lambda: _device_name().replace(" ", "_"))
    _stub("vllm.utils.import_utils", get_triton_kernels_version=lambda: None)
    _stub("vllm._custom_ops", moe_sum=_sum, moe_align_block_size=_align)
    quantization = "vllm.model_executor.layers.quantization.utils"
    _stub(f"{quantization}.quant_utils", GroupShape=_GroupShape)
    _stub(f"{quantization}.fp8_utils", per_token_group_quant_fp8=_group_quant)
    fused = "vllm.model_executor.layers.fused_moe"
    _stub("vllm.model_executor")
    _stub("vllm.model_executor.layers")
    _stub(fused, get_config=lambda: config[0], override_config=override_config)
    _stub(f"{fused}.modular_kernel", FusedMoEExpertsModular=_Experts)


def _sglang_operator(function: Any = None, **options: Any) -> Any:
    """SGLang's register_custom_op."""
    if function is None:
        return functools.partial(_sglang_operator, **options)
    shape = options.get("out_shape")
    place = list(function.__annotations__).index(shape) if shape else 0

    def fake(*values: Any, **named: Any) -> Any:
        return torch.empty_like(named[shape] if shape in named else values[place]) if shape else None

    _register("sglang", function.__name__, function, fake, options.get("mutates_args") or [])
    return getattr(torch.ops.sglang, function.__name__)


def _sglang_align(
    ids: Any,
    buckets: int,
    block: int,
    rows: Any,
    of: Any,
    total: Any,
    cumsum: Any,
    pad: bool = True,
    skip: bool = False,
) -> None:
    """vLLM's, which knows no bucket for experts of other ranks."""
    _align(ids, buckets - 1, block, rows, of, total)


def _silu_and_mul(x: Any, out: Any, **_: Any) -> None:
    torch.ops._C.silu_and_mul(out, x)


def _sum_reduce(parts: Any, out: Any, factor: float) -> None:
    assert factor == 1.0
    _sum(parts, out)


class _Backend:
    def is_triton(self) -> bool:
        return True


def _executing() -> Any:
    return SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
    )


def sglang() -> None:
    """Stubs of SGLang 0.5.23; alignment, SwiGLU and sum are vLLM's compiled operators."""
    _start()
    yes, no = (lambda *_: True), (lambda *_: False)
    switch = SimpleNamespace(get=no)
    for name in ("kernels", "kernels.ops", "srt", "srt.layers", "srt.layers.moe", "srt.distributed"):
        _stub(f"sglang.{name}")
    _stub("sglang.kernels.jit")
    _stub("sglang.kernels.jit.utils", is_arch_support_pdl=yes)
    _stub("sglang.kernels.ops.moe", moe_align_block_size=_sglang_align)
    _stub("sglang.kernels.ops.activation.activation", silu_and_mul=_silu_and_mul)
    _stub("sgl_kernel", moe_sum_reduce=_sum_reduce)
    _stub("sglang.srt.batch_invariant_ops", is_batch_invariant_mode_enabled=no)
    memory = "sglang.srt.distributed.device_communicators.pynccl_allocator"
    _stub(memory, use_symmetric_memory=lambda *_, **__: contextlib.nullcontext())
    _stub("sglang.srt.layers.dp_attention", is_allocation_symmetric=no)
    _stub("sglang.srt.environ", envs=SimpleNamespace(SGLANG_USE_AITER=switch, SGLANG_EXPERIMENTAL_LORA_OPTI=switch))
    _stub("sglang.srt.runtime_context", get_exec=_executing, get_parallel=lambda: SimpleNamespace(tp_group=None))
    _stub("sglang.srt.layers.moe.utils", get_moe_padding_size=lambda *_: 0, get_moe_runner_backend=_Backend)
    _stub("sglang.srt.layers.moe.topk", StandardTopKOutput=lambda weights, ids, logits: (weights, ids, logits))
    _stub("sglang.srt.layers.moe.moe_runner", MoeRunnerConfig=RunnerConfig)
    platform = {f"is_{name}": no for name in ("cpu", "hip", "xpu", "musa")}
    support = {"cpu_has_amx_support": no, "get_bool_env_var": no, "is_sm90_supported": yes, "is_cuda": yes}
    _stub("sglang.srt.utils", **platform, **support, get_device_name=_device_name)
    _stub("sglang.srt.utils.custom_op", register_custom_op=_sglang_operator)


class RunnerConfig:
    """SGLang's MoeRunnerConfig: its defaults, and what it is given."""

    activation, is_gated, inplace, gate_up_interleaved = "silu", True, True, True
    apply_router_weight_on_input = no_combine = no_combine_keep_router_weight = False
    num_experts = num_local_experts = routed_scaling_factor = None
    gemm1_alpha = gemm1_clamp_limit = swiglu_limit = None

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)
