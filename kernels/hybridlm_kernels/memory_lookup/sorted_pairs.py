"""The pairs (token, k) of a lookup in the order of their rows: all that concerns a row lies together.

Letters: t tokens, k rows per token, n rows, p pairs, c pairs of a chunk.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class SortedPairs(NamedTuple):
    """Pairs in the order of their rows, those outside the table last."""

    row: Array
    """[p] int32, ascending; n for a pair that is outside, and where `p` was filled up."""
    pair: Array
    """[p] int32: token * k + which of its rows, and from t * k on where `p` was filled up."""
    weight: Array
    """[p], of each pair."""
    num_inside: Array
    """How many pairs are inside, int32."""


def sort_pairs(indices: Array, weights: Array, num_rows: int, multiple: int = 1) -> SortedPairs:
    """Of indices and weights [t, k]; p is t * k, filled up to a multiple of `multiple`. Pairs of one row keep their
    order."""
    missing = -indices.size % multiple
    flat = jnp.where((indices >= 0) & (indices < num_rows), indices, num_rows).reshape(-1)
    flat = jnp.pad(flat, (0, missing), constant_values=num_rows)
    weights = jnp.pad(weights.reshape(-1), (0, missing))
    pair = jnp.arange(flat.size, dtype=jnp.int32)
    row, pair, weights = lax.sort((flat, pair, weights), num_keys=1, is_stable=True)
    return SortedPairs(row, pair, weights, jnp.sum(flat < num_rows, dtype=jnp.int32))


def in_order_of_pairs(values: Array, pairs: SortedPairs, shape: tuple[int, ...]) -> Array:
    """[t, k] of `values` [p] that are in the order of rows."""
    size = math.prod(shape)
    unsorted = jnp.zeros_like(values, shape=size).at[pairs.pair].set(values, mode="drop", unique_indices=True)
    return unsorted.reshape(shape)
