"""On a GPU: no stage waits for the device, and a captured graph serves other inputs than it was captured with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moe_core import ExpertsOut, MoEConfig, MoERunner, Pending, Routing
from moe_core.testing.cases import ROUTER_FAMILIES, SHARED_VARIANTS, SIZES, random_weights
from moe_core.types import Plan
from moe_cuda.gate import gate
from moe_cuda.kernels.align import align
from moe_cuda.reduce import reduce
from moe_cuda.shared import shared_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a CUDA device"),
]
TOKENS = 9


def stages() -> dict[str, Callable[..., Any]]:
    """Name -> what it computes from hidden states, router logits, ids and a stack of experts' rows."""

    def plan(**fields: Any) -> Plan:
        config = MoEConfig(**{**SIZES, **fields})
        return Plan(config, random_weights(config, device="cuda"), torch.device("cuda"), torch.float32)

    routers = {
        name: plan(**ROUTER_FAMILIES[name])
        for name in ("softmax_renorm", "group_top2_bias", "sqrtsoftplus_hash", "sparsemixer")
    }
    shared = plan(**SHARED_VARIANTS["shared_gate"])
    average = plan(**SHARED_VARIANTS["shared_average_output_scaled"])
    found: dict[str, Callable[..., Any]] = {
        f"gate of {name}": lambda x, logits, ids, rows, plan=plan: gate(plan, x, None, ids[:, 0])
        for name, plan in routers.items()
    }
    found["gate of logits"] = lambda x, logits, ids, rows: gate(routers["softmax_renorm"], x, logits, None)
    found["alignment"] = lambda x, logits, ids, rows: list(vars(align(ids, 16, 16)).values())
    found["shared experts"] = lambda x, logits, ids, rows: [shared_experts(shared, x).result()]
    found["reduction"] = lambda x, logits, ids, rows: [
        reduce(average, Routing(logits[:, :4].contiguous(), ids), ExpertsOut(rows, False), Pending(x))
    ]
    return found


def inputs(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(TOKENS, 32, generator=generator), torch.randn(TOKENS, 16, generator=generator)
    ids = torch.randint(0, 16, (TOKENS, 4), generator=generator, dtype=torch.int32)
    return x.cuda(), logits.cuda(), ids.cuda(), torch.randn(TOKENS, 4, 32, generator=generator).cuda()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_stage_waits_for_the_device() -> None:
    """torch raises where anything synchronises; kernels were compiled before."""
    given = inputs(0)
    for name, stage in stages().items():
        stage(*given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            stage(*given)
        except RuntimeError as error:
            pytest.fail(f"{name} waits for the device: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_graphs_serve_other_inputs() -> None:
    """A replay after new inputs were copied in gives what a call gives."""
    for name, stage in stages().items():
        held = inputs(1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            stage(*held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = stage(*held)
        for tensor, other in zip(held, inputs(2), strict=True):
            tensor.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(found, stage(*inputs(2)), strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("tokens", [1, 16])
@torch.no_grad()
def test_kernels_that_launch_early_wait_for_copies_too(tokens: int) -> None:
    """A copy is no kernel: a graph in which one stands before the layer, with and without its router."""
    config = MoEConfig(256, 128, 8, 2, renormalize=True, shared_intermediate_size=128, shared_expert_gate=True)
    runner = MoERunner(config, random_weights(config, dtype=torch.bfloat16, device="cuda"), backend="cuda")
    x, late = (torch.randn(tokens, 256, device="cuda").bfloat16() for _ in range(2))
    ids = torch.rand(tokens, 8, device="cuda").argsort(1)[:, :2].to(torch.int32)
    weights = torch.rand(tokens, 2, device="cuda")
    routing: list[dict[str, Any]] = [{}, {"topk_weights": weights, "topk_ids": ids}]
    for given in routing:
        runner(x, **given)
        graph, copied = torch.cuda.CUDAGraph(), torch.empty_like(x)
        with torch.cuda.graph(graph):
            copied.copy_(x)
            found = runner(copied, **given)
        x.copy_(late)
        for _ in range(20):
            found.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(found, runner(late, **given))
