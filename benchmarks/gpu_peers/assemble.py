"""Makes what `moe-core bench` takes with `--peer-path` on a GPU: .peers (vLLM, SGLang) and .sonic (SonicMoE).

    python benchmarks/gpu_peers/assemble.py [--only vllm,sglang,sonic] [--wheels FOLDER]

Downloads the wheels with pip, for Python 3.12 on x86-64, and keeps the few files that the peers' kernels need. Both
folders are for a machine without a network: together they stay under 64 MiB. No line of the peers is part of this
project; what their files import and does not matter to a kernel is in stubs.py.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VERSIONS = {
    "vllm": "0.33.0",
    "sglang": "0.5.23",
    "sonic-moe": "0.1.2.post1",
    "quack-kernels": "0.4.1",
    "nvidia-cutlass-dsl-libs-base": "4.4.2",
    "apache-tvm-ffi": "0.1.15.post2",
    "torch-c-dlpack-ext": "0.1.5",
}
SONIC = [name for name in VERSIONS if name not in ("vllm", "sglang")]

_LAYERS = "vllm/model_executor/layers"
VLLM = (
    f"{_LAYERS}/fused_moe/fused_moe.py",
    f"{_LAYERS}/fused_moe/moe_align_block_size.py",
    f"{_LAYERS}/fused_moe/activation.py",
    f"{_LAYERS}/fused_moe/config.py",
    f"{_LAYERS}/fused_moe/utils.py",
    f"{_LAYERS}/fused_moe/configs/E=*,device_name=NVIDIA_H100_80GB_HBM3.json",
    f"{_LAYERS}/fused_moe/configs/E=*,device_name=NVIDIA_H200.json",
    f"{_LAYERS}/quantization/utils/ocp_mx_utils.py",
    "vllm/triton_utils/allocation.py",
    "vllm/utils/math_utils.py",
)
# Of each library the kernels that are called, by a part of their names; empty for all.
LIBRARIES = {
    "vllm/_moe_C_stable_libtorch.abi3.so": (),
    "vllm/_C_stable_libtorch.abi3.so": (b"act_and_mul_kernel", b"per_token_group_quant"),
}
_RUNNER = "sglang/srt/layers/moe/moe_runner/triton_utils"
SGLANG = (
    f"{_RUNNER}/*.py",
    f"{_RUNNER}/configs/*,device_name=NVIDIA_H100_80GB_HBM3.json",
    f"{_RUNNER}/configs/*,device_name=NVIDIA_H100_80GB_HBM3_down.json",
    f"{_RUNNER}/configs/*,device_name=NVIDIA_H200.json",
    f"{_RUNNER}/configs/*,device_name=NVIDIA_H200_down.json",
    "sglang/kernels/ops/moe/fused_moe_triton_kernels.py",
    "sglang/kernels/ops/moe/moe_align_small_numel.py",
)


def download(names: list[str], folder: Path) -> dict[str, Path]:
    """The wheels by name; those that lie in the folder already are not fetched again."""
    found = {}
    for name in names:
        pattern = f"{name.replace('-', '_')}-{VERSIONS[name]}-*.whl"
        if not list(folder.glob(pattern)):
            tags = (f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 28, 31, 34, 35))
            platforms = [part for tag in ("manylinux2014_x86_64", *tags) for part in ("--platform", tag)]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--python-version", "312", *platforms, "--dest", str(folder), f"{name}=={VERSIONS[name]}"]
            subprocess.run(command, check=True)
        found[name] = next(folder.glob(pattern))
    return found


def extract(wheel: Path, patterns: tuple[str, ...], target: Path) -> None:
    """Files of a wheel by pattern, where a star also matches slashes."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        missing = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
        if missing:
            raise SystemExit(f"{wheel.name} has no {', '.join(missing)}")
        archive.extractall(target, names)


def holds(image: bytes, kernels: tuple[bytes, ...]) -> bool:
    """Whether compressed machine code has one of these kernels; yes where the command zstd is missing."""
    zstd = shutil.which("zstd")
    if not kernels or zstd is None:
        return True
    # Padding behind the code makes zstd complain at its end.
    code = subprocess.run([zstd, "-dcq"], input=image, capture_output=True, check=False).stdout
    return any(kernel in code for kernel in kernels)


def for_hopper(library: bytes, kernels: tuple[bytes, ...]) -> bytes:
    """The library with zeros in the place of device code that no H100 runs, which leaves a tenth of it after xz.

    The driver chooses an image by its header and loads it at a kernel's first launch, so zeros are never looked at.
    Files that are not compiled for every GPU go too: they are products in other formats, which these peers never call.
    """
    data, position = bytearray(library), 0
    while (position := data.find(b"\x50\xed\x55\xba", position)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, position + 4)
        if (version, header) != (1, 16):
            position += 4
            continue
        item, position = position + header, position + header + size
        images = []
        while item < position:
            kind, _, own, length = struct.unpack_from("<HHIQ", data, item)
            images.append((kind, *struct.unpack_from("<I", data, item + 28), item + own, length))
            item += own + length
        everywhere = any(arch == 75 for _, arch, _, _ in images)
        for kind, arch, start, length in images:
            image = bytes(data[start : start + length])
            if not (everywhere and (kind, arch) == (2, 90) and holds(image, kernels)):  # 2: machine code
                data[start : start + length] = bytes(length)
    return bytes(data)


def compress(data: bytes, target: Path) -> None:
    """As xz, with its filter for x86 code."""
    code = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**26, "nice_len": 128, "lc": 4, "lp": 0, "pb": 0}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(lzma.compress(data, check=lzma.CHECK_CRC32, filters=[{"id": lzma.FILTER_X86}, code]))


def peers(wheels: dict[str, Path], target: Path) -> None:
    """vLLM's and SGLang's files with our stubs around them."""
    shutil.copy(HERE / "stubs.py", target / "gpu_peer_stubs.py")
    for name, patterns in (("vllm", VLLM), ("sglang", SGLANG)):
        if name not in wheels:
            continue
        shutil.rmtree(target / name, ignore_errors=True)
        extract(wheels[name], patterns, target)
        start = f'import gpu_peer_stubs\n\n__version__ = "{VERSIONS[name]}"\ngpu_peer_stubs.{name}()\n'
        (target / name / "__init__.py").write_text(start)
    if "vllm" in wheels:
        with zipfile.ZipFile(wheels["vllm"]) as archive:
            for library, kernels in LIBRARIES.items():
                compress(for_hopper(archive.read(library), kernels), target / "so" / f"{Path(library).name}.xz")


def sonic(wheels: dict[str, Path], target: Path) -> None:
    """SonicMoE and what it needs as one archive, which sonic.py unpacks where it runs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in SONIC:
            with zipfile.ZipFile(wheels[name]) as archive:
                for info in archive.infolist():
                    path = info.filename
                    if not path.endswith((".py", ".so", "METADATA")) or path.endswith("-cpu.so"):
                        continue
                    entry = tarfile.TarInfo(path)
                    entry.size, entry.mode = info.file_size, 0o755
                    tar.addfile(entry, archive.open(info))
    compress(stream.getvalue(), target / "sonic.tar.xz")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="vllm,sglang,sonic", help="a list with commas")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl" / "gpu_peers", help="where downloads are kept")
    parser.add_argument("--target", type=Path, default=ROOT, help="where .peers and .sonic are made")
    args = parser.parse_args()
    asked = args.only.split(",")
    args.wheels.mkdir(parents=True, exist_ok=True)
    names = [name for name in ("vllm", "sglang") if name in asked] + (SONIC if "sonic" in asked else [])
    wheels = download(names, args.wheels)
    for folder in (args.target / ".peers", args.target / ".sonic"):
        folder.mkdir(parents=True, exist_ok=True)
    peers(wheels, args.target / ".peers")
    if "sonic" in asked:
        sonic(wheels, args.target / ".sonic")
    for folder in (args.target / ".peers", args.target / ".sonic"):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder.name}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
