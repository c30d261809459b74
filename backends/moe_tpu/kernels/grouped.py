"""Grouped products for TPUs in Pallas: sorted rows times the weight of their group.

The grid runs over columns and, inside, over visits: a visit is one tile of rows for one group, so a tile in which
groups meet has one for each. Consecutive visits of a tile keep it in fast memory, and consecutive visits of a group
keep its weight there: with one tile of columns every weight is read once. What the rows are is known on the device
only, so the grid has as many visits as any routing could need, and those that are not needed do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..target import ahead_of_time
from .work import LANES, VMEM_BYTES, Work, most_visits, tile_columns, tile_rows, work_of

Array = jax.Array
Activation = Callable[[Array, Array], Array]


def plan_visits(sizes: Array, rows: int, tile: int) -> tuple[Array, Array, Array, Array, Array]:
    """Group and tile of each visit, first and last row of each group, and [1] how many visits there are."""
    groups = sizes.shape[0]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    first = starts // tile
    count = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0)
    until = jnp.cumsum(count, dtype=jnp.int32)
    # Visits behind the last repeat it: the same blocks are not fetched again.
    visit = jnp.minimum(jnp.arange(most_visits(rows, groups, tile), dtype=jnp.int32), jnp.maximum(until[-1] - 1, 0))
    group = jnp.minimum((until[None, :] <= visit[:, None]).sum(1, dtype=jnp.int32), groups - 1)
    at = jnp.take(first, group) + visit - jnp.take(until - count, group)
    return group, jnp.clip(at, 0, rows // tile - 1), starts, ends, until[-1:]


def _dot(x: Array, weight: Array) -> Array:
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(x, weight, precision=exact, preferred_element_type=jnp.float32)


def _use(here: Any, plan: Sequence[Any], rows: Array, weights: Sequence[Any], out: Any, activation: Any) -> None:
    """One visit: its rows times its group's weights, written where the rows are the group's."""
    group, tile, starts, ends = plan
    owner = group[here]
    products = [_dot(rows, weight[0]) for weight in weights]
    value = (products[0] if activation is None else activation(*products)).reshape(out.shape)
    row = tile[here] * out.shape[0] + jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
    mine = (row >= starts[owner]) & (row < ends[owner])
    # Rows of the groups before are there already; selected in float32, which every TPU can.
    out[...] = jnp.where(mine, value, out[...].astype(jnp.float32)).astype(out.dtype)


def _visit(group: Any, tile: Any, starts: Any, ends: Any, visits: Any, x: Any, *refs: Any) -> None:
    *weights, out = refs
    here = pl.program_id(1)

    @pl.when(here < visits[0])
    def _() -> None:
        _use(here, (group, tile, starts, ends), x[...], weights, out, None)


def _gathering_visit(
    group: Any, tile: Any, starts: Any, ends: Any, visits: Any, at: Any, x: Any, *refs: Any, activation: Activation
) -> None:
    """As :func:`_visit`, its tile of rows fetched one by one while the tile before is multiplied."""
    *weights, out, buffer, arrived = refs
    here, last, rows = pl.program_id(1), pl.num_programs(1) - 1, out.shape[0]
    this, following = tile[here], tile[jnp.minimum(here + 1, last)]

    def each(number: Any, action: str) -> None:
        def one(row: Any, carry: Any) -> Any:
            source, slot = x.at[at[number * rows + row]], number % 2
            getattr(pltpu.make_async_copy(source, buffer.at[slot, row], arrived.at[slot]), action)()
            return carry

        jax.lax.fori_loop(0, rows, one, 0)

    @pl.when(here == 0)
    def _() -> None:
        each(this, "start")

    @pl.when(following != this)
    def _() -> None:
        each(following, "start")

    @pl.when((here == 0) | (tile[jnp.maximum(here - 1, 0)] != this))
    def _() -> None:
        each(this, "wait")

    @pl.when(here < visits[0])
    def _() -> None:
        _use(here, (group, tile, starts, ends), buffer[this % 2].reshape(rows, -1), weights, out, activation)


def _estimate(work: Work) -> pl.CostEstimate:
    """For XLA's scheduler; nothing where aot.py compiles, which counts these calls by itself."""
    flops, moved = (0, 0) if ahead_of_time() else work
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def _parameters(columns: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=(columns, "arbitrary"), vmem_limit_bytes=VMEM_BYTES)


def grouped_matmul(
    x: Array,
    weight: Array,
    sizes: Array,
    *,
    expected: int | None = None,
    interpret: bool = False,
    as_parts: bool = False,
) -> Array:
    """x [N, K], rows of group 0 first, times weight [G, K, M] of their group: [N, M] in the dtype of ``x``.

    Rows behind the last group are undefined. N is a multiple of 8.

    Args:
        expected: how many rows groups are likely to own together; None is all.
        as_parts: gives [N, M / 128, 128], where each row lies in one piece.
    """
    (rows, inside), (groups, _, width), item = x.shape, weight.shape, x.dtype.itemsize
    tile, columns = tile_rows(rows, expected or rows, groups), tile_columns(inside, width, 1, item)
    plan = plan_visits(sizes, rows, tile)
    result, block, at_block = (rows, width), (tile, columns), lambda n, i, group, at, *_: (at[i], n)
    if as_parts:
        result, block = (rows, width // LANES, LANES), (tile, columns // LANES, LANES)
        at_block = lambda n, i, group, at, *_: (at[i], n, 0)  # noqa: E731
    return pl.pallas_call(
        _visit,
        out_shape=jax.ShapeDtypeStruct(result, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(width // columns, most_visits(rows, groups, tile)),
            in_specs=[
                pl.BlockSpec((tile, inside), lambda n, i, group, at, *_: (at[i], 0)),
                pl.BlockSpec((1, inside, columns), lambda n, i, group, *_: (group[i], 0, n)),
            ],
            out_specs=pl.BlockSpec(block, at_block),
        ),
        compiler_params=_parameters("parallel"),
        cost_estimate=_estimate(work_of(rows, groups, inside, width, 1, item, expected=expected)),
        interpret=interpret,
        name="grouped",
    )(*plan, x, weight)


def gathered_gate_up(
    x: Array,
    at: Array,
    gate: Array,
    up: Array,
    sizes: Array,
    activation: Activation,
    *,
    expected: int | None = None,
    interpret: bool = False,
) -> Array:
    """activation(x gate, x up) of the rows ``at`` [N] of x [T, H] and weights [G, H, I]: [N, I].

    Neither the rows in the order of experts nor the two products are ever written. H is a multiple of 128; otherwise as
    :func:`grouped_matmul`.
    """
    rows, (groups, inside, width), item = at.shape[0], gate.shape, x.dtype.itemsize
    tile, columns = tile_rows(rows, expected or rows, groups), tile_columns(inside, width, 2, item)
    plan = (*plan_visits(sizes, rows, tile), at)
    by_group = pl.BlockSpec((1, inside, columns), lambda n, i, group, *_: (group[i], 0, n))
    return pl.pallas_call(
        functools.partial(_gathering_visit, activation=activation),
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(width // columns, most_visits(rows, groups, tile)),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), by_group, by_group],
            out_specs=pl.BlockSpec((tile, columns), lambda n, i, group, at, *_: (at[i], n)),
            scratch_shapes=[
                pltpu.VMEM((2, tile, inside // LANES, LANES), x.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        # In order, since the tile that follows is fetched ahead.
        compiler_params=_parameters("arbitrary"),
        cost_estimate=_estimate(work_of(rows, groups, inside, width, 2, item, expected=expected)),
        interpret=interpret,
        name="gathered",
    )(*plan, x.reshape(x.shape[0], -1, LANES), gate, up)
