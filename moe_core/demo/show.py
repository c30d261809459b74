"""How the demo looks in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .run import PROMPT, STEPS, DemoResult, run

BLOCKS = " ▁▂▃▄▅▆▇█"


def run_with_progress() -> DemoResult:
    """The demo with a progress bar on standard error."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=STEPS)
        begun = False

        def advance(step: str) -> None:
            nonlocal begun
            progress.update(task, description=step, advance=int(begun))
            begun = True

        return run(advance)


def load_picture(counts: list[int]) -> str:
    """One character an expert: its share of the busiest one's tokens."""
    top = max(max(counts), 1)
    return "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // top)] for count in counts)


def show(result: DemoResult, console: Console) -> None:
    """Print everything."""
    console.print("[bold]selection[/] " + escape(f"({len(result.replaced)} MoE blocks replaced)"))
    console.print(escape(str(result.report)), highlight=False)
    table = Table(
        "", "n-gram (order 3)", "transformers", "moe_core", box=None, title="\nheld-out text", title_justify="left"
    )
    bits, speed = result.bits_per_byte, result.tokens_per_second
    table.add_row("bits per byte", *(f"{bits[name]:.5f}" for name in ("ngram3", "transformers", "moe_core")))
    table.add_row("tokens per second", "", f"{speed['transformers']:,.0f}", f"{speed['moe_core']:,.0f}")
    console.print(table)
    console.print("\n[bold]load of each expert[/], one row a layer, full height is the busiest")
    for index, counts in enumerate(result.expert_load):
        share = max(counts) / max(sum(counts), 1)
        console.print(f"  layer {index}  |{load_picture(counts)}|  busiest {share:.0%}", highlight=False)
    console.print(f"\n[bold]continuation[/] of {PROMPT.decode()!r}")
    console.print(escape(PROMPT.decode() + result.continuation), highlight=False)
    console.print(f"\n{result.seconds:.1f} s", highlight=False)
