"""Compiling experts.cpp with the system's compiler, once for a machine: at the first bind, never at import."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform as host
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).with_name("experts.cpp")
_NAMES = ("layer", "vectors", "codes", "panels", "tile_layout", "tile_unit", "tile_vectors", "tile_products", "tiles")
HEADERS = tuple(SOURCE.with_name(f"{name}.h") for name in _NAMES)
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300  # it takes three; a compiler that hangs must not hang a bind
KEPT = 16  # libraries in the cache: some compilers and instruction sets of two or three versions of the source
SCRATCH = "building-"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fopenmp", "-Wno-psabi")
VARIABLE = "MOE_CORE_CPU_ISA"
# By torch's name for the vector instructions in use, so that ATEN_CPU_CAPABILITY speaks for this kernel too. It has no
# name for AVX-512's products of bfloat16, and none for AMX, which is AVX-512 with a matrix unit.
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": _AVX512,
    "AVX512_BF16": (*_AVX512, "-mavx512bf16"),
    "AMX": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
LANES = {"AVX2": 8, "AVX512": 16, "AVX512_BF16": 16, "AMX": 16}
_PRODUCTS = {"AVX512_BF16": {"avx512_bf16"}, "AMX": {"amx_tile", "amx_bf16", "avx512_bf16"}}  # /proc/cpuinfo's names
ANY_LANES = 4
REMEDY = "install g++ (apt install g++, dnf install gcc-c++) or name a compiler in CXX"

logger = logging.getLogger("moe_core")
_failures: dict[tuple[str, ...], str] = {}
_lock = threading.Lock()


class BuildError(Exception):
    """There is no kernel; the text says why."""


def find_compiler(env: Mapping[str, str]) -> tuple[str, ...] | None:
    """The command of the first compiler on PATH: that of CXX, or a usual name."""
    path = env.get("PATH")
    if env.get("CXX", "").strip():
        program, *arguments = shlex.split(env["CXX"])
        found = shutil.which(program, path=path)
        return (found, *arguments) if found else None
    for name in COMPILERS:
        if found := shutil.which(name, path=path):
            return (found,)
    return None


def instructions(env: Mapping[str, str], capability: str) -> str:
    """Which of INSTRUCTIONS to compile for, by torch's capability, the processor, and what ``MOE_CORE_CPU_ISA`` allows.

    The widest that is known to work: where a compiler has refused the flags, those of fewer.
    """
    names = ("DEFAULT", *INSTRUCTIONS)
    found = capability if capability in names else "DEFAULT"
    asked = env.get(VARIABLE, "").strip().upper()
    most = asked if asked in names else names[-1]
    if found == "AVX512":
        compiler, flags = find_compiler(env) or (), _flags()
        for more, needed in _PRODUCTS.items():
            allowed = names.index(more) <= names.index(most) and (*compiler, more) not in _failures
            found = more if needed <= flags and allowed else found
    return min(found, most, key=names.index)


@functools.cache
def _flags() -> frozenset[str]:
    """What the processor has, by Linux's names."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return frozenset(next((line.split() for line in info if line.startswith("flags")), []))
    except OSError:
        return frozenset()


def _names() -> str:
    return ", ".join(("default", *(name.lower() for name in INSTRUCTIONS)))


def obstacle(env: Mapping[str, str], capability: str) -> str:
    """Why there can be no kernel; empty where nothing is known against it. Runs nothing."""
    asked = env.get(VARIABLE, "").strip().upper()
    if asked and asked not in ("DEFAULT", *INSTRUCTIONS):
        return f"{VARIABLE}={env[VARIABLE]!r} is none of {_names()}"
    if os.name != "posix":
        return "the native kernel is built on POSIX systems alone"
    compiler = find_compiler(env)
    if compiler is None:
        return f"CXX={env['CXX']!r} is not on PATH" if env.get("CXX", "").strip() else "no C++ compiler is on PATH"
    return _failures.get((*compiler, instructions(env, capability)), "")


def load(env: Mapping[str, str], capability: str) -> ctypes.CDLL:
    """The kernel, from this process, from the cache, or compiled now.

    Raises:
        BuildError: no compiler, or it failed; the next call says the same without trying again.
    """
    with _lock:
        reason = obstacle(env, capability)
        if reason:
            raise BuildError(reason)
        compiler = find_compiler(env)
        assert compiler is not None
        wanted = instructions(env, capability)
        try:
            return _loaded(compiler, wanted, cache_folder(env))
        except (BuildError, OSError, subprocess.SubprocessError) as error:
            _failures[(*compiler, wanted)] = reason = str(error)
            fewer = instructions(env, capability)
            if fewer == wanted:
                raise BuildError(reason) from error
            logger.warning("no kernel for %s, taking %s: %s", wanted, fewer, reason)
    return load(env, capability)


def compile_kernel(compiler: tuple[str, ...], capability: str, folder: Path, more: tuple[str, ...] = ()) -> Path:
    """The shared library in ``folder``, compiled unless it is there; safe with several processes.

    The name holds a hash of all that decides what is in it. A process that finds none compiles under a name of its own
    and renames, so nobody ever sees half a file. Each new one may push the one longest unused out of the folder.
    """
    clang = "clang" in (version := _version(compiler))
    flags = (*FLAGS, *INSTRUCTIONS.get(capability, ()), *more)
    sources = [path.read_text("utf-8") for path in (SOURCE, *HEADERS)]
    key = hashlib.sha256("\0".join((*sources, *compiler, version, host.machine(), *flags)).encode())
    target = folder / f"experts-{key.hexdigest()[:24]}.so"
    if _mark_used(target):
        return target
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        compiled, linked = f"{scratch}/experts.o", f"{scratch}/experts.so"
        _run([*compiler, *flags, "-c", str(SOURCE), "-o", compiled])
        # GCC's calls are left open and meet the OpenMP runtime that torch brought: two runtimes in one process have two
        # pools of threads, which wait for work on the same cores.
        _run([*compiler, "-shared", *more, compiled, "-o", linked, *(("-fopenmp",) if clang else ())])
        os.replace(linked, target)
    _clean(folder, target)
    return target


def _mark_used(library: Path) -> bool:
    """Whether it is there; the time of its last use is its access time, which many mounts do not keep by themselves."""
    try:
        os.utime(library, ns=(time.time_ns(), library.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _clean(folder: Path, built: Path) -> None:
    """Keep ``built`` and the libraries used last, ``KEPT`` in all, and no scratch folder of a process that was killed.

    Another process may clean at the same time, so a file that is gone is no error; one that has a library loaded keeps
    it without its name, and one that was about to load it compiles again.
    """
    used: list[tuple[int, Path]] = []
    for path in folder.iterdir():
        try:
            found = path.lstat()
        except OSError:
            continue
        if path.name.startswith(SCRATCH) and time.time() - found.st_mtime > 4 * SECONDS:
            shutil.rmtree(path, ignore_errors=True)
        elif path != built and path.name.startswith("experts-") and path.suffix == ".so":
            used.append((found.st_atime_ns, path))
    for _, path in sorted(used, reverse=True)[KEPT - 1 :]:
        with contextlib.suppress(OSError):
            path.unlink()


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where compiled kernels are kept; a folder for this process alone where that cannot be written or trusted."""
    base = env.get("XDG_CACHE_HOME") or (f"{env['HOME']}/.cache" if env.get("HOME") else "")
    if base and os.path.isabs(base):
        folder = Path(base) / "moe_core"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # What lies there is run: nobody else may be able to put something there.
            found = folder.stat()
            if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                with tempfile.TemporaryFile(dir=folder):
                    return folder
        except OSError:
            pass
    return Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="moe_core-")


@functools.cache
def _loaded(compiler: tuple[str, ...], capability: str, folder: Path) -> ctypes.CDLL:
    path = compile_kernel(compiler, capability, folder)
    _share_openmp()
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        if path.exists():
            raise
        library = ctypes.CDLL(str(compile_kernel(compiler, capability, folder)))  # cleaned away in between
    lanes, expected = library.moe_lanes(), LANES.get(capability, ANY_LANES)
    if lanes != expected:
        raise BuildError(f"{path} has vectors of {lanes} float32, expected {expected}; remove it")
    if capability == "AMX" and not library.moe_tiles():
        raise BuildError("the system refuses AMX's tiles to this process")
    return library


def _share_openmp() -> None:
    """Let the kernel find the OpenMP runtime that is in this process already; torch loads its own for itself."""
    pattern = re.compile(r"/lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/]*$")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps}
    found = sorted((path for path in paths if pattern.search(path)), key=lambda path: ("torch" not in path, path))
    ctypes.CDLL(found[0] if found else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"])


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"{command[0]} failed with exit {done.returncode}: {first.strip()[:300]}")
    return done.stdout
