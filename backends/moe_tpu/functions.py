"""The mathematics as pure functions of jax arrays: no torch, no device, shapes known while tracing.

An adapter calls them for its kind of tensor (adapter.py for torch_xla); one for torch_tpu can use the same. All
indices are int32: a TPU has no 64-bit integers, and XLA emulates them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .kernels.combine import combine
from .kernels.grouped import gathered_gate_up, grouped_matmul
from .kernels.work import LANES, MOST_SLOTS, fits_parts
from .spec import Spec, loads

Array = jax.Array


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """A TPU multiplies float32 in one pass of bfloat16 unless told otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """x [n, K] times weight [N, K] transposed plus bias, in float32: [n, N]."""
    product = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision(x.dtype), preferred_element_type=jnp.float32
    )
    return product if bias is None else product + bias.astype(jnp.float32)


def router_logits(x: Array, weight: Array, bias: Array | None) -> Array:
    """[T, E] float32; a choice of experts needs the whole of float32."""
    return linear(x.astype(jnp.float32), weight.astype(jnp.float32), bias)


def grouped_linear(rows: Array, weight: Array, sizes: Array) -> Array:
    """rows [N, K], those of group 0 first, times weight [G, K, M] of their group: [N, M].

    Rows behind the last group are undefined.
    """
    return jax.lax.platform_dependent(rows, weight, sizes, cpu=_group_by_group, default=_ragged)


def _ragged(rows: Array, weight: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(rows, weight, sizes, precision=precision(rows.dtype), preferred_element_type=rows.dtype)


def _group_by_group(rows: Array, weight: Array, sizes: Array) -> Array:
    """Where XLA has no grouped product, jax sums the products of all groups with masked rows, and a group without rows
    that holds NaN spoils the others; here rows are selected."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    row = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]

    def add(group: Array, out: Array) -> Array:
        product = jnp.dot(
            rows, weight[group], precision=precision(rows.dtype), preferred_element_type=jnp.float32
        ).astype(rows.dtype)
        return jnp.where((row >= ends[group] - sizes[group]) & (row < ends[group]), product, out)

    return jax.lax.fori_loop(0, weight.shape[0], add, jnp.zeros((rows.shape[0], weight.shape[2]), rows.dtype))


def rows_at(table: Array, index: Array) -> Array:
    """Rows by indices that are known to be in range: a check would be a pass more over all rows."""
    return table.at[index].get(mode="promise_in_bounds")


def wide_rows_at(table: Array, index: Array) -> Array:
    """:func:`rows_at` for [n, H] on a TPU, where eight rows of a matrix share a tile and one costs the bytes of eight.

    With a row as a matrix [H / 128, 128] of its own, as two passes more, a gather reads what it needs. Compiled for
    v6e, 16384 rows of 2048 from 2048: 621 to 285 MB; from 16384, with the weighted sum: 824 to 489 MB.
    """
    lanes = 128
    if table.shape[1] % lanes:
        return rows_at(table, index)
    found = rows_at(table.reshape(table.shape[0], -1, lanes), index).reshape(index.shape[0], -1)
    # Without it the sum behind would work in float32 on this shape, and need three times the memory.
    return jax.lax.optimization_barrier(found)


def packed(weight: Array, first: int, count: int, step: int) -> Array:
    """[E, N, K] to [E, K, count]: every ``step``-th row from ``first`` on, transposed."""
    return weight[:, first : first + count * step : step].swapaxes(1, 2)


def owners(topk_ids: Array, held: int) -> Array:
    """[N] the expert of each slot, ``held`` where its expert is none or elsewhere, so that a sort puts it last."""
    flat = topk_ids.reshape(-1)
    return jnp.where((flat >= 0) & (flat < held), flat, held)


def sort_slots(owner: Array, held: int) -> tuple[Array, Array]:
    """The order in which slots lie expert by expert, and how many each expert has."""
    order = jnp.argsort(owner, stable=True).astype(jnp.int32)
    # A comparison with every expert is static, and cheap beside one product; a bincount would scatter.
    sizes = (owner[:, None] == jnp.arange(held, dtype=jnp.int32)[None, :]).sum(0, dtype=jnp.int32)
    return order, sizes


def activate(spec: Spec, gate: Array, up: Array | None) -> Array:
    """act(gate) * up in float32, clamped and shifted as the spec says; act(gate) where there is no up."""
    if up is None:
        return _named(spec.activation, gate)
    if spec.limit is not None:
        gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    if spec.alpha != 1.0 or spec.beta != 0.0:
        return gate * jax.nn.sigmoid(spec.alpha * gate) * (up + spec.beta)
    return _named(spec.activation, gate) * up


def _named(name: str, x: Array) -> Array:
    if name == "silu":
        return x * jax.nn.sigmoid(x)
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    if name == "relu":
        return jax.nn.relu(x)
    if name == "relu2":
        return jnp.square(jax.nn.relu(x))
    raise ValueError(f"activation {name!r}: expected one of moe_core.activations.ACTIVATIONS")


def split(spec: Spec, packed: Array) -> tuple[Array, Array | None]:
    """Gate and up of [..., 2I]; where the experts are not gated, all of it and None."""
    if not spec.gated:
        return packed, None
    if spec.interleaved:
        return packed[..., 0::2], packed[..., 1::2]
    half = packed.shape[-1] // 2
    return packed[..., :half], packed[..., half:]


def normalise(spec: Spec, out: Array, weight: Array) -> Array:
    """The RMS norm behind each expert."""
    weight = weight.astype(jnp.float32)
    if spec.norm_scale_first:
        out, weight = out * weight, jnp.ones_like(weight)
    return out * jax.lax.rsqrt(jnp.mean(out * out, axis=-1, keepdims=True) + spec.norm_eps) * weight


def routed(
    x: Array,
    topk_weights: Array,
    topk_ids: Array,
    gate: Array,
    up: Array | None,
    down: Array,
    b13: Array | None,
    b2: Array | None,
    norm: Array | None,
    spec: str | Spec,
) -> Array:
    """The routed experts of [T, H] rows, weighted and summed: [T, H] float32.

    Args:
        gate, up: [E, H, I] each, as layout.py packs them; experts that are not gated have no ``up``.
        down: [E, I, H].
        b13, b2, norm: as MoEWeights has them.
    """
    spec = spec if isinstance(spec, Spec) else loads(spec)
    tokens, k = topk_ids.shape
    if spec.weight_on_input:
        x, topk_weights = (x.astype(jnp.float32) * topk_weights).astype(x.dtype), jnp.ones_like(topk_weights)
    owner = owners(topk_ids, spec.held)
    counted = owner < spec.held
    order, sizes = sort_slots(owner, spec.held)
    # The inverse of a permutation by a sort: a scatter of single rows is serial on a TPU.
    places = jnp.argsort(order).astype(jnp.int32)
    at = jnp.minimum(rows_at(owner, order), spec.held - 1) if b13 is not None or b2 is not None else None
    inner = first_product(x, order // k, at, sizes, gate, up, b13, spec)
    plain = b2 is None and norm is None and spec.ids == spec.first_zero and owner.shape[0] <= MOST_SLOTS
    if spec.form == "gmm" and plain and fits_parts(*down.shape[1:], x.dtype.itemsize):
        expected = spec.expected(owner.shape[0])
        parts = grouped_matmul(inner, down, sizes, expected=expected, interpret=spec.interpret, as_parts=True)
        shares = jnp.where(counted.reshape(tokens, k), topk_weights, 0.0)
        total = combine(parts, jnp.where(counted, places, -1), shares, interpret=spec.interpret)
        return total if spec.scale == 1.0 else total * spec.scale
    ordered = finished(product(inner, down, sizes, spec), at, b2, norm, spec)
    slots = wide_rows_at(ordered, places).reshape(tokens, k, -1)
    counted = counted.reshape(tokens, k)
    # Slots without an expert hold whatever the product left there, NaN perhaps, so they are replaced, not multiplied.
    out = jnp.where(counted[..., None], slots, 0).astype(jnp.float32)
    if spec.ids > spec.first_zero:
        zero = (topk_ids >= spec.first_zero) & (topk_ids < spec.ids)
        out = jnp.where(zero[..., None], x.astype(jnp.float32)[:, None, :], out)
        counted = counted | zero
    total = (out * jnp.where(counted, topk_weights, 0.0)[..., None]).sum(axis=1)
    return total if spec.scale == 1.0 else total * spec.scale


def finished(out: Array, at: Array | None, b2: Array | None, norm: Array | None, spec: Spec) -> Array:
    """Bias and norm behind the second product, in float32; [N, H] in the dtype of ``out``."""
    if b2 is None and norm is None:
        return out
    exact = out.astype(jnp.float32)
    if b2 is not None:
        exact = exact + rows_at(b2, at).astype(jnp.float32)
    if norm is not None:
        exact = normalise(spec, exact, norm)
    return exact.astype(out.dtype)


def first_product(
    x: Array,
    token: Array,
    at: Array | None,
    sizes: Array,
    gate: Array,
    up: Array | None,
    b13: Array | None,
    spec: Spec,
) -> Array:
    """The activated first product of the rows of x [T, H] that ``token`` [N] names, sorted by expert: [N, I].

    Args:
        at: [N] the expert of each row, where biases are added.
    """
    fused = spec.form == "gmm" and b13 is None and up is not None and spec.activation != "gelu"
    if fused and x.shape[1] % LANES == 0 and token.shape[0] <= MOST_SLOTS:
        act, expected = functools.partial(activate, spec), spec.expected(token.shape[0])
        return gathered_gate_up(x, token, gate, up, sizes, act, expected=expected, interpret=spec.interpret)
    rows = wide_rows_at(x, token)
    projected = [product(rows, weight, sizes, spec).astype(jnp.float32) for weight in (gate, up) if weight is not None]
    if b13 is not None:
        biases = [bias for bias in split(spec, b13.astype(jnp.float32)) if bias is not None]
        projected = [value + rows_at(bias, at) for value, bias in zip(projected, biases, strict=True)]
    return activate(spec, projected[0], projected[1] if up is not None else None).astype(rows.dtype)


def product(rows: Array, weight: Array, sizes: Array, spec: Spec) -> Array:
    """A grouped product by the form of the spec."""
    if spec.form == "gmm":
        return grouped_matmul(rows, weight, sizes, expected=spec.expected(rows.shape[0]), interpret=spec.interpret)
    return grouped_linear(rows, weight, sizes)
