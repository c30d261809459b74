"""One MoE layer on all ranks of a torchrun, each with tokens of its own; compares with one process.

One host:   torchrun --standalone --nproc-per-node=2 examples/parallel/layer.py
Two hosts, on host N of 0 and 1, with the address of host 0:
            torchrun --nnodes=2 --node-rank=N --master-addr=10.0.0.1 --master-port=29500 --nproc-per-node=2 \
                examples/parallel/layer.py --tp 2
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_core import MoEConfig, MoERunner
from moe_core.parallel import Parallel
from moe_core.testing import random_weights


@torch.no_grad()
def main() -> None:
    """Bind, call, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1, help="ranks that split each expert")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (world // arguments.tp, arguments.tp), mesh_dim_names=("ep", "tp"))

    config = MoEConfig(64, 128, 16, 4, renormalize=True, shared_intermediate_size=128)
    weights = random_weights(config, device=device)  # equal on all ranks; each uses its part
    runner = MoERunner(config, weights, mesh=Parallel(mesh, timeout=60))

    place = mesh.get_local_rank("ep")
    torch.manual_seed(place)  # ranks of one tp group bring the same tokens
    tokens = torch.randn(10 * place, 64, device=device)  # the first brings none
    out = runner(tokens)

    wanted = MoERunner(config, weights)(tokens)
    error = float((out - wanted).norm() / wanted.norm().clamp(min=1e-9))
    if rank == 0:
        print(runner.report.summary())
    print(f"rank {rank} of {world}, {mesh}: {tokens.shape[0]} tokens, error {error:.1e}")
    assert error < 1e-5
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
