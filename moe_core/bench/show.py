"""A record as tables, in a terminal and in Markdown, and the progress of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .compare import Comparison
from .settings import CellKey


@dataclass
class Block:
    """One table: a stage, dtype, number of threads and mode; all texts plain."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def blocks(record: Mapping[str, Any]) -> Iterator[Block]:
    """The tables of a record."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell in record["cells"]:
        groups.setdefault((cell["stage"], cell["dtype"], cell["threads"]), []).append(cell)
    for (stage, dtype, threads), cells in groups.items():
        modes = dict.fromkeys(mode for cell in cells for result in cell["results"] for mode in result.get("times", {}))
        for mode in modes:
            yield _block(stage, dtype, threads, mode, cells)


def _block(stage: str, dtype: str, threads: int, mode: str, cells: list[dict[str, Any]]) -> Block:
    names = dict.fromkeys((result["name"], result["kind"]) for cell in cells for result in cell["results"])
    ours = [name for name, kind in names if kind == "moe_core"]
    peers = [name for name, kind in names if kind == "peer"]
    fastest = min(cell["floor"]["seconds"] for cell in cells)
    unit, scale = ("us", 1e6) if fastest < 1e-3 else ("ms", 1e3)
    on = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    header = ["shape", "T", "hit", f"floor {unit}"]
    for name in ours:
        header += [name, "floor/time", "best peer/time"]
    block = Block(f"{stage}, {dtype}{on}, {mode}, {unit}: median, ± half of p10 to p90", [*header, *peers], [])
    reasons: dict[str, None] = {}
    for cell in cells:
        results = {result["name"]: result for result in cell["results"]}
        row = [
            cell["shape"]["name"],
            str(cell["tokens"]),
            f"{cell['experts_hit']:.0f}",
            f"{_digits(cell['floor']['seconds'] * scale)} {cell['floor']['bound'][:3]}",
        ]
        for name in ours:
            times = results.get(name, {}).get("times", {}).get(mode)
            row.append(_entry(results.get(name), mode, scale))
            row.append("" if times is None else f"{times['floor_fraction']:.2f}")
            row.append("" if times is None or "over_best_peer" not in times else f"{times['over_best_peer']:.2f}")
        best = cell.get("best_peer", {}).get(mode, {}).get("name")
        row += [_entry(results.get(name), mode, scale) + (" *" if name == best else "") for name in peers]
        block.rows.append(row)
        for name, result in results.items():
            reason = _reason(result, mode)
            if reason:
                reasons[f"{name}: {reason}"] = None
    block.notes = ["* the best peer", *reasons]
    return block


def _entry(result: Mapping[str, Any] | None, mode: str, scale: float) -> str:
    if result is None:
        return ""
    times = result.get("times", {}).get(mode)
    if times is not None:
        spread = (times["p90"] - times["p10"]) / 2 / times["median"]
        return f"{_digits(times['median'] * scale)} ±{spread:.0%}"
    if result["status"] == "wrong":
        error = result["error"]
        return "WRONG" if error is None else f"WRONG {error:.0e}"
    return f"- {(result.get('failed', {}).get(mode) or result.get('reason', {})).get('kind', '')}"


def _reason(result: Mapping[str, Any], mode: str) -> str:
    if result["status"] == "wrong":
        return f"WRONG: fails its check against float32 (allowed {result['allowed']:.0e}), not timed"
    reason = result.get("failed", {}).get(mode) or result.get("reason")
    if not reason:
        return ""
    return f"{reason['kind']}: {reason['reason']}" + (f"; {reason['remedy']}" if reason.get("remedy") else "")


def _digits(value: float) -> str:
    """Three significant digits."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f}"


def facts(record: Mapping[str, Any]) -> list[str]:
    """Where and how it was measured, as lines."""
    device, versions = record["device"], record["versions"]
    detail = [str(device[name]) for name in ("capability", "driver") if device.get(name)]
    lines = [
        f"{device['name']}, {device.get('cores', '?')} cores, {device['memory_bytes'] / 2**30:.0f} GiB, "
        + ", ".join(detail),
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + (f", commit {record['commit']}" if record.get("commit") else ""),
    ]
    for name, worker in record.get("workers", {}).items():
        found = worker.get("versions", {})
        text = ", ".join(f"{key} {value}" for key, value in found.items()) or worker.get("broken", "")
        lines.append(f"worker {name}: {text}")
    lines += map(_ceilings, record["ceilings"])
    reads = [cell["read"]["best"] / 1e9 for cell in record["cells"] if "read" in cell]
    if reads:
        lines.append(f"read beside the cells, which their floors take: {min(reads):.1f} to {max(reads):.1f} GB/s")
    loads = [value for cell in record["cells"] for value in cell["load_average"]]
    others = [cell["other_busy_cores"] for cell in record["cells"] if cell.get("other_busy_cores") is not None]
    if loads:
        beside = f"; cores busy with other work while timing, at most {max(others):.2f}" if others else ""
        lines.append(f"{record['date']}, load average {min(loads):.2f} to {max(loads):.2f}{beside}")
    for cell, reason in record.get("skipped", {}).items():
        lines.append(f"skipped {cell}: {reason['reason']}")
    if not record["complete"]:
        lines.append("not complete: the same command goes on where it stopped")
    return lines


def _ceilings(entry: Mapping[str, Any]) -> str:
    copy, read, matmul = entry["copy"], entry["read"], entry["matmul"]
    return (
        f"ceilings {entry['dtype']}, {_threads(entry['threads'])}: copy {copy['best'] / 1e9:.1f} GB/s, "
        f"read {read['best'] / 1e9:.1f} GB/s ({read['how']}), "
        f"matmul {matmul['best'] / 1e9:.0f} GFLOP/s ({matmul['how']})"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}" if count else "device"


def print_record(record: Mapping[str, Any], console: Console) -> None:
    """Everything, in a terminal."""
    for line in facts(record):
        console.print(escape(line), highlight=False)
    for block in blocks(record):
        table = Table(*map(escape, block.header), box=None)
        for row in block.rows:
            table.add_row(
                *(f"[bold red]{escape(each)}[/]" if each.startswith("WRONG") else escape(each) for each in row)
            )
        console.print(f"\n[bold]{escape(block.title)}[/]", highlight=False)
        console.print(table)
        for note in block.notes:
            console.print(f"  {escape(note)}", highlight=False, style="dim")


def markdown(record: Mapping[str, Any]) -> str:
    """The same as a Markdown page."""
    lines = [f"Made by `{record['command']}`.\n", *(f"- {line}" for line in facts(record)), ""]
    for block in blocks(record):
        lines += [f"### {block.title}", "", _row(block.header), _row(["---"] * len(block.header))]
        lines += map(_row, block.rows)
        lines += ["", *(f"- {note}" for note in block.notes), ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def print_comparison(found: Comparison, console: Console) -> None:
    """What moved, then how much did not."""
    for warning in found.warnings:
        console.print(f"[yellow]differs[/] {escape(warning)}", highlight=False)
    table = Table("", "cell", "candidate", "mode", "before ms", "after ms", "after/before", box=None)
    for change in found.moved:
        style = "green" if change.moved == "faster" else "red"
        before, after = _digits(change.before * 1e3), _digits(change.after * 1e3)
        names = (escape(str(change.cell)), escape(change.name), change.mode)
        table.add_row(f"[{style}]{change.moved}[/]", *names, before, after, f"{change.ratio:.2f}")
    if found.moved:
        console.print(table)
    console.print(
        f"{len(found.moved)} of {len(found.changes)} times moved beyond both spreads (p10 to p90); "
        f"{len(found.only_before)} only in the first, {len(found.only_after)} only in the second",
        highlight=False,
    )


class Bar:
    """A progress bar on standard error with an estimate of the time left."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # Drawn rarely: the process that is being timed needs the cores.
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1)
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, total: float, text: str) -> None:
        """So much work in all."""
        self._progress.update(self._task, total=total, description=text)

    def step(self, amount: float) -> None:
        """So much of it is done."""
        self._progress.advance(self._task, amount)

    def doing(self, text: str) -> None:
        """What happens now."""
        self._progress.update(self._task, description=escape(text))

    def finished(self, cell: dict[str, Any]) -> None:
        """One line a cell."""
        found = []
        for result in cell["results"]:
            times = next(iter(result.get("times", {}).values()), None)
            if times is not None:
                found.append(f"{result['name']} {_digits(times['median'] * 1e3)}")
            elif result["status"] == "wrong":
                found.append(f"{result['name']} WRONG")
        floor = _digits(cell["floor"]["seconds"] * 1e3)
        text = f"{CellKey.of(cell)}: floor {floor} ms · {' · '.join(found)}"
        self._progress.console.print(escape(text), highlight=False, soft_wrap=True)
