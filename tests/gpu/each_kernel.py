"""Every kernel of the CUDA backend once, on small layers of odd sizes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/each_kernel.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/gpu/each_kernel.py

`--only loader` runs the kernels with a loading warpgroup alone, `--only words` those of four bits for few tokens: a
sanitizer takes its time over all of them.

Tensors do not come from torch's caching allocator here, so that a read behind one of them is a read of foreign memory.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from moe_core import MoEConfig, MoERunner, QuantConfig, Routing
from moe_core.testing.cases import random_weights
from moe_cuda import experts, layout
from moe_cuda.quant_tuning import Form, Step
from moe_cuda.tuning import Dot, Few, Grouped, Pairs, Tile

FORMS = {
    "few": Few(8, 32, 4, 8, 32, 4, prefetch=2),
    "pairs": Pairs(Dot(32, 32, 4, 3), Dot(32, 32, 4, 3)),
    "grouped": Grouped(32, Tile(32, 32, 4, 3, 1, 4, half=True), Tile(32, 32, 4, 3, 1, 4, half=True, flatten=True)),
    "gathered": Grouped(32, Tile(32, 32, 4, 3, gather=True), Tile(32, 32, 4, 3)),
    "loader": Grouped(128, Tile(128, 64, 8, 3, 1, 4, loader=True), Tile(256, 64, 8, 3, 1, 4, loader=True, early=True)),
    "loader gathered": Grouped(
        128, Tile(128, 64, 8, 3, 1, 4, gather=True, loader=True), Tile(128, 64, 8, 3, 1, 4, loader=True)
    ),
    "loader of 192 rows": Grouped(192, Tile(128, 64, 8, 3, 1, 4, loader=True), Tile(256, 64, 8, 3, 1, 4, loader=True)),
    "loader turned": Grouped(
        128, Tile(64, 64, 8, 6, 1, 4, loader=True), Tile(128, 64, 8, 6, 1, 4, loader=True, early=True), turned=True
    ),
    "pointers": Grouped(16, Tile(32, 32, 4, 3, tma=False), Tile(32, 32, 4, 3, tma=False)),
}
LAYERS = {
    "plain": {"renormalize": True},
    "full": {
        "scoring_func": "sigmoid",
        "renormalize": True,
        "e_score_correction_bias": True,
        "num_expert_group": 3,
        "topk_group": 2,
        "group_score": "top2_sum",
        "routed_scaling_factor": 2.5,
        "shared_intermediate_size": 40,
        "shared_expert_gate": True,
        "expert_bias": True,
        "swiglu_limit": 0.7,
    },
    "zero experts": {"zero_expert_num": 2, "zero_expert_type": "identity", "activation": "relu2", "gated": False},
}
# What one flipped code of an activation may make of a small layer.
ROUNDED = 6e-2
QUANTISED = {
    "fp8_block": QuantConfig("fp8_block", block_shape=(32, 32)),
    "fp8_channel": QuantConfig("fp8_channel"),
    "int8_w8a8": QuantConfig("int8_w8a8"),
    "int8": QuantConfig("int8_weight_only", group_size=32, symmetric=False),
    "int4": QuantConfig("int4_weight_only", group_size=32, symmetric=False),
    "mxfp4": QuantConfig("mxfp4"),
    "nvfp4": QuantConfig("nvfp4"),
}
WORDS = {
    "one row": Form(1, Step(8, 1024, 4, 1), Step(8, 1024, 4, 2)),
    "one row on tensor cores": Form(1, Step(4, 1024, 4, 3), Step(8, 1024, 4, 2), tensor_cores=True),
    "led": Form(16, Step(32, 64, 4, 3), Step(64, 64, 4, 3), led=True),
    "tiles": Form(32, Step(32, 64, 4, 3, 1, 4), Step(64, 64, 4, 3, 0, 4)),
    "no shared memory": Form(8, Step(16, 128, 2, 1), Step(64, 256, 4, 1, columns_first=True), led=True),
}
CODES = {
    "tiles": Form(64, Step(32, 32, 4, 3, 0, 4), Step(32, 32, 4, 3, 0, 4)),
    "persistent": Form(16, Step(32, 32, 4, 3, 1, 1, flatten=True), Step(32, 32, 4, 3, 1, 1, flatten=True)),
}
LOADER = {
    "loader": Form(128, Step(128, 128, 8, 4, 1, 2, loader=True), Step(128, 128, 8, 4, 1, 2, loader=True)),
    "triton": Form(128, Step(128, 128, 8, 3), Step(128, 128, 8, 3)),
}


@torch.no_grad()
def main() -> int:
    """Run, compare with the reference, and count what differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("loader", "words"))
    only = parser.parse_args().only
    if only == "words":
        quants = {"mxfp4": QuantConfig("mxfp4"), "int4": QuantConfig("int4_weight_only", group_size=128)}
        wrong = sum(quantised(name, quant, (416, 224, 9, 3), WORDS) for name, quant in quants.items())
        torch.cuda.synchronize()
        sys.stdout.write(f"{wrong} results differ\n")
        return int(wrong > 0)
    loaders = only == "loader"
    wrong = 0
    # With and without what the tensor memory accelerator asks for, and with what the kernels for Hopper do.
    for sizes in ((72, 56, 9, 3), (67, 50, 9, 3), (128, 64, 9, 3))[2 if loaders else 0 :]:
        for name, fields in LAYERS.items():
            if loaders and not fields.get("gated", True):
                continue
            config = MoEConfig(*sizes, **fields)
            weights = random_weights(config, dtype=torch.bfloat16, device="cuda")
            runner = MoERunner(config, weights, backend="cuda")
            reference = MoERunner(config, weights, backend="reference")
            x = torch.randn(77, sizes[0], device="cuda").bfloat16()
            for tokens in () if loaders else (1, 13, 77):
                wrong += differs(f"{name} {sizes} T={tokens}", runner(x[:tokens]), reference(x[:tokens]))
            binding = runner.bound(False)
            plan = binding.stages["experts"][1]
            ids = torch.rand(77, config.num_experts, device="cuda").argsort(1)[:, : config.top_k].to(torch.int32)
            ids[3], ids[7, 0] = -1, -1
            routing = Routing(torch.rand(ids.shape, device="cuda"), ids)
            results = []
            tall = plan.weights.loader and layout.loads_both(plan.weights.first, plan.weights.second)
            names = [
                name
                for name in FORMS
                if (tall or not ("192" in name or "turned" in name)) and ("loader" in name or not loaders)
            ]
            for form in names:
                out = torch.empty_like(x)
                experts.run(plan, FORMS[form], x, routing, out)
                results.append(out)
            for form, out in zip(names, results, strict=True):
                wrong += differs(f"{name} {sizes} {form}", out, results[0])
    for sizes in () if loaders else ((72, 56, 9, 3), (160, 96, 9, 3)):
        for name, quant in QUANTISED.items():
            forms = CODES if quant.scheme in ("fp8_block", "fp8_channel", "int8_w8a8") else WORDS
            wrong += quantised(name, quant, sizes, forms)
    wrong += quantised("fp8_block 128", QuantConfig("fp8_block", block_shape=(128, 128)), (384, 256, 9, 3), LOADER)
    torch.cuda.synchronize()
    sys.stdout.write(f"{wrong} results differ\n")
    return int(wrong > 0)


def quantised(name: str, quant: QuantConfig, sizes: tuple[int, ...], forms: dict[str, Form]) -> int:
    """How many forms of one scheme differ from its reference."""
    config = MoEConfig(*sizes, quant=quant, expert_bias=True)
    weights = random_weights(config, dtype=torch.bfloat16, device="cuda")
    runner = MoERunner(config, weights, backend="cuda")
    plan = runner.bound(False).stages["experts"][1]
    x = torch.randn(77, sizes[0], device="cuda").bfloat16()
    wrong, reference = 0, MoERunner(config, weights, backend="reference")
    for tokens in (1, 13, 77):
        wrong += differs(f"{name} {sizes} T={tokens}", runner(x[:tokens]), reference(x[:tokens]), ROUNDED)
    ids = torch.rand(77, config.num_experts, device="cuda").argsort(1)[:, : config.top_k].to(torch.int32)
    ids[3], ids[7, 0] = -1, -1
    routing = Routing(torch.rand(ids.shape, device="cuda"), ids)
    results = []
    for form in forms.values():
        out = torch.empty_like(x)
        experts.run(plan, form, x, routing, out)
        results.append(out)
    return wrong + sum(differs(f"{name} {sizes} form {i}", out, results[0], ROUNDED) for i, out in enumerate(results))


def differs(what: str, found: torch.Tensor, expected: torch.Tensor, most: float = 1e-2) -> int:
    """1 and a line where the relative error is above ``most``, of itself bfloat16's tolerance."""
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if error <= most:
        return 0
    sys.stdout.write(f"{what}: relative error {error:.1e}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
