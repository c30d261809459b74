"""Importing moe_core, and loading every built-in plugin, imports nothing heavy and reads no environment."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, sys
reads = []
class Spy(dict):
    pass
import torch
class Env:
    def __init__(self, real): self.real = real
    def __getattr__(self, name): return getattr(self.real, name)
    def get(self, key, default=None):
        if key.startswith("MOE_CORE"): reads.append(key)
        return self.real.get(key, default)
    def __getitem__(self, key):
        if key.startswith("MOE_CORE"): reads.append(key)
        return self.real[key]
    def __contains__(self, key): return key in self.real
    def __iter__(self): return iter(self.real)
os.environ = Env(os.environ)
import moe_core
assert not reads, reads
import importlib.metadata
for entry in importlib.metadata.entry_points(group="moe_core.backends"):
    entry.load()
assert not reads, reads
names = ("triton", "torch_xla", "intel_extension_for_pytorch", "jax", "transformers", "typer", "pytest")
heavy = [name for name in names if name in sys.modules]
assert not heavy, heavy
"""


def test_import_is_free() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_process_that_measures_needs_no_test_tools() -> None:
    """The environments of other libraries, which it may be started in, hold torch and pluggy."""
    code = "import sys, moe_core.bench.session; print([n for n in ('pytest', 'rich', 'typer') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
