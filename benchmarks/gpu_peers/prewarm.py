"""Compiles what vllm, sglang, vllm/tuned and sglang/fused launch, in parallel and without touching the GPU.

    PYTHONPATH=. python benchmarks/gpu_peers/prewarm.py .peers --shapes qwen3-30b-a3b,olmoe --tokens 1,16,256

The kernels lie in Triton's cache afterwards. Compiled for sm_90 through a driver that is none, so it also runs (and
finds what does not compile) where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: this process and its children never use one
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

import torch  # noqa: E402
import triton  # noqa: E402
import tuned  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from moe_core.bench.shapes import parse_shape  # noqa: E402


class Driver:
    """As much of a driver as a compilation asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, name: str) -> str:
        return "x"


class Compiles:
    """A kernel whose launch compiles and runs nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *values, **options: self.kernel.warmup(*values, grid=(1,), **options)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def start(folder: str) -> None:
    """In each process: the peers' modules with everything but their Triton kernels taken out."""
    triton.runtime.driver.set_active(Driver())
    if folder not in sys.path:
        sys.path.append(folder)
    import sglang.kernels.ops.moe.fused_moe_triton_kernels as kernels
    import sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe as sglang
    import vllm._custom_ops as operators
    import vllm.model_executor.layers.fused_moe.fused_moe as vllm
    from sglang.kernels.ops.moe import moe_align_small_numel as small

    align: Any = sys.modules[f"{tuned.SGLANG}.moe_align_block_size"]  # its package has a function of that name
    operators.moe_sum = operators.moe_align_block_size = align.sgl_moe_align_block_size = _nothing
    vllm.apply_moe_activation = sglang.silu_and_mul = sglang.moe_sum_reduce = _nothing
    for module in (vllm, kernels, small):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction) and (name == "fused_moe_kernel" or "_kernel" in name[-8:]):
                setattr(module, name, Compiles(value))


def work(task: tuple[str, str, str, Any, list[int]]) -> tuple[int, str]:
    """One configuration at every number of tokens; what is known to this process costs nothing again."""
    folder, peer, name, config, every = task
    start_once(folder)
    import sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe as sglang
    import vllm.model_executor.layers.fused_moe.fused_moe as vllm

    override = sys.modules[tuned.VLLM].override_config
    shape = parse_shape(name)
    H, I, E, k = shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k
    make = lambda *size, dtype=torch.bfloat16: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
    w13, w2 = make(E, 2 * I, H), make(E, H, I)
    for tokens in every:
        weights, ids = make(tokens, k, dtype=torch.float32), make(tokens, k, dtype=torch.int32)
        draw = SimpleNamespace(hidden_states=make(tokens, H), topk_weights=weights, topk_ids_int32=ids)
        try:
            if peer == "vllm":
                with override(config):
                    vllm.fused_experts_impl(draw.hidden_states, w13, w2, weights, ids)
            elif peer == "sglang/fused":
                tuned.sglang_run(sglang, draw, w13, w2, config)
            else:
                sglang.fused_experts_impl(draw.hidden_states, w13, w2, weights, ids, filter_expert=False)
        except Exception as error:  # one that does not compile is skipped by the sweep too
            return tokens, f"{peer} {name} {config}: {type(error).__name__}: {error}"[:300]
    return len(every), ""


def start_once(folder: str) -> None:
    """See :func:`start`."""
    if not _started:
        start(folder)
        _started.append(folder)


_started: list[str] = []


def tasks(folder: str, shapes: list[str], every: list[int]) -> list[tuple[str, str, str, Any, list[int]]]:
    """Configurations by peer and shape, with the numbers of tokens at which they are candidates."""
    start_once(folder)
    import sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe as sglang
    import vllm.model_executor.layers.fused_moe.fused_moe as vllm

    found: dict[tuple[str, str, str], list[int]] = {}
    for name in shapes:
        shape = parse_shape(name)
        H, I, E, k = shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k
        w13, w2 = (E, 2 * I, H), (E, H, I)
        for tokens in every:
            stock, _ = sglang.try_get_optimal_moe_config(w13, w2, k, None, tokens, return_down_config=True)
            listed: list[tuple[str, Any]] = [
                ("vllm", config) for config in tuned.vllm_candidates(vllm, w13, w2, k, tokens)
            ]
            listed += [("sglang/fused", pair) for pair in tuned.sglang_candidates(stock, w13, k, tokens)]
            for peer, config in [*listed, ("sglang", stock)]:
                found.setdefault((peer, name, json.dumps(config)), []).append(tokens)
    return [(folder, peer, name, json.loads(config), tokens) for (peer, name, config), tokens in found.items()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what assemble.py made")
    parser.add_argument("--shapes", default="qwen3-30b-a3b,olmoe,gpt-oss-120b,mixtral-8x7b,deepseek-v3")
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096,16384")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--first", type=int, default=None, help="only so many tasks")
    args = parser.parse_args()
    started = time.time()
    todo = tasks(args.folder, args.shapes.split(","), [int(tokens) for tokens in args.tokens.split(",")])[: args.first]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        failed = [why for _, why in pool.imap_unordered(work, todo) if why]
    seconds = time.time() - started
    print(f"{len(todo)} configurations in {seconds:.0f} s, {len(failed)} that do not compile", *failed, sep="\n")


if __name__ == "__main__":
    main()
