"""Charts of a record: time against tokens with the floor, and a map of how moe_core stands to the best peer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import BenchError

Cells = list[dict[str, Any]]


def plot(record: Mapping[str, Any], folder: Path, suffix: str = "svg") -> list[Path]:
    """Draw every stage, dtype, number of threads and mode.

    Returns:
        the files, two for each of these.
    Raises:
        BenchError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise BenchError('charts need matplotlib: pip install "moe-core[bench]"') from None
    matplotlib.use("Agg")
    # Text stays text and ids stay the same from run to run: small files, readable diffs.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moe_core", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, title, mode, cells in _groups(record):
        for kind, draw in (("time", _times), ("ratio", _ratios)):
            figure = draw(cells, mode, f"{title}\n{record['device']['name']}")
            path = folder / f"{name}-{kind}.{suffix}"
            figure.savefig(path, bbox_inches="tight", dpi=120, metadata={"Date": None} if suffix == "svg" else None)
            made.append(path)
    return made


def _groups(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Cells]]:
    groups: dict[tuple[str, str, int], Cells] = {}
    for cell in record["cells"]:
        groups.setdefault((cell["stage"], cell["dtype"], cell["threads"]), []).append(cell)
    for (stage, dtype, threads), cells in groups.items():
        for mode in dict.fromkeys(mode for cell in cells for r in cell["results"] for mode in r.get("times", {})):
            on = [f"{threads}t"] if threads else []
            words = [stage, dtype, *on, mode.replace("/", "-")]
            text = f"{threads} thread{'s' if threads > 1 else ''}" if threads else ""
            yield "-".join(words), ", ".join(filter(None, (stage, dtype, text, mode))), mode, cells


def _times(cells: Cells, mode: str, title: str) -> Any:
    """One panel a shape, both axes logarithmic."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(cell["shape"]["name"] for cell in cells))
    names = dict.fromkeys(
        (r["kind"], r["name"]) for cell in cells for r in cell["results"] if mode in r.get("times", {})
    )
    columns = min(len(shapes), 4)
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.1 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, shape in zip(panels, shapes, strict=False):
        own = sorted((cell for cell in cells if cell["shape"]["name"] == shape), key=lambda cell: int(cell["tokens"]))
        tokens = [cell["tokens"] for cell in own]
        panel.plot(
            tokens, [cell["floor"]["seconds"] * 1e3 for cell in own], color="black", linestyle="--", label="floor"
        )
        for index, (kind, name) in enumerate(names):
            points = [
                (cell["tokens"], r["times"][mode])
                for cell in own
                for r in cell["results"]
                if r["name"] == name and mode in r.get("times", {})
            ]
            if not points:
                continue
            style = {
                "color": f"C{index}",
                "linewidth": 2.4 if kind == "moe_core" else 1.0,
                "marker": ".",
                "label": name,
            }
            panel.plot([x for x, _ in points], [t["median"] * 1e3 for _, t in points], **style)
            panel.fill_between(
                [x for x, _ in points],
                [t["p10"] * 1e3 for _, t in points],
                [t["p90"] * 1e3 for _, t in points],
                color=f"C{index}",
                alpha=0.15,
                linewidth=0,
            )
        panel.set(xscale="log", yscale="log", title=shape, xlabel="tokens")
        panel.set_xticks(tokens, [str(count) for count in tokens])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels[len(shapes) :]:
        panel.axis("off")
    panels[0].set_ylabel("ms (median, p10 to p90)")
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False
    )
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def _ratios(cells: Cells, mode: str, title: str) -> Any:
    """Shapes down, tokens across: time of the best peer / time of moe_core, green where moe_core is faster."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(cell["shape"]["name"] for cell in cells))
    tokens = sorted({cell["tokens"] for cell in cells})
    values = [[float("nan")] * len(tokens) for _ in shapes]
    for cell in cells:
        found = [
            r["times"][mode]["over_best_peer"]
            for r in cell["results"]
            if "over_best_peer" in r.get("times", {}).get(mode, {})
        ]
        if found:
            values[shapes.index(cell["shape"]["name"])][tokens.index(cell["tokens"])] = max(found)
    figure = Figure(figsize=(1.6 + 0.8 * len(tokens), 1.0 + 0.45 * len(shapes)))
    panel = figure.subplots()
    panel.imshow([[_log2(value) for value in row] for row in values], cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            panel.text(
                column, row, "-" if value != value else f"{value:.2f}", ha="center", va="center", color=_ink(value)
            )
    panel.set_xticks(range(len(tokens)), [str(count) for count in tokens])
    panel.set_yticks(range(len(shapes)), shapes)
    panel.set(xlabel="tokens")
    panel.set_title(f"time of the best peer / time of moe_core\n{title}", fontsize=9)
    return figure


def _ink(value: float) -> str:
    """Readable on the colour of the field."""
    return "white" if value > 0 and abs(_log2(value)) > 0.7 else "black"


def _log2(value: float) -> float:
    return math.log2(value) if value > 0 else value


__all__ = ["plot"]
