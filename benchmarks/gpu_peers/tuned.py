"""vLLM and SGLang as peers of `moe-core bench` at their best: configurations swept on this GPU first.

    python -m moe_core.bench --peer-path .peers --adapter benchmarks/gpu_peers/tuned.py --peers vllm/tuned,sglang/fused

assemble.py makes .peers; prewarm.py compiles every candidate first, in parallel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_core.bench.registry import Adapter, Built, Problem, register, require

Config = dict[str, Any]
VLLM = "vllm.model_executor.layers.fused_moe"
SGLANG = "sglang.srt.layers.moe.moe_runner.triton_utils"
TMA = "USE_TMA"


def _config(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Config:
    return {
        "BLOCK_SIZE_M": m,
        "BLOCK_SIZE_N": n,
        "BLOCK_SIZE_K": k,
        "GROUP_SIZE_M": group,
        "num_warps": warps,
        "num_stages": stages,
    }


SMALL = [
    _config(16, 32, 64, 1, 4, 4),
    _config(16, 64, 64, 1, 4, 5),
    _config(16, 64, 128, 1, 4, 3),
    _config(16, 128, 128, 1, 4, 3),
    _config(16, 32, 256, 1, 4, 4),
    _config(16, 64, 256, 1, 4, 3),
    _config(16, 128, 64, 1, 4, 5),
]
MIDDLE = [
    _config(32, 64, 128, 1, 4, 4),
    _config(32, 128, 128, 1, 4, 3),
    _config(32, 256, 128, 1, 4, 2),
    _config(64, 128, 64, 1, 4, 4),
    _config(64, 128, 128, 1, 4, 3),
    _config(64, 256, 64, 1, 8, 4),
]
LARGE = [
    _config(128, 128, 64, 16, 8, 4),
    _config(128, 256, 64, 1, 8, 4),
    _config(128, 256, 64, 16, 8, 4),
    _config(128, 256, 64, 32, 8, 3),
]


def _near(rows: float) -> list[Config]:
    if rows <= 2:
        return SMALL
    if rows <= 12:
        return SMALL[2:6] + MIDDLE[:3]
    if rows <= 96:
        return [SMALL[3], *MIDDLE, *LARGE[:2]]
    return [MIDDLE[3], MIDDLE[5], *LARGE]


def _different(configs: Sequence[Config]) -> list[Config]:
    plain = [{key: value for key, value in config.items() if key not in ("SPLIT_K", TMA)} for config in configs]
    return list({tuple(sorted(config.items())): config for config in plain}.values())


def vllm_candidates(fused: Any, w13: Any, w2: Any, k: int, tokens: int) -> list[Config]:
    """What it would take by itself, and what may be quicker at so many rows an expert."""
    stock = fused.try_get_optimal_moe_config(w13, w2, k, None, tokens)
    near = _near(tokens * k / w13[0])
    return _different([stock, *(config for config in near if tokens < 4096 or config["BLOCK_SIZE_M"] >= 128)])


def sglang_candidates(stock: Config, w13: Any, k: int, tokens: int) -> list[tuple[Config, Config | None]]:
    """Pairs for the two products: without TMA, or with it for weights and for the second product's rows."""
    rows = tokens * k / w13[0]
    found: list[tuple[Config, Config | None]] = []
    for config in _different([stock, *_near(rows)]):
        if rows <= 12 and config.get("num_warps", 4) != 4:
            continue
        large = config["BLOCK_SIZE_M"] >= (128 if tokens >= 4096 else 64)
        if tokens < 4096:
            found.append((config, None))
        if rows >= 48 and large:
            found.append(({**config, TMA: True}, {**config, TMA: True}))
    return found


class Stopwatch:
    """Times with cold caches, of graphs where launches would matter."""

    def __init__(self) -> None:
        self._flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        zeros = torch.zeros(8, device="cuda")
        torch.cuda.synchronize()
        self._keeps_pool = self._capture(lambda: zeros + 1)

    def _median(self, call: Callable[[], Any], budget: float) -> float:
        def once() -> float:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))

        first = once()
        return statistics.median(once() for _ in range(max(4, min(40, int(budget / (first + 0.1))))))

    def __call__(self, call: Callable[[], Any], graph: bool, budget: float) -> float:
        """Milliseconds; ``budget`` too."""
        call()
        torch.cuda.synchronize()
        if not graph:
            return self._median(call, budget)
        return self._median(self._capture(call).replay, budget)

    def _capture(self, call: Callable[[], Any]) -> Any:
        """As torch.cuda.graph does, without its collections of garbage, which cost more than a sweep."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


_STOPWATCH: list[Stopwatch] = []


def quickest(candidates: Sequence[Any], call: Callable[[Any], Any], tokens: int) -> Any:
    """The candidate whose call takes least; the best three are timed again. Those that do not fit are skipped."""
    if not _STOPWATCH:
        _STOPWATCH.append(Stopwatch())
    watch, times, failed = _STOPWATCH[0], [], None
    for index, candidate in enumerate(candidates):
        try:
            times.append((watch(lambda: call(candidate), tokens <= 1024, 8), index))  # noqa: B023 (called at once)
        except Exception as error:  # out of shared memory, most often
            failed = error
    if not times:
        raise RuntimeError(f"none of {len(candidates)} configurations runs") from failed
    best = [candidates[index] for _, index in sorted(times)[:3]]
    again = [(watch(lambda: call(candidate), tokens <= 1024, 20), index) for index, candidate in enumerate(best)]  # noqa: B023
    return best[min(again)[1]]


def vllm_tuned(problem: Problem) -> Built:
    """fused_experts with the configuration that is quickest here, the same for both products as it wants."""
    fused = require(f"{VLLM}.fused_moe", "vllm", problem.paths)
    override = require(VLLM).override_config
    w13, w2 = problem.experts
    chosen: dict[int, Config] = {}

    def run(draw: Any, config: Config) -> Any:
        with override(config):
            return fused.fused_experts(draw.hidden_states, w13, w2, draw.topk_weights, draw.topk_ids_int32)

    def call(draw: Any) -> Any:
        tokens, k = draw.topk_ids.shape
        if tokens not in chosen:
            candidates = vllm_candidates(fused, w13.shape, w2.shape, k, tokens)
            chosen[tokens] = quickest(candidates, lambda config: run(draw, config), tokens)
        return run(draw, chosen[tokens])

    how = "fused_experts, configurations swept on this GPU; vLLM's compiled ops"
    return Built(call, f"vllm {require('vllm').__version__} {how}")


def choose(fused: Any) -> list[Any]:
    """Make SGLang's choice of configurations ours while the list holds a pair; its own otherwise."""
    if not hasattr(fused, "chosen_here"):
        own, fused.chosen_here = fused.try_get_optimal_moe_config, []

        def ours(*values: Any, **options: Any) -> Any:
            if not fused.chosen_here:
                return own(*values, **options)
            up, down = fused.chosen_here[-1]
            return up, (None if down is None else dict(down), None)  # it takes an entry out of the second

        fused.try_get_optimal_moe_config = ours
    return fused.chosen_here  # type: ignore[no-any-return]


def sglang_run(fused: Any, draw: Any, w13: Any, w2: Any, pair: Any) -> Any:
    """One call with SwiGLU inside the first product, for which w13 is interleaved."""
    chosen = choose(fused)
    chosen.append(pair)
    try:
        return fused.fused_experts_impl(
            draw.hidden_states,
            w13,
            w2,
            draw.topk_weights,
            draw.topk_ids_int32,
            filter_expert=False,
            fuse_swiglu_interleaved=True,
        )
    finally:
        chosen.pop()


def sglang_fused(problem: Problem) -> Built:
    """fused_experts_impl with its options that are not on by themselves."""
    fused = require(f"{SGLANG}.fused_moe", "sglang", problem.paths)
    kernels = require("sglang.kernels.ops.moe.fused_moe_triton_kernels")
    kernels.clear_b_tma_desc_cache()  # its descriptors keep the last layer's weights alive
    w13, w2 = problem.experts
    gate, up = w13.chunk(2, dim=1)
    mixed = torch.stack((gate, up), dim=2).flatten(1, 2)
    chosen: dict[int, Any] = {}

    def call(draw: Any) -> Any:
        tokens, k = draw.topk_ids.shape
        if tokens not in chosen:
            stock = fused.try_get_optimal_moe_config(w13.shape, w2.shape, k, None, tokens, return_down_config=True)[0]
            candidates = sglang_candidates(stock, w13.shape, k, tokens)
            chosen[tokens] = quickest(candidates, lambda pair: sglang_run(fused, draw, mixed, w2, pair), tokens)
        return sglang_run(fused, draw, mixed, w2, chosen[tokens])

    how = "fused_experts with its fused SwiGLU and TMA, configurations swept on this GPU"
    note = f"sglang {require('sglang').__version__} {how}; alignment, sum: vLLM's compiled ops"
    return Built(call, note, close=kernels.clear_b_tma_desc_cache)


register(Adapter("vllm/tuned", vllm_tuned, ("cuda",), ("experts",)))
register(Adapter("sglang/fused", sglang_fused, ("cuda",), ("experts",), copies=1.0))
