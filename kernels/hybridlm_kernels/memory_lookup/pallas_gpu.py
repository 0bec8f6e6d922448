"""Lookup, scores and gradients on Hopper GPUs (Pallas' Mosaic GPU backend).

Letters: t tokens, k rows per token, f rows per token filled up to whole groups, n rows, v row width, p pairs, c columns
of a block, b blocks of columns.

A warpgroup reads rows straight into registers, a group of them at a time; with 16 warpgroups on a multiprocessor that
is 64 KiB under way and more. For lookup and scores it owns a token. For gradients it owns `ROWS` rows of the table,
whose pairs follow each other in the order of rows: it writes each of its rows once, with zeros where there is no pair,
so that nothing is added atomically. A row that very many pairs use is the work of one warpgroup.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.gpu_kernel import gpu_kernel
from hybridlm_kernels.memory_lookup.sorted_pairs import in_order_of_pairs, sort_pairs
from hybridlm_kernels.memory_lookup.token_rows import TokenRows, in_order_of_positions, positions

DTYPES = ("bfloat16", "float32")
WARPGROUP = 128
WIDEST = 512
"""Columns of a block: 4 numbers of each row in a thread."""
GROUP = 8
ROWS = 64
COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)

Ref = Any  # a reference of Pallas, which has no public type for all kinds of them


def supports(table: Any, indices: Any, other: Any, *, compute_capability: float | None) -> str | None:
    """Why the kernels cannot serve on a device of this compute capability; None where they can."""
    if compute_capability is None or compute_capability < 9.0:
        return "needs a Hopper GPU (compute capability 9.0)"
    for operand in (table, other):
        if str(operand.dtype) not in DTYPES:
            return f"takes {', '.join(DTYPES)}, not {operand.dtype}"
    width = math.prod(table.shape[1:])
    if width % WARPGROUP:
        return f"reads rows of a multiple of {WARPGROUP} numbers, not {width}"
    return None


def lookup(table: Array, indices: Array, weights: Array) -> Array:
    """y [t, v] in the weights' dtype."""
    t, flat = indices.shape[0], table.reshape(table.shape[0], -1)
    columns, blocks = _columns(flat)
    tokens = TokenRows.of(indices, weights.astype(jnp.float32), flat.shape[0], GROUP)
    used = jnp.where(tokens.inside, tokens.others, 0)

    def kernel(table: Ref, rows: Ref, used: Ref, counts: Ref, y: Ref) -> None:
        token, block = lax.axis_index("t"), lax.axis_index("b")
        at = pl.ds(block * columns, columns)

        def group(g: Array, total: Array) -> Array:
            first = token * tokens.rows.shape[1] + g * GROUP
            numbers = [rows[first + j] for j in range(GROUP)]
            loaded = [_load(table, number, at) for number in numbers]
            for j in range(GROUP):
                total = total + used[first + j] * loaded[j]
            return total

        total = lax.fori_loop(0, counts[token], group, _zeros(columns))
        y[token, at] = total.astype(y.dtype)

    out = jax.ShapeDtypeStruct((t, flat.shape[1]), weights.dtype)
    operands = flat, tokens.rows.reshape(-1), used.reshape(-1), _num_groups(tokens)
    return _launch("memory_lookup", kernel, out, (blocks, t), ("b", "t"))(*operands)


def scores(table: Array, indices: Array, x: Array) -> Array:
    """s [t, k] in x's dtype."""
    (t, k), flat = indices.shape, table.reshape(table.shape[0], -1)
    columns, blocks = _columns(flat)
    tokens = TokenRows.of(indices, positions(indices), flat.shape[0], GROUP)
    filled = tokens.rows.shape[1]

    def kernel(table: Ref, rows: Ref, x: Ref, counts: Ref, s: Ref) -> None:
        """What is not written has no row, and is left out afterwards."""
        token, block = lax.axis_index("t"), lax.axis_index("b")
        at = pl.ds(block * columns, columns)
        vector = _load(x, token, at)

        def group(g: Array, _: None) -> None:
            first = token * filled + g * GROUP
            numbers = [rows[first + j] for j in range(GROUP)]
            loaded = [_load(table, number, at) for number in numbers]
            for j in range(GROUP):
                s[block, first + j] = jnp.sum(loaded[j] * vector)

        lax.fori_loop(0, counts[token], group, None)

    out = jax.ShapeDtypeStruct((blocks, t * filled), jnp.float32)
    operands = flat, tokens.rows.reshape(-1), x, _num_groups(tokens)
    s = _launch("memory_scores", kernel, out, (blocks, t), ("b", "t"))(*operands)
    return in_order_of_positions(s.sum(0).reshape(t, filled), tokens, k).astype(x.dtype)


def gradients(table: Array, indices: Array, weights: Array, vectors: Array) -> tuple[Array, Array]:
    """The scores of `vectors` [t, v], and for every row of the table the sum of w_tk vectors_t over its pairs."""
    (t, k), flat = indices.shape, table.reshape(table.shape[0], -1)
    num_rows, width = flat.shape
    columns, blocks = _columns(flat)
    pairs = sort_pairs(indices, weights.astype(jnp.float32), num_rows)
    tokens = pairs.pair // k
    owners = pl.cdiv(num_rows, ROWS)
    bounds = jnp.searchsorted(pairs.row, jnp.minimum(jnp.arange(owners + 1) * ROWS, num_rows)).astype(jnp.int32)

    def kernel(
        table: Ref, vectors: Ref, rows: Ref, tokens: Ref, weights: Ref, bounds: Ref, dtable: Ref, products: Ref
    ) -> None:
        owner, block = lax.axis_index("n"), lax.axis_index("b")
        at = pl.ds(block * columns, columns)
        end = bounds[owner + 1]

        def one_row(i: Array, pair: Array) -> Array:
            row = owner * ROWS + i

            def goes_on(carry: tuple[Array, Array]) -> Array:
                return (carry[0] < end) & (rows[jnp.minimum(carry[0], rows.shape[0] - 1)] == row)

            def add(carry: tuple[Array, Array]) -> tuple[Array, Array]:
                pair, total = carry
                vector = _load(vectors, tokens[pair], at)
                products[block, pair] = jnp.sum(_load(table, row, at) * vector)
                return pair + 1, total + weights[pair] * vector

            pair, total = lax.while_loop(goes_on, add, (pair, _zeros(columns)))
            dtable[row, at] = total.astype(dtable.dtype)
            return pair

        # Inside a kernel, what is read varies over mesh axes and what is computed does not, as a carry must be.
        first = jnp.minimum(bounds[owner], end)
        lax.fori_loop(0, jnp.minimum(ROWS, num_rows - owner * ROWS), one_row, first)

    out = [
        jax.ShapeDtypeStruct((num_rows, width), table.dtype),
        jax.ShapeDtypeStruct((blocks, pairs.row.size), jnp.float32),
    ]
    launch = _launch("memory_lookup_gradients", kernel, out, (blocks, owners), ("b", "n"))
    dtable, products = launch(flat, vectors, pairs.row, tokens, pairs.weight, bounds)
    products = jnp.where(pairs.row < num_rows, products.sum(0), 0)
    return in_order_of_pairs(products, pairs, (t, k)).astype(vectors.dtype), dtable.reshape(table.shape)


def _columns(table: Array) -> tuple[int, int]:
    """Of a block, and how many blocks there are."""
    width = table.shape[1]
    columns = next(size for size in (WIDEST, WIDEST // 2, WARPGROUP) if width % size == 0)
    return columns, width // columns


def _layout(columns: int) -> Any:
    """Of a block in registers: each thread has consecutive numbers, whatever their dtype."""
    return plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // WARPGROUP)


def _load(array: Ref, row: Array, columns: Any) -> Array:
    return plgpu.layout_cast(array[row, columns], _layout(columns.size)).astype(jnp.float32)


def _zeros(columns: int) -> Array:
    return plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), _layout(columns))


def _num_groups(tokens: TokenRows) -> Array:
    """Of each token, [t], those that have a row."""
    return jnp.sum(tokens.rows[:, ::GROUP] >= 0, axis=1, dtype=jnp.int32)


def _launch(name: str, kernel: Any, out: Any, grid: tuple[int, int], names: tuple[str, str]) -> Any:
    return gpu_kernel(
        kernel, out_type=out, grid=grid, grid_names=names, compiler_params=COMPILER_PARAMS, kernel_name=name
    )
