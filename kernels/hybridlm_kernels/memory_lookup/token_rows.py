"""The rows of each token as kernels read them: those that are here first, in groups. Letters: t tokens, k rows per
token, f rows per token, filled up to whole groups."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class TokenRows(NamedTuple):
    """The rows of every token in descending order, and what belongs to them, [t, f]."""

    rows: Array
    """int32. A group that has fewer rows repeats the token's first one; a group that has none is -1."""
    others: Array
    inside: Array
    """Whether there is such a row here."""

    @staticmethod
    def of(indices: Array, others: Array, num_rows: int, group: int) -> "TokenRows":
        """Of indices and others [t, k]; what is filled up has others k, which comes last when sorted by them."""
        k = indices.shape[1]
        padding = ((0, 0), (0, -k % group))
        negative = jnp.where((indices >= 0) & (indices < num_rows), -indices, 1)
        negative = jnp.pad(negative, padding, constant_values=1)
        negative, others = lax.sort((negative, jnp.pad(others, padding, constant_values=k)), num_keys=1)
        inside = negative <= 0
        first_of_group = lax.broadcasted_iota(jnp.int32, inside.shape, 1) // group * group
        empty = first_of_group >= jnp.sum(inside, axis=1, keepdims=True)
        rows = jnp.where(inside, -negative, jnp.where(empty, -1, -negative[:, :1]))
        return TokenRows(rows, others, inside)


def positions(indices: Array) -> Array:
    """[t, k] int32: which of its token's rows each is."""
    return lax.broadcasted_iota(jnp.int32, indices.shape, 1)


def in_order_of_positions(values: Array, tokens: TokenRows, k: int) -> Array:
    """[t, k] of `values` [t, f], where `tokens` has the positions as others; 0 where there is no row."""
    return lax.sort((tokens.others, jnp.where(tokens.inside, values, 0)), num_keys=1)[1][:, :k]
