"""The command line of ``moe-core bench``; needs neither typer nor an installed moe-core."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BenchError
from . import compare as comparing
from . import record as records
from .settings import DTYPES, MAIN, Candidate, Settings
from .shapes import SHAPES, STAGES, parse_shape

if TYPE_CHECKING:
    from rich.console import Console

_EPILOG = """\
examples:
  moe-core bench --shapes small --tokens 1,16 --quick
  moe-core bench --shapes qwen3-30b-a3b,olmoe --tokens 1,16,256 --threads 1,2 --json out.json --markdown out.md
  moe-core bench --worker zen=~/zen/bin/python --peers zen:zentorch,loop --json out.json
  moe-core bench --show out.json --plot charts
  moe-core bench --compare before.json after.json
docs/performance.md says how to read the result."""


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(
        prog="moe-core bench",
        description="Time moe_core beside other implementations and beside what the machine can do at best.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    grid = made.add_argument_group("what is measured (lists with commas)")
    grid.add_argument("--shapes", default="small,qwen3-30b-a3b", help=f"{', '.join(SHAPES)}, all, or HxIxExK[+I_s]")
    grid.add_argument("--quant", default="", help="of the routed experts: SCHEME or SCHEME:GROUP_SIZE (default: none)")
    grid.add_argument("--tokens", default="1,4,16,64,256", help="T of each call (default: %(default)s)")
    grid.add_argument("--dtypes", help=f"of {', '.join(DTYPES)} (default: what the device is fast in)")
    grid.add_argument("--stages", default=",".join(STAGES), help="experts, layer or both (default: %(default)s)")
    grid.add_argument("--device", help="default: the accelerator, or the CPU where there is none")
    grid.add_argument("--threads", default="1", help="of a CPU; each number has processes of its own (default: 1)")
    who = made.add_argument_group("who is measured")
    who.add_argument(
        "--backends",
        default="auto",
        help="of moe_core: auto (what it would choose), all, or names (NAME@before: shared experts in that order, "
        "NAME@dequantised: without --quant)",
    )
    who.add_argument("--plugin", action="append", default=[], metavar="NAME=MODULE", help="a backend not installed")
    who.add_argument(
        "--peers", default="auto", help="auto (all of the device), none, or names, WORKER:NAME in a worker"
    )
    who.add_argument("--worker", action="append", default=[], metavar="NAME=PYTHON", help="another environment")
    who.add_argument("--peer-path", action="append", default=[], metavar="FOLDER", help="where libraries of peers lie")
    who.add_argument("--adapter", action="append", default=[], metavar="FILE", help="a file that registers a peer")
    how = made.add_argument_group("how")
    how.add_argument("--budget", type=float, default=0.5, help="seconds of calls a candidate and cell (default: 0.5)")
    how.add_argument("--rounds", type=int, default=5, help="turns in which they are taken (default: 5)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--quick", action="store_true", help="short: small ceilings, a budget of 0.05")
    how.add_argument("--patience", type=float, default=2.0, help="a call longer than so many seconds is not timed")
    how.add_argument(
        "--quiet",
        type=float,
        default=0.0,
        help="seconds to wait, in all, while other work is busy, and to measure disturbed cells again",
    )
    how.add_argument("--max-seconds", type=float, help="begin no cell after that; the same command goes on later")
    out = made.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="the record, written cell by cell and continued")
    out.add_argument("--fresh", action="store_true", help="start that file anew")
    out.add_argument("--markdown", type=Path, metavar="FILE")
    out.add_argument("--plot", type=Path, metavar="FOLDER", help="charts; needs matplotlib")
    out.add_argument("--plot-format", default="svg", choices=("svg", "png"))
    out.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, show this record")
    out.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="measure nothing, say what moved")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    try:
        return _run(options, "moe-core bench " + shlex.join(given))
    except BenchError as error:
        print(f"BenchError: {error}", file=sys.stderr)  # noqa: T201 (the terminal is who asked)
        return 1
    except KeyboardInterrupt:
        print("stopped; with --json the same command goes on", file=sys.stderr)  # noqa: T201
        return 130


def _run(options: argparse.Namespace, command: str) -> int:
    from . import show

    console = _console()
    if options.compare:
        before, after = (records.load(path) for path in options.compare)
        show.print_comparison(comparing.compare(before, after), console)
        return 0
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise BenchError('--plot needs matplotlib: pip install "moe-core[bench]"')
    record = records.load(options.show) if options.show else _measure(options, command)
    show.print_record(record, console)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(show.markdown(record), encoding="utf-8")
    if options.plot is not None:
        from .plot import plot

        for path in plot(record, options.plot, options.plot_format):
            console.print(str(path), highlight=False)
    wrong = any(result["status"] == "wrong" for cell in record["cells"] for result in _ours(cell))
    return 1 if wrong else 0


def _ours(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in cell["results"] if result["kind"] == "moe_core"]


def _measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    from . import registry, show
    from .runner import Bench
    from .worker import RequestFailed, Worker, WorkerDied, spawn

    registry.load_adapters(map(Path, options.adapter))
    settings = settings_of(options)
    before = records.load(options.json) if options.json and options.json.exists() and not options.fresh else None

    def make(name: str, session: dict[str, Any]) -> Worker:
        return spawn(name, sys.executable if name == MAIN else settings.workers[name], session)

    def save(record: dict[str, Any]) -> None:
        if options.json:
            records.save(record, options.json)

    try:
        with show.Bar() as bar:
            return Bench(settings, make, command, bar).run(before, save, options.json)
    except (WorkerDied, RequestFailed) as error:
        raise BenchError(f"the process that measures failed: {error}") from error


def settings_of(options: argparse.Namespace) -> Settings:
    """Read the options.

    Raises:
        BenchError: a value that cannot be.
    """
    import torch

    from ..platform import default_device

    device = default_device() if options.device is None else _device(options.device)
    shapes = SHAPES.values() if options.shapes == "all" else [parse_shape(text) for text in _words(options.shapes)]
    quants = _words(options.quant)
    if quants:
        shapes = [shape.quantised(quant) for shape in shapes for quant in quants]
    workers = {name: os.path.expanduser(python) for name, python in _pairs("--worker", "PYTHON", options.worker)}
    settings = Settings(
        shapes=tuple(shapes),
        tokens=_numbers("--tokens", options.tokens),
        dtypes=tuple(_words(options.dtypes)) if options.dtypes else default_dtypes(device),
        stages=tuple(_words(options.stages)),
        threads=_numbers("--threads", options.threads) if device.type == "cpu" else (0,),
        device=str(device),
        candidates=_candidates(options, device.type),
        workers=workers,
        paths=tuple(os.path.abspath(os.path.expanduser(path)) for path in options.peer_path),
        plugins=dict(_pairs("--plugin", "MODULE", options.plugin)),
        adapters=tuple(os.path.abspath(path) for path in options.adapter),
        budget=options.budget,
        rounds=options.rounds,
        seed=options.seed,
        quick=options.quick,
        patience=options.patience,
        quiet=options.quiet,
        max_seconds=options.max_seconds,
    )
    if device.type not in ("cpu", *([a.type] if (a := torch.accelerator.current_accelerator()) else [])):
        raise BenchError(f"--device {device}: torch sees no such accelerator; leave it out for what there is")
    if options.quick:
        settings = dataclasses.replace(settings, budget=min(options.budget, 0.05), rounds=min(options.rounds, 3))
    return settings


def default_dtypes(device: Any) -> tuple[str, ...]:
    """bfloat16 on an accelerator; float32 on a CPU, and bfloat16 where its instructions know it."""
    import torch

    if device.type != "cpu":
        return ("bfloat16",)
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ("bfloat16", "float32") if fast else ("float32",)


def _device(text: str) -> Any:
    import torch

    try:
        return torch.device(text)
    except RuntimeError as error:
        raise BenchError(f"--device {text!r}: {str(error).splitlines()[0]}") from None


def _candidates(options: argparse.Namespace, device_type: str) -> tuple[Candidate, ...]:
    from . import registry

    if options.backends == "auto":
        ours = ["moe_core"]
    elif options.backends == "all":
        from ..api import backends

        for name, module in _pairs("--plugin", "MODULE", options.plugin):
            registry.register_plugin(name, module)
        usable = [status for status in backends() if status.status == "ok" and device_type in status.device_types]
        ours = [f"moe_core/{status.name}" for status in usable]
    else:
        ours = [f"moe_core/{name}" for name in _words(options.backends) if name != "none"]
    if options.peers == "auto":
        peers = registry.names(device_type, bool(options.quant))
    else:
        peers = [name for name in _words(options.peers) if name != "none"]
    candidates = tuple(map(Candidate.parse, [*ours, *peers]))
    for candidate in candidates:
        if not candidate.is_ours:
            registry.adapter(candidate.name)
    if not candidates:
        raise BenchError("no candidates: give --backends or --peers at least one name")
    return candidates


def _pairs(option: str, what: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        name, separator, value = text.partition("=")
        if not name or not separator or not value or ":" in name:
            raise BenchError(f"{option} {text}: expected NAME={what}, a name without a colon")
        yield name, value


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, _words(text)))
    except ValueError:
        raise BenchError(f"{option} {text}: expected whole numbers with commas between them") from None


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # In a pipe or a log there is no width to fit: one line a row keeps it greppable.
    return console if console.is_terminal else Console(width=250)
