"""docs/transformers.md lists what converts how, as the adapters have it."""

import inspect
import re
from pathlib import Path

import pytest

from moe_core.integrations.transformers.adapters import ADAPTERS
from moe_core.integrations.transformers.experts import READERS
from moe_core.integrations.transformers.own_router import OWN_ROUTER

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
RETURNS = {
    "hidden": "",
    "batches": "",
    "scores": "also its weights",
    "shares": "also its weights over k",
    "logits": "rows, and router logits",
    "flat": "all flattened, with router logits",
}


def row(adapter):
    """The cells that say how a block is converted."""
    notes = [
        f"scaled by `{adapter.output_scale}`" if adapter.output_scale else "",
        f"between {' '.join(f'`{n}`' for n in (*adapter.input_transform, *adapter.output_transform))}"
        if adapter.input_transform
        else "",
        f"behind it `{adapter.after}`" if adapter.after else "",
        f"noise by `{adapter.jitter}`" if adapter.jitter else "",
        "routes itself while training" if adapter.random_router else "",
        f"combined by `{adapter.combination}`" if adapter.combination else "",
        RETURNS[adapter.result],
    ]
    shared = f"`{adapter.shared}`" if adapter.shared else ""
    shared += f" times `{adapter.shared_gate}`" if adapter.shared_gate else ""
    return inspect.getdoc(adapter.route).split("\n")[0].rstrip("."), shared, "; ".join(filter(None, notes))


def blocks():
    kinds = {}
    for name, adapter in ADAPTERS.items():
        kinds.setdefault(row(adapter), []).append(name)
    lines = ["| blocks | router | shared experts | besides |", "|---|---|---|---|"]
    lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in kinds.items()]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("mark", "expected"),
    [("blocks", blocks()), ("own", f"{', '.join(OWN_ROUTER)}."), ("undecorated", ", ".join(sorted(READERS)))],
    ids=["blocks", "own", "undecorated"],
)
def test_the_page_lists_what_the_tables_hold(mark, expected):
    shown = re.search(rf"<!-- {mark} -->(.*?)<!-- /{mark} -->", PAGE, re.DOTALL)[1].strip()
    assert shown == expected, f"put this between the marks of {mark!r}:\n{expected}"
