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


def _visit(
    group: Any, tile: Any, starts: Any, ends: Any, visits: Any, x: Any, *refs: Any, activation: Activation | None
) -> None:
    *weights, out = refs
    here = pl.program_id(1)

    @pl.when(here < visits[0])
    def _() -> None:
        owner = group[here]
        products = [_dot(x[...], weight[0]) for weight in weights]
        value = products[0] if activation is None else activation(*products)
        value = value.reshape(out.shape)
        row = tile[here] * out.shape[0] + jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
        mine = (row >= starts[owner]) & (row < ends[owner])
        # Rows of the groups before are there already; selected in float32, which every TPU can.
        out[...] = jnp.where(mine, value, out[...].astype(jnp.float32)).astype(out.dtype)


def _grouped(
    x: Array,
    weights: Sequence[Array],
    sizes: Array,
    activation: Activation | None,
    interpret: bool,
    as_parts: bool = False,
) -> Array:
    (rows, inside), (groups, _, width) = x.shape, weights[0].shape
    tile, columns = tile_rows(rows, groups), tile_columns(inside, width, len(weights), x.dtype.itemsize)
    visits = plan_visits(sizes, rows, tile)
    result, block, at_block = (rows, width), (tile, columns), lambda n, i, group, at, *_: (at[i], n)
    if as_parts:
        result, block = (rows, width // LANES, LANES), (tile, columns // LANES, LANES)
        at_block = lambda n, i, group, at, *_: (at[i], n, 0)  # noqa: E731
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(visits),
        grid=(width // columns, most_visits(rows, groups, tile)),
        in_specs=[
            pl.BlockSpec((tile, inside), lambda n, i, group, at, *_: (at[i], 0)),
            *[pl.BlockSpec((1, inside, columns), lambda n, i, group, *_: (group[i], 0, n))] * len(weights),
        ],
        out_specs=pl.BlockSpec(block, at_block),
    )
    return pl.pallas_call(
        functools.partial(_visit, activation=activation),
        out_shape=jax.ShapeDtypeStruct(result, x.dtype),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_estimate(work_of(rows, groups, inside, width, len(weights), x.dtype.itemsize)),
        interpret=interpret,
    )(*visits, x, *weights)


def _estimate(work: Work) -> pl.CostEstimate:
    """For XLA's scheduler; nothing where aot.py compiles, which counts these calls by itself."""
    flops, moved = (0, 0) if ahead_of_time() else work
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def grouped_matmul(x: Array, weight: Array, sizes: Array, *, interpret: bool = False, as_parts: bool = False) -> Array:
    """x [N, K], rows of group 0 first, times weight [G, K, M] of their group: [N, M] in the dtype of ``x``.

    Rows behind the last group are undefined. N is a multiple of 16. ``as_parts`` gives [N, M / 128, 128], where each
    row lies in one piece.
    """
    return _grouped(x, [weight], sizes, None, interpret, as_parts)


def grouped_gate_up(
    x: Array, gate: Array, up: Array, sizes: Array, activation: Activation, *, interpret: bool = False
) -> Array:
    """activation(x gate, x up) of x [N, K] and [G, K, M] twice: [N, M], otherwise as :func:`grouped_matmul`."""
    return _grouped(x, [gate, up], sizes, activation, interpret)
