"""The console script ``moe-core``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    name="moe-core",
    help="One Mixture-of-Experts layer, every accelerator, nothing hidden.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
STYLES = {"ok": "green", "pass": "green", "FAIL": "bold red", "broken": "red"}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _console() -> Console:
    console = Console()
    # In a pipe or a log there is no width to fit: one line a row keeps it greppable.
    return console if console.is_terminal else Console(width=200)


def _styled(status: str) -> str:
    return f"[{STYLES.get(status, 'yellow')}]{status}[/]"


@app.command("list")
def list_backends(json_: JsonFlag = False) -> None:
    """List every backend: usable here or not, why, and what would mend it."""
    from . import backends

    found = backends()
    if json_:
        _print_json([status.as_dict() for status in found])
        return
    table = Table("backend", "status", "priority", "devices", "stages", "reason", "remedy", box=None)
    for s in found:
        table.add_row(
            s.name,
            _styled(s.status),
            str(s.priority),
            " ".join(s.device_types),
            " ".join(s.stages),
            escape(s.reason),
            escape(s.remedy),
        )
    _console().print(table)


@app.command()
def explain(
    hidden_size: Annotated[int, typer.Option(help="H")] = 2048,
    intermediate_size: Annotated[int, typer.Option(help="I of one expert")] = 768,
    num_experts: Annotated[int, typer.Option(help="E")] = 128,
    top_k: Annotated[int, typer.Option(help="K")] = 8,
    shared_intermediate_size: Annotated[int | None, typer.Option(help="I of the shared experts")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="of the weights; the accelerator or the CPU if left out")] = None,
    backend: Annotated[str | None, typer.Option(help="ask for this one")] = None,
    grad: Annotated[bool, typer.Option("--grad", help="gradients may be needed")] = False,
    json_: JsonFlag = False,
) -> None:
    """Say which backend would serve a layer, and why not the others."""
    import torch

    from . import MoEConfig
    from . import explain as explain_config
    from .errors import MoECoreError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise typer.BadParameter(f"{dtype!r}: expected one of {', '.join(known)}", param_hint="--dtype")
    try:
        config = MoEConfig(
            hidden_size, intermediate_size, num_experts, top_k, shared_intermediate_size=shared_intermediate_size
        )
        report = explain_config(config, device, dtype=known[dtype], backend=backend, needs_grad=grad)
    except MoECoreError as error:
        if json_:
            failed = getattr(error, "report", None)
            _print_json({"error": str(error).splitlines()[0], "report": failed.as_dict() if failed else None})
        else:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None
    if json_:
        _print_json(report.as_dict())
    else:
        typer.echo(str(report))


@app.command()
def doctor(
    expect: Annotated[str | None, typer.Option(help="Fail unless automatic selection takes this backend.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Run one tiny layer on every usable backend against the reference; exit 1 on a mismatch."""
    from . import doctor as doctor_
    from .errors import MoECoreError

    checks = doctor_.examine()
    try:
        chosen = doctor_.automatic_choice()
    except MoECoreError as error:
        chosen = ""
        if not json_:
            typer.echo(str(error), err=True)
    if json_:
        _print_json(doctor_.as_json(checks, chosen, expect))
    else:
        table = Table("backend", "result", "detail", "remedy", box=None)
        for check in checks:
            table.add_row(check.backend, _styled(check.status), escape(check.detail), escape(check.remedy))
        console = _console()
        console.print(table)
        for check in checks:
            for text in check.advice:
                console.print(f"{check.backend} could be faster: {escape(text)}")
        console.print(f"automatic choice: {chosen or 'none'}")
        if expect not in (None, chosen):
            console.print(f"[bold red]expected {expect}[/], see 'moe-core explain' for the reason")
    if not doctor_.is_healthy(checks, chosen, expect):
        raise typer.Exit(1)


@app.command()
def demo(json_: JsonFlag = False) -> None:
    """Run a shipped, trained model with transformers alone and with moe_core, and compare."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        typer.echo(
            'the demo loads its model with transformers, which is missing: pip install "moe-core[transformers]"',
            err=True,
        )
        raise typer.Exit(1)
    from .demo import show

    result = show.run_with_progress()
    if json_:
        _print_json(result.as_dict())
    else:
        show.show(result, _console())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Time moe_core beside other implementations and the machine's ceilings; bench --help has its options."""
    from .bench.cli import main as bench_

    raise typer.Exit(bench_(context.args))


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def tune(
    backend: Annotated[str, typer.Argument(help="Whose kernels; moe-core list has the names.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The backend's own; --help prints them.")] = None,
) -> None:
    """Search for the block sizes that serve your layers fastest on this machine: tune NAME --help has the options."""
    from .plugins import registry

    plugin = registry().plugins.get(backend)
    if plugin is None or plugin.status != "ok" or "moe_tune" not in plugin.impls:
        able = ", ".join(plugin.name for plugin in registry() if "moe_tune" in plugin.impls) or "none of those here"
        why = "has nothing to tune" if plugin and plugin.status == "ok" else plugin.reason if plugin else "is unknown"
        typer.echo(f"backend {backend} {why}; backends that can be tuned: {able}", err=True)
        raise typer.Exit(2)
    raise typer.Exit(int(plugin.call("moe_tune", arguments=arguments or [])))


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def trace(
    command: Annotated[list[str], typer.Argument(help="A command that runs Python, after --: -- python script.py")],
    chrome: Annotated[Path | None, typer.Option(help="Also write a timeline for Perfetto or chrome://tracing.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Run a command and print, for each layer and stage, the backend, its function, microseconds and tokens."""
    import os
    import subprocess
    import tempfile

    from .trace import summarise, timeline

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        env = {**os.environ, "MOE_CORE_TRACE": "1", "MOE_CORE_TRACE_FILE": str(path)}
        try:
            code = subprocess.run(command, env=env, check=False).returncode
        except OSError as error:
            typer.echo(f"cannot run {command[0]!r}: {error.strerror}; pass a command after --", err=True)
            raise typer.Exit(127) from None
        found: dict[str, Any] = {"calls": [], "left_out": 0}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
    rows = summarise(found["calls"])
    if chrome is not None:
        chrome.write_text(json.dumps(timeline(found["calls"], found.get("process", 0))), encoding="utf-8")
    if json_:
        _print_json({"stages": [asdict(row) for row in rows], "left_out": found["left_out"], "exit": code})
    else:
        table = Table("layer", "stage", "backend", "calls", "tokens", "us/call", "us", "clock", "function", box=None)
        for row in rows:
            numbers = (row.calls, row.tokens, f"{row.median_us:.1f}", f"{row.total_us:.0f}", row.clock)
            table.add_row(str(row.layer), row.stage, row.backend, *map(str, numbers), escape(row.function))
        console = _console()
        console.print(table)
        if not rows:
            console.print("no stage ran: the command called no moe_core layer, or was killed before it ended")
        if found["left_out"]:
            console.print(f"{found['left_out']} later calls are left out")
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


def main() -> None:
    """Entry of the console script."""
    app()
