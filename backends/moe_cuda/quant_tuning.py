"""Block sizes of quantised experts: for how many tokens which form runs, from a table of the device or from rules."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from . import tuning
from .tuning import BUCKETS, Shape


@dataclass(frozen=True)
class Step:
    """One product: columns of a tile, elements of the sum in a step, warps, pipeline stages, programs an SM (0: one a
    tile), tiles that share their columns, and whether a warpgroup of its own loads where the GPU and the layer allow it
    (:mod:`moe_cuda.kernels.hopper_fp8`, which has columns, steps and warps of its own)."""

    n: int
    k: int
    warps: int
    stages: int
    programs: int = 0
    share: int = 1
    columns_first: bool = False
    flatten: bool = False
    loader: bool = False


@dataclass(frozen=True)
class Form:
    """``rows`` of a tile, and both products. ``led``: without sorting, the first pair of an expert leads.

    Eight rows are those of :mod:`moe_cuda.kernels.mma_words`, which is led; another form runs where it cannot.

    One row is no tile: every (token, expert) pair for itself, without tensor cores; ``second.stages`` are steps of
    weights that are asked for in front of the first product's end. ``tensor_cores``: by those after all, where
    :mod:`moe_cuda.kernels.row_words` runs: warps share a row that is longer than 1024 columns if ``k`` is a multiple of
    them, a warp has what columns ``n`` leaves it, and ``stages`` are steps of weights on their way in either product.
    """

    rows: int
    first: Step
    second: Step
    led: bool = False
    tensor_cores: bool = False


@dataclass(frozen=True)
class Forms:
    """The form of every bucket of token counts, and where they come from (a sentence for people)."""

    of_bucket: tuple[Form, ...]
    source: str

    def __call__(self, tokens: int) -> Form:
        """For a call of ``tokens`` > 0."""
        return self.of_bucket[min((tokens - 1).bit_length(), BUCKETS - 1)]


FEW_AT_MOST = 64
"""(token, expert) pairs that may read their expert's weights each for itself."""
LED_AT_MOST = 512
"""(token, expert) pairs that each program can look through."""


MMA_ROWS = 8
"""Rows of a tile that stand for :mod:`moe_cuda.kernels.mma_words`: a warp for 8 columns of the first product or 16 of
the second, and what warps are left share the steps of the sum, 128 elements or a multiple each."""
LONGEST = 1 << 16
"""Columns of a row of x that shared memory holds for a single row on tensor cores."""
MMA_PAIRS = 5
"""Pairs of an expert, on average, above which many have more than the eight of a product and are read again."""


LED = Form(16, Step(32, 256, 4, 3), Step(64, 256, 4, 3), led=True)
"""For few tokens without measurement, and in place of a single row whose layer that form cannot read."""


def scheme_of(scheme: str, group_size: int) -> str:
    """``scheme`` or ``scheme:group_size``, as it stands in a table and on the command line of ``tune``."""
    return scheme if group_size == -1 else f"{scheme}:{group_size}"


def forms(shape: Shape, kind: str, device: str, interpreted: bool, width: int | None = None, quant: str = "") -> Forms:
    """All buckets of one layer.

    Args:
        kind: ``fp8_block``, ``w8a8`` (a scale a token) or ``words4`` and ``words8``: bits of weight-only schemes.
        width: columns that share a scale where the scheme gives the loops their step.
        quant: of two entries for one shape, the one of this :func:`scheme_of` is taken.
    """
    tokens = [1 << bucket for bucket in range(BUCKETS)]
    if interpreted:
        found = tuple(_fitted(_interpreted(kind, t), width) for t in tokens)
        return Forms(found, "block sizes for Triton's interpreter")
    entries = [entry for entry in _table(device) if entry["kind"] == kind]
    if not entries:
        found = tuple(_fitted(rule(shape, kind, t), width) for t in tokens)
        return Forms(found, f"rules of thumb: no table for {device} and {kind}")
    best = min(entries, key=lambda entry: (shape.distance(Shape(*entry["shape"])), entry["quant"] != quant))
    other = Shape(*best["shape"])
    measured = {int(t): from_json(entry) for t, entry in best["tokens"].items()}
    if other == shape:
        source, ratio = f"tuned on {device} with triton {best['triton']}", 1.0
    else:
        mine, theirs = dataclasses.astuple(shape), dataclasses.astuple(other)
        source = f"tuned on {device} for the nearest shape {theirs}, not for {mine}"
        ratio = (shape.top_k / shape.num_experts) / (other.top_k / other.num_experts)
    found = tuple(_fitted(_nearest(measured, shape, kind, t, t * ratio), width) for t in tokens)
    return Forms(found, source)


def _nearest(measured: dict[int, Form], shape: Shape, kind: str, tokens: int, like: float) -> Form:
    usable = [
        (abs(math.log2(t / like)), t)
        for t, form in measured.items()
        if tokens * shape.top_k <= (FEW_AT_MOST if form.rows == 1 else LED_AT_MOST if form.led else math.inf)
    ]
    form = measured[min(usable)[1]] if usable else None
    if form is None or (form.rows == MMA_ROWS and tokens * shape.top_k > MMA_PAIRS * shape.num_experts):
        return rule(shape, kind, tokens)
    return form


def to_json(form: Form) -> dict[str, Any]:
    """As it stands in a table."""
    return dataclasses.asdict(form)


def from_json(entry: dict[str, Any]) -> Form:
    """The inverse of :func:`to_json`; an entry's figures are left out."""
    return Form(
        entry["rows"], Step(**entry["first"]), Step(**entry["second"]), entry["led"], entry.get("tensor_cores", False)
    )


def _table(device: str) -> list[dict[str, Any]]:
    name = tuning.QUANTISED + tuning.file_name(device)
    paths = (tuning.own_table(device).with_name(name), tuning.TABLES / name)
    return [entry for path in paths if path.exists() for entry in json.loads(path.read_text())["entries"]]


def _fitted(form: Form, width: int | None) -> Form:
    # A scale's columns are the loop's step, and the first product's tile is one group of the second's input.
    if width is None:
        return form
    first, second = dataclasses.replace(form.first, n=width, k=width), dataclasses.replace(form.second, k=width)
    return dataclasses.replace(form, first=first, second=second)


def rule(shape: Shape, kind: str, tokens: int) -> Form:
    """A form without measurement."""
    pairs = tokens * shape.top_k
    rows = pairs / shape.num_experts
    if kind.startswith("words"):
        if tokens <= 2 and pairs <= FEW_AT_MOST:
            return Form(1, Step(8, 1024, 4, 1), Step(16, 1024, 4, 2))
        if pairs <= LED_AT_MOST and rows <= 16:
            return LED
        if rows <= 16:
            return Form(16, Step(32, 256, 4, 3), Step(64, 256, 4, 3))
        if rows <= 64:
            return Form(32, Step(64, 128, 4, 3), Step(128, 128, 4, 3))
        return Form(128, Step(64, 64, 4, 3, 0, 8), Step(128, 64, 4, 3, 0, 8))
    if rows <= 16:
        return Form(16, Step(128, 128, 4, 4), Step(128, 128, 4, 4))
    if rows <= 48:
        return Form(32, Step(128, 128, 4, 4), Step(128, 128, 4, 4))
    if rows <= 96:
        return Form(64, Step(128, 128, 4, 4, 0, 8), Step(128, 128, 4, 4, 0, 8))
    return Form(128, Step(128, 128, 8, 3, 0, 8), Step(128, 128, 8, 4, 0, 8))


def _interpreted(kind: str, tokens: int) -> Form:
    # As few and as large programs as possible, and a step that is not the whole width.
    if kind.startswith("words"):
        if tokens == 1:
            return Form(1, Step(64, 64, 4, 1), Step(64, 64, 4, 1))
        return Form(16, Step(128, 64, 4, 1), Step(128, 64, 4, 1), led=tokens <= 4)
    return Form(64, Step(128, 64, 4, 1, 1), Step(128, 64, 4, 1, 1))
