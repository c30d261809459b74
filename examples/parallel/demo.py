"""The demo's model with its experts on two ranks; then copies of the busiest ones, planned from what was measured.

torchrun --standalone --nproc-per-node=2 examples/parallel/demo.py
"""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_core.demo.evaluate import bits_per_byte
from moe_core.demo.run import BATCH, CONTEXT, data_folder, load_model
from moe_core.integrations.transformers import convert_model
from moe_core.parallel import Placement, apply_placement, imbalance, measured_load, plan_placement, spread_model

BYTES = 8192


@torch.no_grad()
def main() -> None:
    """Score a text, each rank its part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    with data_folder() as folder:
        one, text = load_model(folder), (folder / "heldout.txt").read_bytes()
        convert_model(one)
    text = text[rank * BYTES : (rank + 1) * BYTES]  # equally long, so all ranks make equally many calls

    many = copy.deepcopy(one)
    layers = spread_model(many, mesh)
    runners = [many.get_submodule(name).runner for name in layers]
    with contextlib.ExitStack() as stack:
        records = [stack.enter_context(runner.recording()) for runner in runners]
        spread = bits_per_byte(many, text, CONTEXT, BATCH)
    for name, runner, record in zip(layers, runners, records, strict=True):
        load = measured_load(runner, record.tokens_per_expert)
        plan = plan_placement(load, world, redundant=world)
        before = Placement.linear(len(load), world)
        apply_placement(runner, plan)
        if rank == 0:
            print(
                f"{name}: busiest rank {imbalance(before, load):.3f} of the mean, planned {imbalance(plan, load):.3f}"
            )
    again = bits_per_byte(many, text, CONTEXT, BATCH)
    alone = bits_per_byte(one, text, CONTEXT, BATCH)
    print(f"rank {rank}: {alone:.6f} bits a byte alone, {spread:.6f} on {world} ranks, {again:.6f} as planned")
    assert max(abs(spread - alone), abs(again - alone)) < 1e-4
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
