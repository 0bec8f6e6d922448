"""Lookup and scores as Pallas kernels for TPU: single rows are copied from HBM and used as they arrive.

The table is [n, a, 128], so that a row is whole tiles and lies in one piece; of [n, v] a row is scattered over as many
places as it has 128 columns. Rows are read in groups of one token: XLA sorts every token's rows first, so that those
that are not here come last and groups of nothing else are left out.
Letters: t tokens, k rows per token, n rows, v row width, a tiles of a row, b tokens of a step, p pairs of a step.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridlm_kernels.jax_compat import out_struct
from hybridlm_kernels.memory_lookup import tpu_gradients
from hybridlm_kernels.memory_lookup.token_rows import TokenRows, in_order_of_positions, positions
from hybridlm_kernels.memory_lookup.tpu_rows import (
    GROUP,
    LANES,
    Ref,
    Ring,
    ring_scratch,
    row_bytes,
    spread_over_lanes,
    sum_in_pairs,
    sum_over_lanes,
)

DTYPES = ("bfloat16", "float32")
PAIRS = 2048
"""Of a step, about: their rows and weights are in SMEM, their scores in VMEM."""
TOKENS = 16
"""The tokens of a step are a multiple of this, so that its pairs fill whole tiles."""
MOST_ROWS = 512
MOST_BYTES = 2**15
"""Of a row: what is under way and a chunk of sorted pairs fit in VMEM."""


def supports(table: Any, indices: Any, other: Any) -> str | None:
    """Why the kernels cannot serve; None where they can."""
    for operand in (table, other):
        if str(operand.dtype) not in DTYPES:
            return f"takes {', '.join(DTYPES)}, not {operand.dtype}"
    if len(table.shape) != 3 or table.shape[2] != LANES:
        return f"reads tables [rows, tiles, {LANES}], whose rows lie in one piece, not {tuple(table.shape)}"
    tiles, fewest = table.shape[1], 4 // table.dtype.itemsize
    if tiles % 8 and tiles not in (fewest, 2, 4):
        few = ", ".join(str(size) for size in (1, 2, 4) if size >= fewest)
        return f"reads rows of {few} or a multiple of 8 tiles; of {tiles} the compiler would first copy the whole table"
    if row_bytes(table.shape[1:], other.dtype) > MOST_BYTES or row_bytes(table.shape[1:], table.dtype) > MOST_BYTES:
        return f"reads rows of at most {MOST_BYTES} bytes"
    if indices.shape[1] > MOST_ROWS:
        return f"takes at most {MOST_ROWS} rows per token, not {indices.shape[1]}"
    return None


@partial(jax.jit, static_argnames="interpret")
def lookup(table: Array, indices: Array, weights: Array, *, interpret: Any = False) -> Array:
    """y [t, v] in the weights' dtype."""
    t, row = indices.shape[0], table.shape[1:]
    steps = Steps.of(indices, weights.astype(jnp.float32), table.shape[0])
    pairs = steps.rows.shape[2]
    used = jnp.where(steps.tokens.inside, steps.tokens.others, 0).reshape(steps.num, pairs // LANES, LANES)
    y = pl.pallas_call(
        partial(_lookup_kernel, num_tokens=steps.num_tokens),
        grid=(steps.num,),
        in_specs=[_scalars(steps.rows), _tiles(pairs), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((steps.num_tokens, *row), lambda i: (i, 0, 0)),
        out_shape=out_struct((t, *row), weights.dtype, table, indices, weights),
        scratch_shapes=[
            _group_list(steps.rows),
            *ring_scratch(row, table.dtype),
            pltpu.VMEM((pairs, LANES), jnp.float32),
        ],
        compiler_params=_PARAMS,
        cost_estimate=_cost(table, indices, t * (table.size // table.shape[0]) * weights.dtype.itemsize),
        interpret=interpret,
        name="memory_lookup",
    )(steps.rows, used, table)
    return y.reshape(t, -1)


@partial(jax.jit, static_argnames="interpret")
def scores(table: Array, indices: Array, x: Array, *, interpret: Any = False) -> Array:
    """s [t, k] in x's dtype."""
    (t, k), row = indices.shape, table.shape[1:]
    steps = Steps.of(indices, positions(indices), table.shape[0])
    pairs = steps.rows.shape[2]
    s = pl.pallas_call(
        partial(_scores_kernel, num_tokens=steps.num_tokens),
        grid=(steps.num,),
        in_specs=[
            _scalars(steps.rows),
            pl.BlockSpec((steps.num_tokens, *row), lambda i: (i, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=_tiles(pairs),
        out_shape=out_struct((steps.num, pairs // LANES, LANES), jnp.float32, table, indices, x),
        scratch_shapes=[
            _group_list(steps.rows),
            *ring_scratch(row, table.dtype),
            pltpu.VMEM((pairs, LANES), jnp.float32),
        ],
        compiler_params=_PARAMS,
        cost_estimate=_cost(table, indices, x.size * x.dtype.itemsize),
        interpret=interpret,
        name="memory_scores",
    )(steps.rows, x.reshape(t, *row), table)
    s = s.reshape(steps.tokens.rows.shape)
    return in_order_of_positions(s, steps.tokens, k)[:t].astype(x.dtype)


gradients = tpu_gradients.gradients

# The kernels check what they read themselves; the compiler's own checks of each copy take twice its time.
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",), disable_bounds_checks=True)


class Steps(NamedTuple):
    """The tokens of each step of the grid, and their rows [t, f] filled up to whole steps."""

    num_tokens: int
    """Of a step."""
    num: int
    tokens: TokenRows

    @staticmethod
    def of(indices: Array, others: Array, num_rows: int) -> "Steps":
        """Of indices and others [t, k]."""
        t, k = indices.shape
        num_tokens = min(max(PAIRS // ((k + -k % GROUP) * TOKENS), 1) * TOKENS, t + -t % TOKENS)
        num = pl.cdiv(t, num_tokens)
        missing = ((0, num * num_tokens - t), (0, 0))
        indices, others = jnp.pad(indices, missing, constant_values=-1), jnp.pad(others, missing)
        return Steps(num_tokens, num, TokenRows.of(indices, others, num_rows, GROUP))

    @property
    def rows(self) -> Array:
        """[steps, 1, p]"""
        return self.tokens.rows.reshape(self.num, 1, -1)


def _scalars(array: Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, array.shape[2]), lambda i: (i, 0, 0), memory_space=pltpu.SMEM)


def _tiles(pairs: int) -> pl.BlockSpec:
    """One number for each pair of a step."""
    return pl.BlockSpec((None, pairs // LANES, LANES), lambda i: (i, 0, 0))


def _group_list(rows: Array) -> Any:
    return pltpu.SMEM((rows.shape[2] // GROUP,), jnp.int32)


def _cost(table: Array, indices: Array, others: int) -> pl.CostEstimate:
    """What XLA counts for the kernel: every pair reading a row."""
    numbers = indices.size * (table.size // table.shape[0])
    moved = numbers * table.dtype.itemsize + 4 * indices.size + others
    return pl.CostEstimate(flops=2 * numbers, transcendentals=0, bytes_accessed=moved)


def _list_groups(rows: Ref, groups: Ref) -> Array:
    """Writes the numbers of the groups that have a row, and returns how many there are."""

    def list_group(g: Array, count: Array) -> Array:
        groups[count] = g
        return count + (rows[0, g * GROUP] >= 0).astype(jnp.int32)

    return lax.fori_loop(0, groups.shape[0], list_group, jnp.int32(0), unroll=GROUP)


def _ring(rows: Ref, groups: Ref, table: Ref, buffer: Ref, arrived: Ref) -> Ring:
    return Ring(table, buffer, arrived, lambda i: rows.at[0, pl.ds(groups[i] * GROUP, GROUP)])


def _lookup_kernel(
    rows: Ref, weights: Ref, table: Ref, y: Ref, groups: Ref, buffer: Ref, arrived: Ref, spread: Ref, *, num_tokens: int
) -> None:
    count = _list_groups(rows, groups)
    groups_per_token = groups.shape[0] // num_tokens
    y[...] = jnp.zeros(y.shape, y.dtype)
    spread_over_lanes(weights, spread)

    def read(i: Array) -> tuple[Array, Array]:
        return lax.div(groups[i], groups_per_token), spread[pl.ds(pl.multiple_of(groups[i] * GROUP, GROUP), GROUP)]

    def use(values: tuple[Array, Array], row: list[Array], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """Writes what is summed up so far: the token's last group writes last."""
        (token, weight), (last, total) = values, carry
        added = sum_in_pairs([weight[j : j + 1] * row[j].astype(jnp.float32) for j in range(GROUP)])
        total = jnp.where(token == last, total, 0.0) + added
        y[token] = total.astype(y.dtype)
        return token, total

    ring = _ring(rows, groups, table, buffer, arrived)
    ring.for_each(count, read, use, (jnp.int32(-1), jnp.zeros(y.shape[1:], jnp.float32)))


def _scores_kernel(
    rows: Ref, x: Ref, table: Ref, s: Ref, groups: Ref, buffer: Ref, arrived: Ref, products: Ref, *, num_tokens: int
) -> None:
    """What is not written has no row, and is left out afterwards."""
    count = _list_groups(rows, groups)
    groups_per_token = groups.shape[0] // num_tokens

    def read(i: Array) -> tuple[Array, Array]:
        return groups[i], x[lax.div(groups[i], groups_per_token)].astype(jnp.float32)

    def use(values: tuple[Array, Array], row: list[Array], carry: None) -> None:
        number, vector = values
        product = jnp.stack(row).astype(jnp.float32) * vector
        products[pl.ds(pl.multiple_of(number * GROUP, GROUP), GROUP)] = jnp.sum(product, axis=1)

    _ring(rows, groups, table, buffer, arrived).for_each(count, read, use, None)
    sum_over_lanes(products, s)
