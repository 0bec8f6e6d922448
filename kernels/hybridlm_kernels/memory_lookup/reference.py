"""Lookup and scores by their definition, with all rows at once. Letters: t tokens, k rows per token, n rows, v row
width."""

import jax.numpy as jnp
from jax import Array


def lookup(table: Array, indices: Array, weights: Array) -> Array:
    """y [t, v] in the weights' dtype."""
    rows, inside = _rows(table, indices, weights)
    y = jnp.einsum("tk,tkv->tv", jnp.where(inside, weights, 0).astype(rows.dtype), rows, precision="highest")
    return y.astype(weights.dtype)


def scores(table: Array, indices: Array, x: Array) -> Array:
    """s [t, k] in x's dtype."""
    rows, _ = _rows(table, indices, x)
    return jnp.einsum("tkv,tv->tk", rows, x.astype(rows.dtype), precision="highest").astype(x.dtype)


def gradients(table: Array, indices: Array, weights: Array, vectors: Array) -> tuple[Array, Array]:
    """The scores of `vectors` [t, v], and for every row of the table the sum of w_tk vectors_t over its pairs."""
    rows, inside = _rows(table, indices, vectors)
    products = jnp.einsum("tk,tv->tkv", jnp.where(inside, weights, 0).astype(rows.dtype), vectors.astype(rows.dtype))
    sums = jnp.zeros((table.shape[0], rows.shape[2]), rows.dtype).at[jnp.where(inside, indices, 0)].add(products)
    return scores(table, indices, vectors), sums.reshape(table.shape).astype(table.dtype)


def _rows(table: Array, indices: Array, like: Array) -> tuple[Array, Array]:
    """The rows [t, k, v] in float32 or wider, 0 where there is none, and whether there is one [t, k]."""
    num_rows = table.shape[0]
    inside = (indices >= 0) & (indices < num_rows)
    wide = jnp.result_type(table.dtype, like.dtype, jnp.float32)
    rows = table.reshape(num_rows, -1)[jnp.where(inside, indices, 0)].astype(wide)
    return jnp.where(inside[..., None], rows, 0), inside
