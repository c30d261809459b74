"""The mathematics as pure functions of jax arrays: no torch, no device, shapes known while tracing.

An adapter calls them for its kind of tensor (adapter.py for torch_xla); one for torch_tpu can use the same. All
indices are int32: a TPU has no 64-bit integers, and XLA emulates them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .kernels.grouped import grouped_matmul, grouped_swiglu
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
    """rows [N, K], those of group 0 first, times weight [G, M, K] of their group transposed: [N, M].

    Rows behind the last group are undefined.
    """
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return jax.lax.ragged_dot_general(
        rows,
        weight,
        sizes,
        dimensions,
        precision=precision(rows.dtype),
        preferred_element_type=rows.dtype,
    )


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


def split(spec: Spec, projected: Array) -> tuple[Array, Array | None]:
    """Gate and up of a first product [N, 2I], [N, I] and None where the experts are not gated."""
    if not spec.gated:
        return projected, None
    if spec.interleaved:
        pairs = projected.reshape(*projected.shape[:-1], -1, 2)
        return pairs[..., 0], pairs[..., 1]
    half = projected.shape[-1] // 2
    return projected[..., :half], projected[..., half:]


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
    w13: Array,
    w2: Array,
    b13: Array | None,
    b2: Array | None,
    norm: Array | None,
    spec: str | Spec,
) -> Array:
    """The routed experts of [T, H] rows, weighted and summed: [T, H] float32."""
    spec = spec if isinstance(spec, Spec) else loads(spec)
    (tokens, k), given = topk_ids.shape, x
    if spec.weight_on_input:
        x = (x.astype(jnp.float32) * topk_weights).astype(x.dtype)
        given, topk_weights = x, jnp.ones_like(topk_weights)
    owner = owners(topk_ids, spec.held)
    slots = run_sorted(x, owner, k, w13, w2, b13, b2, norm, spec).reshape(tokens, k, -1)
    # Slots without an expert hold whatever the product left there, NaN perhaps, so they are replaced, not multiplied.
    out = jnp.where((owner < spec.held).reshape(tokens, k, 1), slots, 0).astype(jnp.float32)
    if spec.ids > spec.first_zero:
        zero = (topk_ids >= spec.first_zero) & (topk_ids < spec.ids)
        out = jnp.where(zero[..., None], given.astype(jnp.float32)[:, None, :], out)
        counted = zero | (owner < spec.held).reshape(tokens, k)
    else:
        counted = (owner < spec.held).reshape(tokens, k)
    total = (out * jnp.where(counted, topk_weights, 0.0)[..., None]).sum(axis=1)
    return total if spec.scale == 1.0 else total * spec.scale


def run_sorted(
    x: Array,
    owner: Array,
    k: int,
    w13: Array,
    w2: Array,
    b13: Array | None,
    b2: Array | None,
    norm: Array | None,
    spec: Spec,
) -> Array:
    """Each slot's expert on its row, [N, H] in slot order and in the dtype of ``x``; other slots are undefined."""
    order, sizes = sort_slots(owner, spec.held)
    rows = jnp.take(x, order // k, axis=0)
    at = jnp.minimum(jnp.take(owner, order), spec.held - 1) if b13 is not None or b2 is not None else None
    inner = first_product(rows, at, sizes, w13, b13, spec)
    if spec.form == "gmm":
        out = grouped_matmul(inner, w2, sizes, tiles=spec.tiles, interpret=spec.interpret)
    else:
        out = grouped_linear(inner, w2, sizes)
    if b2 is not None:
        out = (out.astype(jnp.float32) + jnp.take(b2, at, axis=0).astype(jnp.float32)).astype(x.dtype)
    if norm is not None:
        out = normalise(spec, out.astype(jnp.float32), norm).astype(x.dtype)
    # The inverse of a permutation by a sort: a scatter of single rows is serial on a TPU.
    return jnp.take(out, jnp.argsort(order), axis=0)


def first_product(rows: Array, at: Array | None, sizes: Array, w13: Array, b13: Array | None, spec: Spec) -> Array:
    """The activated first product of sorted rows, [N, I] in their dtype."""
    if spec.form == "gmm" and spec.gated and not spec.interleaved and b13 is None:
        # Fused: gate and up of one tile meet in fast memory, and [N, 2I] is never written.
        act = lambda gate, up: activate(spec, gate, up)  # noqa: E731
        return grouped_swiglu(rows, w13, sizes, act, tiles=spec.tiles, interpret=spec.interpret)
    if spec.form == "gmm":
        projected = grouped_matmul(rows, w13, sizes, tiles=spec.tiles, interpret=spec.interpret)
    else:
        projected = grouped_linear(rows, w13, sizes)
    projected = projected.astype(jnp.float32)
    if b13 is not None:
        projected = projected + jnp.take(b13, at, axis=0).astype(jnp.float32)
    return activate(spec, *split(spec, projected)).astype(rows.dtype)
