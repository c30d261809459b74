"""The kernel under AddressSanitizer and UndefinedBehaviorSanitizer, with buffers that end where the kernel has to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from moe_cpu.native import build

DRIVER = Path(__file__).with_name("driver.cpp")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def test_no_byte_beside_a_buffer_and_nothing_undefined(tmp_path: Path) -> None:
    """driver.cpp packs and runs layers of many sizes, and compares each with plain loops."""
    compiler = build.find_compiler(os.environ)
    if compiler is None:
        pytest.skip("no C++ compiler is on PATH")
    (tmp_path / "empty.cpp").write_text("int main() {}")
    probe = [*compiler, *SANITIZE, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    tried = subprocess.run(probe, capture_output=True, text=True, timeout=100, check=False)
    if tried.returncode:
        pytest.skip(f"no sanitizers with this compiler: {tried.stderr.strip().splitlines()[-1]}")
    capability = build.instructions(os.environ, torch.backends.cpu.get_cpu_capability())
    instructions = build.INSTRUCTIONS.get(capability, ())
    program = str(tmp_path / "driver")
    flags = [*build.FLAGS, *instructions, *SANITIZE, "-I", str(build.SOURCE.parent)]
    subprocess.run([*compiler, *flags, str(DRIVER), "-o", program], check=True, timeout=250)
    env = {**os.environ, "OMP_NUM_THREADS": "2", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=250, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("layers agree")
