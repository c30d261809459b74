"""SonicMoE as a peer of `moe-core bench`: its path for a fixed top-k, from ids and weights that are given.

    python -m moe_core.bench --peer-path .sonic --adapter benchmarks/gpu_peers/sonic.py --peers sonicmoe/topk ...

Quack's tuner times every configuration of both products at a cell's first call. As a command it only unpacks:
`python benchmarks/gpu_peers/sonic.py .sonic`.
"""

from __future__ import annotations

import lzma
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARCHIVE = "sonic.tar.xz"
UNPACKED = Path(tempfile.gettempdir()) / "moe-core-gpu-peers" / "sonic"


def unpack(paths: Iterable[Path]) -> None:
    """Once for a machine, from the first folder that has the archive."""
    archive = next((path / ARCHIVE for path in paths if (path / ARCHIVE).is_file()), None)
    if archive is None or UNPACKED.exists():
        return
    UNPACKED.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UNPACKED.parent) as folder:
        with lzma.open(archive) as stream, tarfile.open(fileobj=stream) as tar:
            tar.extractall(Path(folder) / "sonic", filter="data")
        (Path(folder) / "sonic").rename(UNPACKED)


def prepare(paths: Iterable[Path] = ()) -> None:
    """Have what was unpacked found, by the processes in which quack compiles too."""
    unpack(paths)
    folders = [str(UNPACKED), str(UNPACKED / "nvidia_cutlass_dsl" / "python_packages")]
    if UNPACKED.exists() and folders[0] not in sys.path:
        sys.path += folders
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), *folders)))
        os.environ.setdefault("QUACK_COMPILE_WORKERS", str(min(16, os.cpu_count() or 1)))


def topk(x: Any, weights: Any, ids: Any, w13: Any, w2: Any) -> Any:
    """What its moe_TC_softmax_topk_layer does once the router has chosen; w13 is [2I, H, E] and interleaved."""
    import torch
    from sonicmoe import functional
    from sonicmoe.enums import ActivationType

    (tokens, k), experts, device = ids.shape, w2.shape[-1], x.device
    index = lambda size: torch.empty(size, dtype=torch.int32, device=device)  # noqa: E731
    scatter, back, gather = (index(tokens * k) for _ in range(3))
    frequency, offset = index(experts), index(experts + 1)
    functional.TC_topk_router_metadata_triton(ids, experts, frequency, offset, gather, scatter, back)
    where, kind = (gather, scatter, back, None, False), ActivationType.SWIGLU
    inner, before = functional._UpProjection.apply(x, w13, None, offset, tokens * k, k, *where, kind, True)
    return functional._DownProjection.apply(inner, before, w2, None, weights, offset, tokens, k, *where, kind)


def build(problem: Any) -> Any:
    """Gate and up rows interleaved, as it wants them, in a copy."""
    import torch

    from moe_core.bench.registry import Built, require

    prepare(problem.paths)
    sonic, quack = require("sonicmoe", "sonic-moe", problem.paths), require("quack", "quack-kernels")
    w13, w2 = problem.experts
    gate, up = w13.chunk(2, dim=1)
    first, second = torch.stack((gate, up), dim=2).flatten(1, 2).permute(1, 2, 0), w2.permute(1, 2, 0)

    def call(draw: Any) -> Any:
        return topk(draw.hidden_states, draw.topk_weights, draw.topk_ids_int32, first, second)

    how = "its fixed top-k path from given ids, products tuned by quack"
    return Built(call, f"sonic-moe {sonic.__version__}, {how} {quack.__version__} on this GPU")


if __name__ == "__main__":
    unpack(map(Path, sys.argv[1:]))
else:
    from moe_core.bench.registry import Adapter, register

    register(Adapter("sonicmoe/topk", build, ("cuda",), ("experts",), copies=1.0))
