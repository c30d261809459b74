"""Compiling on demand: once, by nobody who only asks, by several processes at once, and what happens without it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core import MoEConfig, MoERunner, Verdict, explain
from moe_core.errors import BackendUnavailableError, BindError
from moe_core.platform import Platform
from moe_core.testing.cases import random_weights
from moe_cpu import ipex, onednn, strategies
from moe_cpu.native import build

CONFIG = MoEConfig(32, 24, 4, 2)
BIND = """
import torch
from moe_core import MoEConfig, MoELayer
layer = MoELayer(MoEConfig(32, 24, 4, 2))
with torch.no_grad():
    layer(torch.randn(3, 32))
print(layer.report.strategies["experts"])
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has loaded and failed at nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_failures", {})
    build._loaded.cache_clear()
    build._version.cache_clear()
    yield tmp_path / "cache" / "moe_core"
    build._loaded.cache_clear()
    build._version.cache_clear()


@pytest.fixture
def compiler(cache: Path) -> tuple[str, ...]:
    found = build.find_compiler(os.environ)
    if found is None:
        pytest.skip("no C++ compiler is on PATH")
    return found


@pytest.fixture
def without_ipex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipex, "verdict", lambda platform: Verdict.no("no IPEX", "install it"))


@pytest.fixture
def broken_compiler(without_ipex: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that says its version and then fails; it counts how often."""
    path, count = tmp_path / "bin" / "c++", tmp_path / "count"
    path.parent.mkdir()
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1.0; exit; fi\n'
        f'echo x >>{count}; echo "fatal error: no iostream" >&2; exit 1\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return count


def bound(dtype: torch.dtype = torch.float32) -> MoERunner:
    return MoERunner(CONFIG, random_weights(CONFIG, dtype=dtype), backend="cpu")


def test_only_a_bind_compiles(compiler: Any, cache: Path) -> None:
    """explain promises the kernel without building it; the first bind builds, the second finds."""
    report = explain(CONFIG, dtype=torch.float32)
    assert report.strategies["experts"].startswith("native") and not cache.exists()
    assert bound().report.strategies == report.strategies
    (built,) = cache.iterdir()
    changed = built.stat().st_mtime_ns
    build._loaded.cache_clear()
    bound()
    assert [*cache.iterdir()] == [built] and built.stat().st_mtime_ns == changed
    assert built.stat().st_uid == os.getuid() and not cache.stat().st_mode & 0o077


def test_two_processes_compile_at_once(compiler: Any, cache: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BIND]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert all(output.startswith("native") for output in outputs)
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_no_compiler(without_ipex: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN serves, and the report says what is missing and what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    runner = bound()
    assert runner.report.strategies["experts"].startswith("onednn (not native: no C++ compiler is on PATH; install g++")
    assert "no C++ compiler is on PATH" in str(runner.report)
    assert isinstance(runner._bindings[False]._experts_plan.weights.experts, onednn.OneDnnExperts)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "CXX='/nowhere/g++' is not on PATH" in explain(CONFIG, dtype=torch.float32).strategies["experts"]


def test_a_failed_build(broken_compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    """oneDNN serves; log and report name the compiler's message; it is not asked a second time for any instructions."""
    with caplog.at_level(logging.WARNING, logger="moe_core"):
        runner = bound()
    assert runner.report.strategies["experts"].startswith("onednn (not native: ")
    assert "fatal error: no iostream" in runner.report.strategies["experts"]
    assert "fatal error: no iostream" in caplog.text
    tried = broken_compiler.read_text()
    bound()
    assert broken_compiler.read_text() == tried
    assert "fatal error: no iostream" in explain(CONFIG, dtype=torch.float32).strategies["experts"]


def test_a_failed_build_where_nothing_else_serves(broken_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the bind fails, with reason and remedy; the next selection knows better."""
    refusal = Verdict.no("no instructions for bfloat16", "use float32")
    monkeypatch.setattr(onednn, "verdict", lambda platform: refusal)
    with pytest.raises(BindError, match="no iostream.*install g"):
        bound(torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match="no iostream"):
        bound(torch.bfloat16)
    assert explain(CONFIG, dtype=torch.bfloat16).backend == "reference"


@pytest.mark.parametrize("name", list(strategies.STRATEGIES))
def test_a_strategy_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not strategies.STRATEGIES[name](Platform.detect("cpu", torch.float32)).ok:
        pytest.skip(f"{name} cannot serve here")
    monkeypatch.setenv("MOE_CORE_CPU_STRATEGY", name)
    chosen = bound().report.strategies["experts"]
    assert chosen.startswith(name) and chosen.endswith("(asked for by MOE_CORE_CPU_STRATEGY)")


def test_a_strategy_asked_for_is_never_substituted(
    broken_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_CORE_CPU_STRATEGY", "native")
    with pytest.raises(BindError, match="no iostream.*MOE_CORE_CPU_STRATEGY=native"):
        bound()
    monkeypatch.setenv("CXX", "nowhere")
    with pytest.raises(BackendUnavailableError, match="MOE_CORE_CPU_STRATEGY=native"):
        bound()
    monkeypatch.setenv("MOE_CORE_CPU_STRATEGY", "fastest")
    with pytest.raises(BackendUnavailableError, match="'fastest' is no strategy.*native, ipex, onednn"):
        bound()


def test_a_cache_that_others_may_write_to_is_not_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    folder = build.cache_folder(os.environ)
    assert folder != cache and not folder.stat().st_mode & 0o077
    cache.chmod(0o700)
    assert build.cache_folder(os.environ) == cache
    assert build.cache_folder({}) == folder == build.cache_folder({"XDG_CACHE_HOME": "/proc/nowhere"})


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="flags of x86-64")
def test_the_widest_vectors_compile(compiler: tuple[str, ...], tmp_path: Path) -> None:
    """Also on a processor without them; there it is not run."""
    assert build.compile_kernel(compiler, "AVX512", tmp_path).stat().st_size > 10_000


def test_another_cache_entry_for_other_flags(compiler: tuple[str, ...], tmp_path: Path) -> None:
    one = build.compile_kernel(compiler, "DEFAULT", tmp_path, ("-O0",))
    changed = one.stat().st_mtime_ns
    assert build.compile_kernel(compiler, "DEFAULT", tmp_path, ("-O0",)) == one and one.stat().st_mtime_ns == changed
    assert build.compile_kernel(compiler, "DEFAULT", tmp_path, ("-O0", "-g0")) != one
    assert len([*tmp_path.iterdir()]) == 2


def test_the_cache_keeps_those_used_last(
    compiler: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new library pushes out the one longest unused, however new its file; foreign files and running builds stay."""
    monkeypatch.setattr(build, "KEPT", 3)
    oldest = build.compile_kernel(compiler, "DEFAULT", tmp_path, ("-O0",))
    os.utime(oldest, (1, 1))
    for number in range(3):
        (path := tmp_path / f"experts-{number}.so").touch()
        os.utime(path, (10 + number, 100 - number))
    (tmp_path / "notes.txt").touch()
    for name, age in (("building-killed", 5 * build.SECONDS), ("building-now", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert build.compile_kernel(compiler, "DEFAULT", tmp_path, ("-O0",)) == oldest  # a use
    built = build.compile_kernel(compiler, "DEFAULT", tmp_path, ("-O0", "-g0"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {oldest.name, built.name, "experts-2.so", "notes.txt", "building-now"}


def test_a_library_cleaned_away_before_it_was_loaded(
    compiler: tuple[str, ...], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process's cleaning between finding and loading costs a second build, not the bind."""
    compile_kernel, calls = build.compile_kernel, []

    def cleaned_at_first(*arguments: Any) -> Path:
        calls.append(path := compile_kernel(*arguments))
        if len(calls) == 1:
            path.unlink()
        return path

    monkeypatch.setattr(build, "compile_kernel", cleaned_at_first)
    assert bound().report.strategies["experts"].startswith("native")
    assert len(calls) == 2 and calls[1].exists()


def test_one_openmp_runtime() -> None:
    """The kernel brings none of its own: two pools of threads would wait for each other's cores."""
    compiler = build.find_compiler(os.environ)
    if compiler is None or "clang" in build._version(compiler):
        pytest.skip("no GCC on PATH; clang's calls need its own runtime")
    code = BIND + (
        "import re\nmaps = open('/proc/self/maps').read()\n"
        "print(len(set(re.findall(r'/\\S*lib(?:gomp|iomp5|omp)\\b\\S*', maps))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.splitlines()[-1] == "1", done.stdout


ORDER = ["DEFAULT", *build.INSTRUCTIONS]


@pytest.mark.parametrize("asked", ["default", *map(str.lower, build.INSTRUCTIONS)])
def test_fewer_instructions_on_request(compiler: Any, asked: str) -> None:
    """MOE_CORE_CPU_ISA takes some away and adds none."""
    for capability in ("DEFAULT", "AVX2", "AVX512"):
        widest = build.instructions({}, capability)
        found = build.instructions({build.VARIABLE: asked}, capability)
        assert found == min(widest, asked.upper(), key=ORDER.index)


def test_unknown_instructions_are_refused(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.VARIABLE, "sse9")
    known = "default, avx2, avx512, avx512_bf16, amx"
    assert f"MOE_CORE_CPU_ISA='sse9' is none of {known}" in str(explain(CONFIG, dtype=torch.float32))


def test_a_compiler_that_does_not_know_products_of_bfloat16(
    compiler: tuple[str, ...],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Fewer instructions serve, the log says why, and the report says what is used."""
    widest = build.instructions({}, torch.backends.cpu.get_cpu_capability())
    if widest not in ("AVX512_BF16", "AMX"):
        pytest.skip("this processor has neither a matrix unit nor products of bfloat16")
    older = tmp_path / "older"
    refuse = 'case "$*" in *-mavx512bf16*) echo "error: unrecognized option" >&2; exit 1;; esac'
    older.write_text(f'#!/bin/sh\n{refuse}\nexec {compiler[0]} "$@"\n')
    older.chmod(0o755)
    monkeypatch.setenv("CXX", str(older))
    with caplog.at_level(logging.WARNING, logger="moe_core"):
        runner = bound(torch.bfloat16)
    assert runner.report.strategies["experts"] == "native, AVX-512 vectors"
    assert f"no kernel for {widest}, taking AVX512" in caplog.text and "unrecognized option" in caplog.text


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ({"avx512f"}, "AVX512"),
        ({"avx512f", "avx512_bf16"}, "AVX512_BF16"),
        ({"avx512f", "avx512_bf16", "amx_tile", "amx_bf16"}, "AMX"),
        ({"avx512f", "amx_tile"}, "AVX512"),
    ],
)
def test_instructions_that_torch_has_no_name_for(monkeypatch: pytest.MonkeyPatch, flags: set[str], most: str) -> None:
    """They go by what Linux says of the processor, and only where torch may use AVX-512."""
    monkeypatch.setattr(build, "_flags", lambda: frozenset(flags))
    assert build.instructions({}, "AVX512") == most
    assert build.instructions({}, "AVX2") == "AVX2"
    assert build.instructions({build.VARIABLE: "avx512"}, "AVX512") == "AVX512"
    assert build.instructions({build.VARIABLE: "avx512_bf16"}, "AVX512") == min(most, "AVX512_BF16", key=ORDER.index)
