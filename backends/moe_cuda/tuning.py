"""Which form of the routed experts runs for how many tokens, and with which block sizes.

A choice comes from a table of the device (``moe-core tune cuda`` writes one for this machine, and the package ships
some in ``tables/``) where it has the layer's shape, from the nearest shape in it otherwise, and from plain rules where
there is no table. :class:`Choices` says which it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"
QUANTISED = "quantised_"
"""What the files of quantised experts begin with; their entries are :mod:`moe_cuda.quant_tuning`'s."""
BUCKETS = 24
"""Choices are made for token counts of 1, 2, 4 ... 2**(BUCKETS - 1); a call takes that of the next power of two."""
TURNED = {128: 32, 256: 32}
"""Rows of a tile of ``kernels/hopper_turned.py``, and what an expert's last one may have on top of them."""


@dataclass(frozen=True)
class Few:
    """``kernels/few.py``: block sizes (columns, and elements of the sum) and warps of both products."""

    n1: int
    k1: int
    warps1: int
    n2: int
    k2: int
    warps2: int
    prefetch: int = 0


@dataclass(frozen=True)
class Dot:
    """One product on tensor cores: columns, elements of the sum in a step, warps, pipeline stages."""

    n: int
    k: int
    warps: int
    stages: int
    columns_first: bool = False


@dataclass(frozen=True)
class Pairs:
    """``kernels/pairs.py``."""

    first: Dot
    second: Dot


@dataclass(frozen=True)
class Tile:
    """One persistent grouped product: besides :class:`Dot`'s, programs an SM (0: one a tile), and tiles that share
    their columns; ``half`` gives tiles of at most half the rows a tile of half the size; ``gather`` copies the hidden
    states into the order of the tiles first; ``loader`` gives loading a warpgroup of its own where the GPU can
    (``kernels/hopper_products.py``, for 128 rows or 192; all but n, stages, group, gather and early is then as it is
    there). ``early`` of the second of two such products: it begins a tile when that tile's rows are there, and not when
    the first has ended. That pays unless programs then read too far apart for the L2 cache, as with few and wide
    experts."""

    n: int
    k: int
    warps: int
    stages: int
    programs: int = 0
    group: int = 1
    half: bool = False
    flatten: bool = False
    tma: bool = True
    gather: bool = False
    loader: bool = False
    early: bool = False


@dataclass(frozen=True)
class Grouped:
    """``kernels/grouped.py``: ``rows`` of one tile, a power of two but for the 192 of two products with ``loader``.
    ``turned`` gives both products to ``kernels/hopper_turned.py`` where the GPU can, whose blocks have 64 columns and
    128, and whose rows are those of :data:`TURNED`; of the tiles only stages, group, gather and early count then."""

    rows: int
    first: Tile
    second: Tile
    turned: bool = False

    @property
    def over(self) -> int:
        """Rows that an expert's last tile may have on top of ``rows``."""
        return TURNED[self.rows] if self.turned else 0


Choice = Few | Pairs | Grouped
_FORMS: dict[str, Any] = {"few": Few, "pairs": Pairs, "grouped": Grouped}


def to_json(choice: Choice) -> dict[str, Any]:
    """As it stands in a table."""
    return {"form": type(choice).__name__.lower(), **dataclasses.asdict(choice)}


def from_json(entry: dict[str, Any]) -> Choice:
    """The inverse of :func:`to_json`; an entry's figures are left out."""
    fields = dict(entry)
    form = _FORMS[fields.pop("form")]
    inner = {Pairs: Dot, Grouped: Tile}.get(form)
    if inner is not None:
        fields.update(first=inner(**fields["first"]), second=inner(**fields["second"]))
    kept = {field.name: fields[field.name] for field in dataclasses.fields(form) if field.name in fields}
    return form(**kept)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Shape:
    """What a choice depends on besides the number of tokens."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def distance(self, other: Shape) -> float:
        """How far apart two shapes are: the sum of the logarithms of their ratios."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return sum(abs(math.log2(a / b)) for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Choices:
    """The choice of every bucket, and where they come from (a sentence for people)."""

    of_bucket: tuple[Choice, ...]
    source: str

    def __call__(self, tokens: int) -> Choice:
        """For a call of ``tokens`` > 0."""
        return self.of_bucket[min((tokens - 1).bit_length(), BUCKETS - 1)]

    def without_tall_tiles(self) -> Choices:
        """With tiles of 128 rows for those that only kernels for Hopper have, and other blocks."""
        return Choices(tuple(map(_lower, self.of_bucket)), self.source)


def _lower(choice: Choice) -> Choice:
    if not isinstance(choice, Grouped) or not (choice.rows == 192 or choice.turned):
        return choice
    first = dataclasses.replace(choice.first, n=128, stages=3, group=16)
    return Grouped(128, first, dataclasses.replace(choice.second, n=256, stages=4, group=16))


def choices(shape: Shape, dtype: str, device: str, interpreted: bool, capability: str = "") -> Choices:
    """All buckets of one layer.

    Args:
        dtype: "bfloat16", "float16" or "float32"; the two 16-bit types share their entries.
        device: the device's name, as torch has it.
        capability: its compute capability, "9.0": a device without a table takes one of a device that has the same.
    """
    tokens = [1 << bucket for bucket in range(BUCKETS)]
    if interpreted:
        return Choices(tuple(_interpreted(shape, t) for t in tokens), "block sizes for Triton's interpreter")
    dtype = "bfloat16" if dtype == "float16" else dtype
    entries = [entry for entry in _table(device) if entry["dtype"] == dtype]
    on = device
    if not entries:
        on, like = _table_of_capability(capability)
        entries = [entry for entry in like if entry["dtype"] == dtype]
    if not entries:
        rules = tuple(rule(shape, t, dtype) for t in tokens)
        return Choices(rules, f"rules of thumb: no table for {device} and {dtype}; moe-core tune cuda makes one")
    # Shapes from near to far; of two entries for one shape and number of tokens, the first is taken.
    measured: dict[Shape, dict[int, Choice]] = {}
    for entry in sorted(entries, key=lambda entry: shape.distance(Shape(*entry["shape"]))):
        cells = measured.setdefault(Shape(*entry["shape"]), {})
        for t, choice in entry["tokens"].items():
            cells.setdefault(int(t), from_json(choice))
    found = next(iter(measured))
    triton = next(entry["triton"] for entry in entries if Shape(*entry["shape"]) == found)
    if found == shape:
        source = f"tuned on {on} with triton {triton}"
    else:
        mine, theirs = dataclasses.astuple(shape), dataclasses.astuple(found)
        source = f"tuned on {on} for the nearest shape {theirs}, not for {mine}"
    if on != device:
        source += f"; {device} has no table, but the same compute capability {capability}"
    return Choices(tuple(_pick(measured, shape, t, dtype) for t in tokens), source)


def _pick(measured: dict[Shape, dict[int, Choice]], shape: Shape, tokens: int, dtype: str) -> Choice:
    # What was measured nearest to as many rows an expert, of the forms that are meant for as many tokens as there are;
    # where the nearest shape has nothing near, that of the next shape which has.
    nearest: Choice | None = None
    for of, cells in measured.items():
        like = tokens * (shape.top_k / shape.num_experts) / (of.top_k / of.num_experts)
        usable = [
            (abs(math.log2(t / like)), t)
            for t, choice in cells.items()
            if not (isinstance(choice, Few) and tokens > 2 * FEW_TOKENS)
            and not (isinstance(choice, Pairs) and tokens * shape.top_k > PAIRS_AT_MOST)
            and not (isinstance(choice, Grouped) and tokens <= FEW_TOKENS)
        ]
        if usable:
            far, t = min(usable)
            if far <= NEAR:
                return cells[t]
            nearest = nearest or cells[t]
    return nearest or rule(shape, tokens, dtype)


def shipped() -> list[Path]:
    """The tables that come with the package, without those of quantised experts."""
    return sorted(path for path in TABLES.glob("*.json") if not path.name.startswith(QUANTISED))


def own_table(device: str) -> Path:
    """Where ``moe-core tune`` keeps what it found on this machine, under ``XDG_DATA_HOME``."""
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "moe_core" / file_name(device)


def file_name(device: str) -> str:
    """Of a device's table."""
    return device.replace(" ", "_").replace("/", "_") + ".json"


def _table(device: str) -> list[dict[str, Any]]:
    # The machine's own entries come first: of two for one shape and number of tokens, the first is taken.
    paths = (own_table(device), TABLES / file_name(device))
    return [entry for path in paths if path.exists() for entry in json.loads(path.read_text())["entries"]]


def _table_of_capability(capability: str) -> tuple[str, list[dict[str, Any]]]:
    # The name of the device and the entries of the first table that was measured on such a device.
    for path in shipped() if capability else ():
        record = json.loads(path.read_text())
        if record.get("capability") == capability:
            return record["device"], record["entries"]
    return "", []


NEAR = 2.0
"""Powers of two between the tokens of a call and those that were measured: tables have every fourth number of them."""
FEW_TOKENS = 4
"""Up to here FMA beats a padded product on tensor cores."""
SHARED_FEW_TOKENS = 1
"""The same for shared experts, which all tokens share: four tokens of DeepSeek-V3's take 52.3 us, by torch 51.0."""
PAIRS_AT_MOST = 512
"""(token, expert) pairs that each program of ``kernels/pairs.py`` can look through."""


def rule(shape: Shape, tokens: int, dtype: str) -> Choice:
    """A choice without measurement; from what was seen on an H100 (docs/cuda.md)."""
    pairs = tokens * shape.top_k
    wide = dtype == "float32"
    if tokens <= FEW_TOKENS:
        n1 = 16 if shape.intermediate_size * shape.top_k >= 4096 else 4
        return Few(n1, 256, 4, 4, 256, 4)
    rows = pairs / shape.num_experts
    if pairs <= PAIRS_AT_MOST and rows <= 16:
        return Pairs(Dot(32, 64 if wide else 128, 4, 3), Dot(64, 64 if wide else 128, 4, 3))
    if wide:
        return Grouped(32, Tile(32, 32, 4, 3), Tile(64, 32, 4, 3))
    if rows <= 24:
        return Grouped(16, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3))
    if rows <= 48:
        return Grouped(32, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3))
    if rows <= 128:
        return Grouped(64, Tile(128, 64, 4, 3, group=8), Tile(128, 64, 4, 4, group=8))
    return Grouped(128, Tile(128, 64, 8, 3, 1, 16, half=True), Tile(128, 64, 8, 4, 1, 16, half=True, flatten=True))


def shared_choice(hidden: int, width: int) -> Few:
    """For shared experts of so many columns: one expert for all of up to SHARED_FEW_TOKENS tokens."""
    from .layout import interpreted

    if interpreted():
        return Few(_power(width), 64, 4, _power(hidden), 64, 4)
    # DeepSeek-V3's and Qwen2-57B's on an H100: 36.8 and 160.7 us, two products by torch 51.0 and 180.9.
    n1, k1, warps1 = next(((n, k, 4) for n, k in ((2, 1024), (4, 512)) if hidden % k == 0), (4, 256, 2))
    return Few(n1, k1, warps1, 1, *((1024, 4) if width % 1024 == 0 else (512, 2)), 4)


def _interpreted(shape: Shape, tokens: int) -> Choice:
    # As few and as large programs as possible: each operation of each costs the interpreter a tenth of a millisecond.
    if tokens <= FEW_TOKENS // 2:
        return Few(_power(shape.intermediate_size), 64, 4, _power(shape.hidden_size), 64, 4)
    first, second = Tile(_power(shape.intermediate_size), 64, 4, 1, 1), Tile(_power(shape.hidden_size), 64, 4, 1, 1)
    return Grouped(64, first, second)


def _power(size: int) -> int:
    return min(max(16, 1 << (size - 1).bit_length()), 128)
