"""Where groups lie among the rows, and the visits of tiles by groups that a kernel makes one after another.

Letters: m rows, g groups, b rows of a tile, v visits.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Visits(NamedTuple):
    """A tile of rows and a group that meet, [v] each; in the order of the rows."""

    tile: Array
    group: Array
    first: Array
    """Of the tile's rows the first that is the group's, counted within the tile."""
    end: Array
    """The first row past those; both are 0 for a visit that has nothing to multiply."""


def bounds(group_sizes: Array, num_rows: int) -> tuple[Array, Array]:
    """The first row of each group and the first one past it, [g] both, none of them past the last row."""
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), num_rows)
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]]), ends


def of_every_tile(group_sizes: Array, num_rows: int, size: int) -> Visits:
    """Of every tile at least one visit, which has nothing to multiply where the tile's rows are of no group.

    They are as many as there may be, tiles + groups - 1; those left over repeat the last tile with nothing to multiply.
    """
    starts, ends = bounds(group_sizes, num_rows)
    num_tiles = -(-num_rows // size)
    untouched = -(-ends[-1:] // size)
    counts = jnp.concatenate([_num_tiles(starts, ends, size), num_tiles - untouched])
    first_tiles = jnp.concatenate([starts // size, untouched])
    return _list(starts, ends, counts, first_tiles, num_tiles, size)


def of_every_group(group_sizes: Array, num_rows: int, size: int) -> Visits:
    """Of every group at least one visit, which has nothing to multiply where the group is empty; as many in all."""
    starts, ends = bounds(group_sizes, num_rows)
    counts = jnp.maximum(_num_tiles(starts, ends, size), 1)
    return _list(starts, ends, counts, starts // size, -(-num_rows // size), size)


def _num_tiles(starts: Array, ends: Array, size: int) -> Array:
    """How many tiles have rows of each group, [g]."""
    return jnp.where(ends > starts, -(-ends // size) - starts // size, 0)


def _list(starts: Array, ends: Array, counts: Array, first_tiles: Array, num_tiles: int, size: int) -> Visits:
    """`counts[j]` visits by group j, or by none where j is past the last, to the tiles from `first_tiles[j]` on."""
    num_groups = starts.shape[0]
    before = jnp.cumsum(counts) - counts
    index = jnp.arange(num_tiles + num_groups - 1, dtype=jnp.int32)
    by = (index[:, None] >= before) & (index[:, None] < before + counts)  # v, g and who is past the last

    def of_visitor(values: Array) -> Array:
        """A sum that has one term at most: TPUs are slow to gather single numbers."""
        return jnp.sum(jnp.where(by[:, : values.shape[0]], values, 0), axis=1, dtype=jnp.int32)

    left_over = index >= jnp.sum(counts)
    tile = jnp.where(left_over, num_tiles, index + of_visitor(first_tiles - before))
    tile = jnp.minimum(tile, num_tiles - 1)
    group = jnp.where(left_over, num_groups, of_visitor(jnp.arange(counts.shape[0], dtype=jnp.int32)))
    first = jnp.maximum(of_visitor(starts) - tile * size, 0)
    end = jnp.minimum(of_visitor(ends) - tile * size, size)
    multiplies = first < end
    return Visits(
        tile, jnp.minimum(group, num_groups - 1), jnp.where(multiplies, first, 0), jnp.where(multiplies, end, 0)
    )
