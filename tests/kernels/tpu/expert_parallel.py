"""Run by test_parallel.py in a process of its own: SPMD mode, and the number of devices, are settled at the start."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime
from xla_helpers import on_device, reference_of, relative_error

from moe_core import MoEConfig, MoERunner, Routing
from moe_core.errors import BindError
from moe_core.testing.cases import EXPERT_VARIANTS, SIZES, random_weights
from moe_tpu.metrics import compilations, fallbacks, transfers_to_host
from moe_tpu.parallel import ExpertParallel

torch_xla.runtime.use_spmd()
devices = torch_xla.runtime.global_runtime_device_count()
mesh = spmd.Mesh(np.arange(devices), (devices,), ("ep",))
device = torch_xla.device()
found = {"devices": devices}
CASES = {
    "silu": EXPERT_VARIANTS["silu"],
    "bias": EXPERT_VARIANTS["bias"],
    "gmm": {"hidden_size": 256, "intermediate_size": 128},  # wide enough for the kernels
}
for name, fields in CASES.items():
    config = MoEConfig(**{**SIZES, **fields})
    weights = random_weights(config)
    experts = ExpertParallel(config, on_device(weights, device), mesh, form="gmm" if name == "gmm" else None)
    given = torch.rand(64, config.top_k)
    ids = torch.stack([torch.randperm(config.num_experts)[: config.top_k] for _ in range(64)]).int()
    ids[0, 0] = -1
    errors = []
    torch_xla.sync(wait=True)
    before = compilations(), transfers_to_host()
    outs = []
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(64, config.hidden_size)
            outs.append((x, experts(x.to(device), Routing(given.to(device), ids.to(device)))))
            torch_xla.sync(wait=True)
    found[name] = {"compilations": compilations() - before[0], "transfers": transfers_to_host() - before[1]}
    for x, y in outs:
        errors.append(relative_error(y.cpu(), reference_of(config, weights, x, topk_weights=given, topk_ids=ids)))
    found[name]["error"] = max(errors)
found["fallbacks"] = sorted(fallbacks())
marked = on_device(weights, device)
spmd.mark_sharding(marked.w13_weight, mesh, ("ep", None, None))
try:
    MoERunner(config, marked, backend="tpu")
    found["marked"] = "was taken"
except BindError as error:
    found["marked"] = str(error)
sys.stdout.write(json.dumps(found) + "\n")
