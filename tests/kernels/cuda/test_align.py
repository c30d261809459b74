"""Alignment: pairs in the order of a stable sort by expert, cut into tiles by real counts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe_cuda.kernels import align as align_module
from moe_cuda.kernels.align import align, align_torch, max_tiles


def ids_of(tokens: int, k: int, experts: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens + experts)
    if kind == "skewed":  # most pairs on few experts, the others empty
        ids = (torch.rand(tokens, k, generator=generator) ** 4 * experts).int()
    elif kind == "hot":
        ids = torch.full((tokens, k), experts - 1, dtype=torch.int32)
    else:
        ids = torch.randint(0, experts, (tokens, k), generator=generator, dtype=torch.int32)
    if kind == "foreign":  # nobody's, another rank's, zero experts, far out
        strange = torch.tensor([-1, experts, experts + 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
        pick = torch.randint(0, 12, (tokens, k), generator=generator)
        ids = torch.where(pick < 5, strange[pick.clamp(max=4)], ids)
    if kind == "nobody":
        ids = torch.full((tokens, k), -1, dtype=torch.int32)
    return ids


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "block_m", "kind"),
    [
        (1, 1, 1, 16, "uniform"),
        (1, 8, 128, 16, "uniform"),
        (16, 8, 128, 16, "uniform"),
        (64, 8, 64, 64, "skewed"),  # as many as one program takes
        (65, 8, 64, 64, "skewed"),  # one more
        (300, 4, 12, 32, "foreign"),  # experts no power of two
        (300, 4, 12, 32, "hot"),
        (70, 3, 5, 16, "nobody"),
        (300, 4, 7, 16, "nobody"),
        (200, 8, 512, 16, "skewed"),
    ],
)
def test_align_equals_twin(tokens: int, k: int, experts: int, block_m: int, kind: str, device: torch.device) -> None:
    """Order and tiles are the twin's, bit by bit, in one program and in several; empty tiles are empty."""
    ids = ids_of(tokens, k, experts, kind).to(device)
    found, wanted = align(ids, experts, block_m), align_torch(ids, experts, block_m)
    tiles, rows = int(wanted.num_tiles[0]), wanted.order.numel()
    assert found.num_tiles.tolist() == [tiles] + (2 + found.max_tiles) * [0]
    assert found.max_tiles == max_tiles(tokens * k, experts, block_m) >= tiles
    assert torch.equal(found.order[:rows], wanted.order)
    for name in ("tile_expert", "tile_start", "tile_stop"):
        assert torch.equal(getattr(found, name)[:tiles], getattr(wanted, name)), name
        assert not getattr(found, name)[tiles:].any(), name


@pytest.mark.parametrize("kind", ["uniform", "skewed", "hot", "foreign"])
@pytest.mark.parametrize(("tokens", "over"), [(8, 4), (30, 4), (300, 8)])
def test_a_last_tile_may_have_some_rows_more(tokens: int, over: int, kind: str, device: torch.device) -> None:
    """As the twin cuts them: no tile behind a full one for a few rows alone, none empty, each row in one tile."""
    ids = ids_of(tokens, 4, 9, kind).to(device)
    found, wanted = align(ids, 9, 16, over=over), align_torch(ids, 9, 16, over=over)
    tiles = int(wanted.num_tiles[0])
    assert found.num_tiles[0] == tiles <= found.max_tiles
    for name in ("tile_expert", "tile_start", "tile_stop"):
        assert torch.equal(getattr(found, name)[:tiles], getattr(wanted, name)), name
    heights = (wanted.tile_stop - wanted.tile_start).tolist()
    assert sum(heights) == wanted.order.numel() and all(0 < height <= 16 + over for height in heights)
    for tile in range(1, tiles):
        if wanted.tile_expert[tile] == wanted.tile_expert[tile - 1]:
            assert heights[tile - 1] == 16 and heights[tile] > over


def test_align_with_blocks_of_many_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pairs outnumber what the programs take at once, each goes through several chunks."""
    monkeypatch.setattr(align_module, "BLOCKS", 3)
    ids = ids_of(350, 4, 33, "foreign").to(device)
    found, wanted = align(ids, 33, 32), align_torch(ids, 33, 32)
    assert torch.equal(found.order[: wanted.order.numel()], wanted.order)
    assert torch.equal(found.tile_stop[: int(wanted.num_tiles[0])], wanted.tile_stop)


def test_align_is_a_stable_sort(device: torch.device) -> None:
    """The twin itself is right: its order is torch's stable sort, and its tiles cover each row once."""
    ids = ids_of(40, 4, 9, "uniform").to(device)
    tiles = align_torch(ids, 9, 16)
    assert torch.equal(tiles.order.long(), torch.argsort(ids.reshape(-1), stable=True))
    rows = [row for a, b in zip(tiles.tile_start, tiles.tile_stop, strict=True) for row in range(int(a), int(b))]
    assert rows == list(range(160))
    owner = ids.reshape(-1)[tiles.order.long()]
    for expert, start, stop in zip(tiles.tile_expert, tiles.tile_start, tiles.tile_stop, strict=True):
        assert 0 < stop - start <= 16
        assert (owner[start:stop] == expert).all()


@pytest.mark.parametrize(("tokens", "experts"), [(0, 8), (5, 0)])
def test_align_of_nothing(tokens: int, experts: int, device: torch.device) -> None:
    """No tokens, or a rank without experts: no tiles."""
    tiles = align(torch.zeros(tokens, 2, dtype=torch.int32, device=device), experts, 16)
    assert tiles.num_tiles.tolist() == [0, 0, 0] and tiles.max_tiles == 0


def test_align_reads_views(device: torch.device) -> None:
    """Ids that are a view of a wider tensor count as they stand."""
    wide = ids_of(50, 8, 16, "uniform").to(device)
    found, wanted = align(wide[:, ::2], 16, 16), align_torch(wide[:, ::2].contiguous(), 16, 16)
    assert torch.equal(found.order, wanted.order)
