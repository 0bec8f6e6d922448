"""Lookup and scores in plain JAX: a loop over chunks of tokens, and for gradients one over chunks of sorted pairs, so
that few of the rows are ever in memory twice.

Letters: t tokens, k rows per token, n rows, v row width, p pairs, c tokens or pairs of a chunk, j rows of a group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.memory_lookup.sorted_pairs import in_order_of_pairs, sort_pairs
from hybridlm_kernels.target import target_of

BLOCK = 2**22
"""Numbers of the rows of a chunk: 16 MiB in float32."""
TOKENS, GROUP = 64, 16
"""On CPU a chunk is so many tokens and takes so many rows of each at once, which XLA reads, scales and adds in one
loop: half of the time of a sum over gathered rows."""
PAIRS = 1024
"""Of a chunk of sorted pairs; 64 to 256 take CPUs 1.7 times as long."""


@jax.jit
def lookup(table: Array, indices: Array, weights: Array) -> Array:
    """y [t, v] in the weights' dtype."""
    return lax.platform_dependent(table, indices, weights, cpu=_lookup_grouped, default=_lookup_at_once)


@jax.jit
def scores(table: Array, indices: Array, x: Array) -> Array:
    """s [t, k] in x's dtype."""

    def chunk(indices: Array, x: Array) -> Array:
        rows = _rows(table, indices, x)
        return jnp.sum(rows * x.astype(rows.dtype)[:, None], axis=2).astype(x.dtype)

    return _over_chunks(chunk, _chunk_size(table, indices), indices, x)


@jax.jit
def gradients(table: Array, indices: Array, weights: Array, vectors: Array) -> tuple[Array, Array]:
    """The scores of `vectors` [t, v], and for every row of the table the sum of w_tk vectors_t over its pairs."""
    (num_rows, *row_shape), k = table.shape, indices.shape[1]
    wide = jnp.result_type(table.dtype, weights.dtype, vectors.dtype, jnp.float32)
    size = min(PAIRS, indices.size)
    pairs = sort_pairs(indices, weights, num_rows, size)
    wide_vectors = vectors.astype(wide)

    def chunk(i: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        """Writes the sum of the chunk's last row too: the next chunk writes it again where the row goes on there."""
        dtable, products, last_row, last_sum = carry
        row, pair, weight = (lax.dynamic_slice_in_dim(a, i * size, size) for a in pairs[:3])
        vector = wide_vectors.at[pair // k].get(mode="clip")  # c v
        product = jnp.sum(_rows(table, row, vector) * vector, axis=1)
        starts = row != jnp.concatenate([last_row[None], row[:-1]])
        segment = jnp.cumsum(starts) - starts[0]
        weighted = weight.astype(wide)[:, None] * vector
        sums = jnp.zeros_like(weighted).at[0].set(jnp.where(starts[0], 0, last_sum))
        sums = sums.at[segment].add(weighted, indices_are_sorted=True)
        # The row of each segment; past the last one, numbers that are outside and ascend.
        rows = (num_rows + 1 + jnp.arange(size, dtype=jnp.int32)).at[segment].set(row)
        written = _bits(sums.astype(table.dtype)).reshape(size, *row_shape)
        dtable = dtable.at[rows].set(written, mode="drop", indices_are_sorted=True, unique_indices=True)
        products = lax.dynamic_update_slice_in_dim(products, product, i * size, 0)
        return dtable, products, row[-1], sums[segment[-1]]

    carry = (
        jnp.zeros_like(_bits(table)),
        jnp.zeros(pairs.row.shape, wide),
        jnp.int32(-1),
        jnp.zeros(vectors.shape[1], wide),
    )
    *carry, _ = align_varying(*carry, table)
    dtable, products, _, _ = lax.fori_loop(0, -(-pairs.num_inside // size), chunk, tuple(carry))
    return in_order_of_pairs(products, pairs, indices.shape).astype(vectors.dtype), _from_bits(dtable, table.dtype)


def _lookup_at_once(table: Array, indices: Array, weights: Array) -> Array:
    def chunk(indices: Array, weights: Array) -> Array:
        rows = _rows(table, indices, weights)
        return jnp.sum(rows * _inside(table, indices, weights)[..., None], axis=1).astype(weights.dtype)

    return _over_chunks(chunk, _chunk_size(table, indices), indices, weights)


def _lookup_grouped(table: Array, indices: Array, weights: Array) -> Array:
    def add_group(y: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        for index, weight in zip(*group, strict=True):
            y = y + _rows(table, index, weights) * weight.astype(y.dtype)[:, None]
        return y, None

    def chunk(indices: Array, weights: Array) -> Array:
        index, weight = (a.T.reshape(-1, group, a.shape[0]) for a in (indices, _inside(table, indices, weights)))
        y = jnp.zeros((indices.shape[0], table.size // table.shape[0]), weight.dtype)
        y, _, _ = align_varying(y, table, indices)
        y, _ = lax.scan(add_group, y, (index, weight))  # of [k / j, j, c]
        return y.astype(weights.dtype)

    k = indices.shape[1]
    group = min(GROUP, k)
    indices = jnp.pad(indices, ((0, 0), (0, -k % group)), constant_values=-1)
    weights = jnp.pad(weights, ((0, 0), (0, -k % group)))
    return _over_chunks(chunk, TOKENS, indices, weights)


def _inside(table: Array, indices: Array, weights: Array) -> Array:
    """The weights in float32 or wider, 0 where there is no row."""
    wide = jnp.result_type(table.dtype, weights.dtype, jnp.float32)
    return jnp.where((indices >= 0) & (indices < table.shape[0]), weights, 0).astype(wide)


def _rows(table: Array, indices: Array, like: Array) -> Array:
    """The rows [..., v] in float32 or wider, 0 where there is none."""
    num_rows = table.shape[0]
    inside = (indices >= 0) & (indices < num_rows)
    wide = jnp.result_type(table.dtype, like.dtype, jnp.float32)
    # Reshaped after reading, since on TPU another shape would be another layout of the whole table.
    rows = _bits(table).at[jnp.where(inside, indices, 0)].get(mode="promise_in_bounds").reshape(*indices.shape, -1)
    return jnp.where(inside[..., None], _from_bits(rows, table.dtype).astype(wide), 0)


def _bits(array: Array) -> Array:
    """On CPU, numbers of 16 bits as integers: of a bfloat16 array XLA converts all there wherever one row is read or
    written, which is once per chunk. On TPU it would be integers that are a copy."""
    on_cpu = target_of((array,)).platform == "cpu"
    return lax.bitcast_convert_type(array, jnp.uint16) if on_cpu and array.dtype.itemsize == 2 else array


def _from_bits(array: Array, dtype: jnp.dtype) -> Array:
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


def _chunk_size(table: Array, indices: Array) -> int:
    return max(1, BLOCK // (indices.shape[1] * (table.size // table.shape[0])))


def _over_chunks(function: Callable[[Array, Array], Array], size: int, indices: Array, other: Array) -> Array:
    """`function` of chunks of `size` tokens of both; the last one is filled up with tokens that read nothing."""
    t = indices.shape[0]
    if t <= size:
        return function(indices, other)
    num = -(-t // size)
    indices = jnp.pad(indices, ((0, num * size - t), (0, 0)), constant_values=-1)
    other = jnp.pad(other, ((0, num * size - t), (0, 0)))
    chunks = indices.reshape(num, size, -1), other.reshape(num, size, -1)
    _, y = lax.scan(lambda _, chunk: (None, function(*chunk)), None, chunks)
    return y.reshape(num * size, -1)[:t]
