"""What a step asks of the rows of a table that it uses: their gradients for an optimizer, and how evenly they are used.

No array of the table's size is made: pairs (token, row) are sorted by row, and a chunk of them is summed at a time.
Letters: t tokens, k rows per token, n rows of the table, v row width, p = t k pairs, u rows of a chunk, q pools.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from hybridlm_kernels.jax_compat import vary, varying_axes
from hybridlm_kernels.memory_lookup.sorted_pairs import sort_pairs

T = TypeVar("T")

CHUNK_ELEMENTS = 2**22
"""Float32 numbers in one array [chunk, v], 16 MiB of them; a handful of such arrays live at once."""


def apply_row_gradients(
    state: T,
    indices: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    vectors: Float[Array, "t v"],
    update: Callable[[T, Float[Array, "u v"], Int[Array, " u"]], T],
    *,
    chunk: int | None = None,
) -> T:
    """`state` after `update` has seen the gradient of every used row r, the sum over i_tk = r of w_tk vectors_t.

    `state` is a pytree of arrays with leading axis n: a table and what its optimizer keeps of each row. A pair (t, k)
    whose index is outside [0, n) is skipped. `update(rows, grads, ids)` is given the state of some rows, their whole
    gradients in float32 (float64 for float64 vectors) and their numbers, and returns their new state. It sees each
    used row exactly once; other rows are not touched. Ids >= n are padding: no rows, with gradients of 0, and what is
    returned for them is dropped.

    The state is written in place where it is donated. Temporaries: the sorted pairs, and a few arrays [chunk + 1, v],
    with a chunk of `CHUNK_ELEMENTS` / v pairs when it is not given. How many chunks there are depends on `indices`
    alone, so devices with other columns of the same rows may sum over each other in `update`.

    Every device updates the rows that it holds: with operands that are sharded, call it inside a `jax.shard_map`.
    """
    leaves = jax.tree.leaves(state)
    num_rows = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(num_rows) != 1 or None in num_rows:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        raise ValueError(f"state: shapes {shapes or 'of nothing'} must all begin with the same number of rows")

    def change(state: T, ids: Array, grads: Array) -> T:
        def read(array: Array) -> Array:
            # Held apart: XLA on TPU would fuse the read into the write, and then copy the whole table for every chunk.
            return lax.optimization_barrier(array.at[ids].get(mode="clip"))

        def write(array: Array, new: Array) -> Array:
            new = new.astype(array.dtype)
            return array.at[ids].set(new, mode="drop", indices_are_sorted=True, unique_indices=True)

        return jax.tree.map(write, state, update(jax.tree.map(read, state), grads, ids))

    return _fold(leaves[0].shape[0], indices, weights, vectors, change, state, chunk)


def squared_row_gradients(
    num_rows: int,
    indices: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    vectors: Float[Array, "t v"],
    *,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """The sum of the squares of all gradients that `apply_row_gradients` hands over; a second pass over the pairs."""
    zero = vary(jnp.zeros((), _sum_dtype(vectors)), _axes(indices, weights, vectors))

    def add(total: Array, _: Array, grads: Array) -> Array:
        return total + jnp.sum(grads * grads)

    return _fold(num_rows, indices, weights, vectors, add, zero, chunk)


def _fold(
    num_rows: int,
    indices: Array,
    weights: Array,
    vectors: Array,
    step: Callable[[T, Array, Array], T],
    carry: T,
    chunk: int | None,
) -> T:
    """`carry = step(carry, ids [chunk + 1], grads [chunk + 1, v])` over chunks of pairs, ids as in `update` above."""
    _check(indices, weights, vectors)
    (num_tokens, k), width = indices.shape, vectors.shape[1]
    if chunk is None:
        chunk = max(CHUNK_ELEMENTS // width, 256)
    chunk = min(chunk, num_tokens * k + 1)
    pairs = sort_pairs(indices.astype(jnp.int32), weights.astype(_sum_dtype(vectors)), num_rows)
    # At least one pair of no row stands at the end: it completes the last row.
    num_chunks = jnp.where(pairs.num_inside > 0, pairs.num_inside // chunk + 1, 0)
    padding = -pairs.row.size % chunk or chunk
    rows = jnp.pad(pairs.row, (0, padding), constant_values=num_rows)
    tokens, weight = (jnp.pad(x, (0, padding)) for x in (pairs.pair // k, pairs.weight))
    padding_ids = num_rows + jnp.arange(chunk + 1, dtype=jnp.int32)  # distinct and in order, as scatters are told

    def sum_chunk(loop: tuple[Array, Array, Array, T]) -> tuple[Array, Array, Array, T]:
        i, row, incomplete, carry = loop
        row_of_pair, token, w = (lax.dynamic_slice(x, (i * chunk,), (chunk,)) for x in (rows, tokens, weight))
        slot = jnp.cumsum(jnp.diff(row_of_pair, prepend=row) != 0, dtype=jnp.int32)  # 0: the row of the chunk before
        weighted = w[:, None] * vectors.at[token].get(mode="promise_in_bounds").astype(w.dtype)
        sums = jax.ops.segment_sum(weighted, slot, chunk + 1, indices_are_sorted=True, mode="promise_in_bounds")
        sums = sums.at[0].add(incomplete)
        ids = padding_ids.at[0].set(row[0]).at[slot].set(row_of_pair, indices_are_sorted=True)
        last = slot[-1]  # its pairs may go on in the next chunk
        complete = jnp.arange(chunk + 1) < last
        carry = step(carry, jnp.where(complete, ids, padding_ids), jnp.where(complete[:, None], sums, 0))
        return i + 1, row_of_pair[-1:], lax.dynamic_index_in_dim(sums, last, keepdims=False), carry

    axes = _axes(indices)
    first = (
        vary(jnp.zeros((), jnp.int32), axes),
        rows[:1],
        vary(jnp.zeros(width, _sum_dtype(vectors)), _axes(indices, weights, vectors)),
        carry,
    )
    return lax.while_loop(lambda loop: loop[0] < num_chunks, sum_chunk, first)[-1]


class RowUsage(NamedTuple):
    """Sums over rows from which `usage_metrics` are made, per pool. Those of devices with other rows simply add up."""

    touched: Float[Array, " q"]
    """Rows that some pair uses."""
    total: Float[Array, " q"]
    """sum_r s_r, where s_r is the sum of |w_tk| over the pairs of row r."""
    entropy: Float[Array, " q"]
    """sum_r s_r log s_r."""


def row_usage(
    indices: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    num_rows: int,
    num_pools: int = 1,
    *,
    first_row: Int[Array, ""] | int = 0,
    num_local: int | None = None,
) -> RowUsage:
    """How the rows of a table are used, of which each pool has `num_rows / num_pools`, one pool after the other.

    Of a device that holds `num_local` rows from `first_row` on, from which `indices` are counted; the results are to be
    summed over the devices with other rows. Indices outside are skipped. Compiled for TPU together with
    `apply_row_gradients` of the same indices and weights, it shares their sort.
    """
    if num_rows % num_pools:
        raise ValueError(f"num_pools={num_pools}: must divide num_rows={num_rows}")
    num_local = num_rows if num_local is None else num_local
    pairs = sort_pairs(indices.astype(jnp.int32), weights.astype(jnp.float32), num_local)
    # All held: XLA merges only equal sorts, and would first drop the operand that is not used here.
    rows, _, weight = lax.optimization_barrier((pairs.row, pairs.pair, pairs.weight))
    s, distance = jnp.abs(weight), 1
    while distance < rows.size:  # the sum over the pairs of the same row before and at each pair, by doubling
        same = rows == _shifted(rows, distance, -1)
        s, distance = s + jnp.where(same, _shifted(s, distance, 0), 0), 2 * distance
    last = jnp.diff(rows, append=-1) != 0  # there s is that of the row
    edges = jnp.arange(num_pools + 1) * (num_rows // num_pools) - first_row
    edges = jnp.searchsorted(rows, jnp.clip(edges, 0, num_local))

    def of_pools(terms: Array) -> Array:
        # Prefix sums are added up as a tree: a scatter of 262,144 terms into few pools was 0.2% off in float32.
        before = jnp.pad(jnp.cumsum(jnp.where(last, terms, 0)), (1, 0))[edges]
        return jnp.diff(before).astype(jnp.float32)

    return RowUsage(of_pools(jnp.ones_like(rows)), of_pools(s), of_pools(jax.scipy.special.xlogy(s, s)))


def _shifted(x: Array, distance: int, fill: int) -> Array:
    return jnp.pad(x, (distance, 0), constant_values=fill)[: x.size]


def usage_metrics(usage: RowUsage, rows_per_pool: int) -> tuple[Float[Array, " q"], Float[Array, " q"]]:
    """The share of a pool's rows that are used, and KL(z || uniform) = log n + sum_r z_r log z_r for z_r = s_r / sum s.

    0 for rows used alike, log n where one row has all (Lample et al., 2019, arXiv:1907.05242, section 4.4); log n too
    for a pool that nothing uses.
    """
    total = jnp.where(usage.total > 0, usage.total, 1)
    divergence = math.log(rows_per_pool) + usage.entropy / total - jnp.log(total)
    return usage.touched / rows_per_pool, divergence


def _check(indices: Array, weights: Array, vectors: Array) -> None:
    """Raises ValueError that names the operand that is wrong or does not fit the others."""
    if indices.ndim != 2 or 0 in indices.shape:
        raise ValueError(f"indices: shape {indices.shape} must be [tokens, rows per token], with at least one of each")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices: dtype {indices.dtype.name} must be an integer type")
    if weights.shape != indices.shape:
        raise ValueError(f"weights: shape {weights.shape} must be [tokens, rows per token] = {indices.shape}")
    if vectors.ndim != 2 or vectors.shape[0] != indices.shape[0] or vectors.size == 0:
        raise ValueError(f"vectors: shape {vectors.shape} must be [tokens = {indices.shape[0]}, row width]")


def _sum_dtype(vectors: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, vectors.dtype)


def _axes(*arrays: Array) -> frozenset[str]:
    """The manual mesh axes over which any of the arrays differs between devices."""
    return frozenset().union(*(varying_axes(array) for array in arrays))
