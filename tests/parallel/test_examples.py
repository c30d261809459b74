"""examples/parallel as a user starts it: one host, two hosts (network namespaces), and the demo on two ranks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "parallel"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(150)
def test_the_demo_on_two_ranks_scores_what_it_scores_on_one() -> None:
    pytest.importorskip("transformers")
    out = run(*TORCHRUN, "--standalone", "--nproc-per-node=2", str(EXAMPLES / "demo.py"))
    assert out.count("bits a byte alone") == 2
    assert "planned" in out


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with one cable between them."""
    names = [f"moe{os.getpid()}{side}" for side in "ab"]
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need ip and root")
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                subprocess.run([ip, "netns", "add", name], check=True, capture_output=True, text=True)
                stack.callback(subprocess.run, [ip, "netns", "del", name], check=False, capture_output=True)
            cable = [ip, "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1]]
            subprocess.run(cable, check=True, capture_output=True, text=True)
            for number, name in enumerate(names, 1):
                for command in (f"addr add 10.213.7.{number}/30 dev cable", "link set cable up", "link set lo up"):
                    subprocess.run([ip, "-n", name, *command.split()], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield names[0], names[1]


@pytest.mark.timeout(150)
def test_one_layer_on_two_hosts(hosts: tuple[str, str]) -> None:
    started = []
    for number, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host, *TORCHRUN, "--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"]
        command += ["--master-addr=10.213.7.1", "--master-port=29517", str(EXAMPLES / "layer.py")]
        environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "cable"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    try:
        outs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outs
    assert "rank 0 of 2" in outs[0] and "rank 1 of 2" in outs[1]
