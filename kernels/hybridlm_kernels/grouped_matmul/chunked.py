"""grouped_matmul in plain JAX: a loop over groups, and within it over the tiles of rows that the group really has.

Letters: m rows, k inputs, n outputs, g groups, b rows of a tile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.grouped_matmul.visits import bounds
from hybridlm_kernels.jax_compat import align_varying

TILES = (256, 32)
"""For rows times a matrix a group is cut into tiles of the first size and its rest into tiles of the second, the last
of which it may not fill: twice the first size or half of the second were slower on CPU."""
SUMMED = (512, 256, 128, 64, 32)
"""For a sum over rows into tiles of the first size and one of the smallest size that holds the rest, since a sum
passes over the whole matrix at every tile."""


@jax.jit
def forward(x: Array, w: Array, group_sizes: Array) -> Array:
    """y [m, n] in x's dtype."""
    return _by_platform(partial(_rows_times, by=1), x, w, group_sizes).astype(x.dtype)


@jax.jit
def transposed(dy: Array, w: Array, group_sizes: Array) -> Array:
    """dx [m, k] in dy's dtype."""
    return _by_platform(partial(_rows_times, by=2), dy, w, group_sizes).astype(dy.dtype)


@partial(jax.jit, static_argnames="dtype")
def weights(x: Array, dy: Array, group_sizes: Array, dtype: Any) -> Array:
    """dw [g, k, n], rounded once from the sums."""
    return _by_platform(partial(_outer_products, dtype=dtype), x, dy, group_sizes)


def _by_platform(function: Callable[..., Array], a: Array, b: Array, group_sizes: Array) -> Array:
    """`function` of operands that are widened on CPU, where XLA converts whole arrays at every step of a loop."""
    wide = jnp.result_type(a.dtype, jnp.float32)

    def widened(a: Array, b: Array, group_sizes: Array) -> Array:
        return function(a.astype(wide), b.astype(wide), group_sizes)

    return lax.platform_dependent(a, b, group_sizes, cpu=widened, default=function)


def _rows_times(x: Array, w: Array, group_sizes: Array, *, by: int) -> Array:
    """The product of every group's rows with its matrix, over axis `by` of w; tiles are written in place."""
    m, n = x.shape[0], w.shape[3 - by]
    starts, ends = bounds(group_sizes, m)

    def group(j: Array, y: Array) -> Array:
        matrix = lax.dynamic_index_in_dim(w, j, keepdims=False)

        def step(size: int, start: Array, i: Array, y: Array) -> Array:
            first, inside = _place(start + i * size, ends[j], size, m)
            product = _dot(lax.dynamic_slice_in_dim(x, first, size), matrix, (1, by - 1))
            others = lax.dynamic_slice_in_dim(y, first, size)
            return lax.dynamic_update_slice_in_dim(y, jnp.where(inside, product, others), first, 0)

        large, small = (min(size, m) for size in TILES)
        full = (ends[j] - starts[j]) // large
        rest = starts[j] + full * large
        y = lax.fori_loop(0, full, partial(step, large, starts[j]), y)
        return lax.fori_loop(0, -((rest - ends[j]) // small), partial(step, small, rest), y)

    y, _ = align_varying(jnp.zeros((m, n), jnp.result_type(x.dtype, jnp.float32)), x)
    return lax.fori_loop(0, w.shape[0], group, y)


def _outer_products(x: Array, dy: Array, group_sizes: Array, *, dtype: Any) -> Array:
    """The sum over every group's rows of x_i dy_i^T."""
    m = x.shape[0]
    wide = jnp.result_type(x.dtype, jnp.float32)
    starts, ends = bounds(group_sizes, m)
    sizes = sorted({min(size, m) for size in SUMMED})

    def tile(size: int, wanted: Array, end: Array) -> Array:
        first, inside = _place(wanted, end, size, m)
        a, b = (jnp.where(inside, lax.dynamic_slice_in_dim(v, first, size), 0) for v in (x, dy))
        return _dot(a, b, (0, 0))

    def group(j: Array, dw: Array) -> Array:
        start, end = starts[j], ends[j]
        full = (end - start) // sizes[-1]
        rest = end - start - full * sizes[-1]
        smallest = sum((rest > size).astype(jnp.int32) for size in (0, *sizes[:-1]))
        branches = [lambda wanted, end: jnp.zeros_like(dw[0], wide), *(partial(tile, size) for size in sizes)]
        total = lax.switch(smallest, branches, start + full * sizes[-1], end)
        total = lax.fori_loop(0, full, lambda i, sum: sum + tile(sizes[-1], start + i * sizes[-1], end), total)
        return lax.dynamic_update_index_in_dim(dw, total.astype(dtype), j, 0)

    dw, _ = align_varying(jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), dtype), x)
    return lax.fori_loop(0, group_sizes.shape[0], group, dw)


def _place(wanted: Array, end: Array, size: int, num_rows: int) -> tuple[Array, Array]:
    """The first row of the tile that has the rows from `wanted` on, and which of them lie before `end`, [b, 1].

    A tile that would reach over the last row lies earlier, over rows which do not count.
    """
    first = jnp.minimum(wanted, num_rows - size)
    row = first + jnp.arange(size)[:, None]
    return first, (row >= wanted) & (row < end)


def _dot(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    wide = jnp.result_type(a.dtype, jnp.float32)
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision="highest", preferred_element_type=wide)
