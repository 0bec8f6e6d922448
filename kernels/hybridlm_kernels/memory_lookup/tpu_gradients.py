"""Both gradients of a lookup as one Pallas kernel for TPU, over pairs in the order of their rows.

A step of the grid takes a chunk of pairs. It brings each row that is used once, and of every pair its token's vector:
their inner product is the gradient of the weight. What the vectors of a row add up to stands in VMEM and is written
back once per chunk; a row that goes on in the next chunk is written again there, from the unrounded sum.
Letters: t tokens, k rows per token, n rows, v row width, a tiles of a row, s chunks, c pairs of a chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridlm_kernels.jax_compat import align_varying, out_struct
from hybridlm_kernels.memory_lookup.sorted_pairs import SortedPairs, in_order_of_pairs, sort_pairs
from hybridlm_kernels.memory_lookup.tpu_rows import (
    GROUP,
    LANES,
    Ref,
    Ring,
    ring_scratch,
    row_bytes,
    spread_over_lanes,
    sum_over_lanes,
)

PAIRS = 1024
CHUNK_BYTES = 2 * 2**20
"""Of the rows of a chunk, and as much of their sums."""


@partial(jax.jit, static_argnames="interpret")
def gradients(
    table: Array, indices: Array, weights: Array, vectors: Array, *, interpret: Any = False
) -> tuple[Array, Array]:
    """The scores of `vectors` [t, v], and for every row of the table the sum of w_tk vectors_t over its pairs."""
    (num_rows, *row), t = table.shape, indices.shape[0]
    size = _chunk_size(indices.size, tuple(row), table.dtype)
    pairs = sort_pairs(indices, weights.astype(jnp.float32), num_rows, size)
    chunks = Chunks.of(pairs, indices, num_rows, size)
    scalars = pl.BlockSpec((None, 1, size), lambda i, *_: (i, 0, 0), memory_space=pltpu.SMEM)
    numbers = pl.BlockSpec((None, size // LANES, LANES), lambda i, *_: (i, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    dtable, table = align_varying(jnp.zeros(table.shape, table.dtype), table)
    moved = (2 * table.dtype.itemsize + vectors.dtype.itemsize) * indices.size * (table.size // table.shape[0])
    dtable, products = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(chunks.counts.shape[1],),
            in_specs=[scalars, scalars, scalars, numbers, numbers, anywhere, anywhere, anywhere],
            out_specs=[anywhere, numbers],
            scratch_shapes=[
                *ring_scratch(tuple(row), vectors.dtype),
                pltpu.VMEM((size, *row), table.dtype),
                pltpu.VMEM((size, *row), table.dtype),
                pltpu.VMEM(tuple(row), jnp.float32),
                *[pltpu.VMEM((size, LANES), jnp.float32)] * 3,
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            out_struct(table.shape, table.dtype, table, indices, weights, vectors),
            out_struct(chunks.weights.shape, jnp.float32, table, indices, weights, vectors),
        ],
        input_output_aliases={8: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=4 * indices.size * (table.size // table.shape[0]), transcendentals=0, bytes_accessed=moved
        ),
        interpret=interpret,
        name="memory_lookup_gradients",
    )(*chunks, vectors.reshape(t, *row), table, dtable)
    products = jnp.where(pairs.row < num_rows, products.reshape(-1), 0)
    return in_order_of_pairs(products, pairs, indices.shape).astype(vectors.dtype), dtable


def _chunk_size(num_pairs: int, row: tuple[int, ...], dtype: Any) -> int:
    size = PAIRS
    while size > LANES and (size * row_bytes(row, dtype) > CHUNK_BYTES or size >= 2 * num_pairs):
        size //= 2
    return size


class Chunks(NamedTuple):
    """What the kernel is given of each chunk."""

    counts: Array
    """[2, s]: pairs that are in the table, and rows."""
    tokens: Array
    """[s, 1, c]"""
    slots: Array
    """[s, 1, c]: which of the chunk's rows a pair has."""
    rows: Array
    """[s, 1, c]: the chunk's rows, each once, then any that is in the table."""
    weights: Array
    """[s, c / 128, 128]"""
    starts: Array
    """[s, c / 128, 128]: 1 where a pair has another row than the one before."""

    @staticmethod
    def of(pairs: SortedPairs, indices: Array, num_rows: int, size: int) -> "Chunks":
        (t, k), row = indices.shape, pairs.row.reshape(-1, size)
        position = lax.broadcasted_iota(jnp.int32, row.shape, 1)
        before = jnp.concatenate([jnp.full(1, -1, jnp.int32), pairs.row[:-1]]).reshape(row.shape)
        starts = row != before
        first = starts | (position == 0)
        slots = jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1
        inside = row < num_rows
        num_slots = jnp.sum(first & inside, axis=1, dtype=jnp.int32)
        listed = lax.sort((jnp.where(first, position, size), row), num_keys=1, dimension=1)[1]
        listed = jnp.where(position < num_slots[:, None], listed, row[:, :1])
        counts = [jnp.sum(inside, axis=1, dtype=jnp.int32), num_slots]
        tokens = jnp.minimum(pairs.pair // k, t - 1).reshape(row.shape)
        tiles = (-1, size // LANES, LANES)
        return Chunks(
            jnp.stack(counts),
            tokens[:, None],
            slots[:, None],
            listed[:, None],
            pairs.weight.reshape(tiles),
            starts.astype(jnp.float32).reshape(tiles),
        )


def _kernel(
    counts: Ref, tokens: Ref, slots: Ref, listed: Ref, weights: Ref, starts: Ref, vectors: Ref, table: Ref, _: Ref,
    dtable: Ref, products: Ref,
    buffer: Ref, arrived: Ref, rows: Ref, sums: Ref, carried: Ref, weight: Ref, start: Ref, product: Ref, copied: Ref,
) -> None:  # fmt: skip
    i = pl.program_id(0)
    num_pairs, num_slots = counts[0, i], counts[1, i]

    def bring(slot: Array, j: int = 0) -> Any:
        return pltpu.make_async_copy(table.at[listed[0, slot + j]], rows.at[slot + j], copied.at[0])

    def write(slot: Array, j: int = 0) -> Any:
        return pltpu.make_async_copy(sums.at[slot + j], dtable.at[listed[0, slot + j]], copied.at[1])

    def read(g: Array) -> tuple[Array, list[Array], list[Array], Array, Array]:
        at = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
        slot = slots.at[0, pl.ds(g * GROUP, GROUP)]
        slot = [slot[j] for j in range(GROUP)]
        return g, slot, [rows[s].astype(jnp.float32) for s in slot], weight[at], start[at]

    def use(values: tuple[Array, list[Array], list[Array], Array, Array], vector: list[Array], total: Array) -> Array:
        """Writes what is summed up so far: the row's last pair writes last."""
        g, slot, row, scale, new = values
        inner = []
        for j in range(GROUP):
            wide = vector[j].astype(jnp.float32)
            total = jnp.where(new[j : j + 1] > 0, 0.0, total) + scale[j : j + 1] * wide
            sums[slot[j]] = total.astype(sums.dtype)
            inner.append(row[j] * wide)
        product[pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)] = jnp.sum(jnp.stack(inner), axis=1)
        return total

    @pl.when(num_pairs > 0)
    def _() -> None:
        _copies(num_slots, bring, lambda copy: copy.start())
        spread_over_lanes(weights, weight)
        spread_over_lanes(starts, start)
        _copies(num_slots, bring, lambda copy: copy.wait())
        ring = Ring(vectors, buffer, arrived, lambda g: tokens.at[0, pl.ds(g * GROUP, GROUP)])
        carried[...] = ring.for_each(pl.cdiv(num_pairs, GROUP), read, use, carried[...])
        _copies(num_slots, write, lambda copy: copy.start())
        sum_over_lanes(product, products)
        _copies(num_slots, write, lambda copy: copy.wait())


def _copies(count: Array, copy: Any, do: Any) -> None:
    """`do` for the copies 0 to `count`."""
    full = lax.div(count, GROUP)

    def group(g: Array, _: None) -> None:
        for j in range(GROUP):
            do(copy(g * GROUP, j))

    lax.fori_loop(0, full, group, None)
    lax.fori_loop(full * GROUP, count, lambda slot, _: do(copy(slot)), None)
