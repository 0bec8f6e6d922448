"""grouped_matmul as Pallas kernels for TPU: one for rows times matrices, y and dx, and one for the weights' gradient.

A step of the grid is a visit of a tile of rows by a group (visits.py). The list of visits is read before the blocks are
fetched: a matrix stays in VMEM for all visits by its group, rows and sums for all that follow each other.
Letters: m rows, k inputs, n outputs, g groups, b rows of a tile, v visits.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridlm_kernels.grouped_matmul import tpu_blocks
from hybridlm_kernels.grouped_matmul.visits import Visits, of_every_group, of_every_tile
from hybridlm_kernels.jax_compat import out_struct
from hybridlm_kernels.target import target_of

DTYPES = ("bfloat16", "float32")


def supports(x: Any, w: Any, group_sizes: Any) -> str | None:
    """Why the kernels cannot serve; None where they can."""
    if str(x.dtype) not in DTYPES:
        return f"takes {', '.join(DTYPES)}, not {x.dtype}"
    for name, size in (("inputs", w.shape[1]), ("outputs", w.shape[2])):
        if size % tpu_blocks.LANES:
            return f"{size} {name}: must be a multiple of {tpu_blocks.LANES}"
    return None


@partial(jax.jit, static_argnames="interpret")
def forward(x: Array, w: Array, group_sizes: Array, *, interpret: Any = False) -> Array:
    """y [m, n] in x's dtype."""
    return _products(x, w, group_sizes, over=1, interpret=interpret)


@partial(jax.jit, static_argnames="interpret")
def transposed(dy: Array, w: Array, group_sizes: Array, *, interpret: Any = False) -> Array:
    """dx [m, k] in dy's dtype."""
    return _products(dy, w, group_sizes, over=2, interpret=interpret)


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def weights(x: Array, dy: Array, group_sizes: Array, dtype: Any, *, interpret: Any = False) -> Array:
    """dw [g, k, n], rounded once from the sums."""
    (m, k), n, g = x.shape, dy.shape[1], group_sizes.shape[0]
    dw = out_struct((g, k, n), dtype, x, dy, group_sizes)
    sizes = tpu_blocks.of_weights(m, k, n, g, x.dtype.itemsize, dw.dtype.itemsize, target_of((x,)).kind)
    b, bk, bn = sizes.rows, sizes.inputs, sizes.outputs
    visits = of_every_group(group_sizes, m, b)
    return pl.pallas_call(
        _weights_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(k, bk), pl.cdiv(n, bn), visits.tile.size),
            in_specs=[
                pl.BlockSpec((b, bk), lambda p, q, i, *v: (Visits(*v).tile[i], p)),
                pl.BlockSpec((b, bn), lambda p, q, i, *v: (Visits(*v).tile[i], q)),
            ],
            out_specs=pl.BlockSpec((None, bk, bn), lambda p, q, i, *v: (Visits(*v).group[i], p, q)),
            scratch_shapes=[] if dw.dtype == jnp.float32 else [pltpu.VMEM((bk, bn), jnp.float32)],
        ),
        out_shape=dw,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(m * k * n, x, dy, dw),
        interpret=interpret,
        name="grouped_matmul_weights",
    )(*visits, x, dy)


def _cost(multiplications: int, *arrays: Any) -> pl.CostEstimate:
    """What XLA counts for the kernel: every row belonging to a group, every array moved once."""
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
    return pl.CostEstimate(flops=2 * multiplications, transcendentals=0, bytes_accessed=moved)


def _weights_kernel(
    tile: Any, group: Any, first: Any, end: Any, x: Any, dy: Any, dw: Any, narrowed: Any = None
) -> None:
    """`narrowed` holds the sums where dw itself is too narrow for them."""
    sums = dw if narrowed is None else narrowed
    i, last = pl.program_id(2), pl.num_programs(2) - 1
    starts = (i == 0) | (group[i] != group[jnp.maximum(i - 1, 0)])

    @pl.when((end[i] > first[i]) | starts)
    def _() -> None:
        a, b = (_inside(rows, first[i], end[i]) for rows in (x, dy))
        sums[...] = jnp.where(starts, 0.0, sums[...]) + _dot(a, b, (0, 0))

    if narrowed is not None:

        @pl.when((i == last) | (group[i] != group[jnp.minimum(i + 1, last)]))
        def _() -> None:
            dw[...] = sums[...].astype(dw.dtype)


def _products(x: Array, w: Array, group_sizes: Array, *, over: int, interpret: Any) -> Array:
    """The product of every group's rows with its matrix, over axis `over` of w; k is that axis and n the other."""
    m, k = x.shape
    n = w.shape[3 - over]
    sizes = tpu_blocks.of_products(m, k, n, w.shape[0], x.dtype.itemsize, target_of((x,)).kind)
    b, bk, bn = sizes.rows, sizes.inputs, sizes.outputs
    visits = of_every_tile(group_sizes, m, b)
    if over == 1:
        matrix = pl.BlockSpec((None, bk, bn), lambda q, i, p, *v: (Visits(*v).group[i], p, q))
    else:
        matrix = pl.BlockSpec((None, bn, bk), lambda q, i, p, *v: (Visits(*v).group[i], q, p))
    y = out_struct((m, n), x.dtype, x, w, group_sizes)
    return pl.pallas_call(
        partial(_products_kernel, over=over),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(n, bn), visits.tile.size, k // bk),
            in_specs=[pl.BlockSpec((b, bk), lambda q, i, p, *v: (Visits(*v).tile[i], p)), matrix],
            out_specs=pl.BlockSpec((b, bn), lambda q, i, p, *v: (Visits(*v).tile[i], q)),
            scratch_shapes=[] if bk == k else [pltpu.VMEM((b, bn), jnp.float32)],
        ),
        out_shape=y,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(m * k * n, x, w, y),
        interpret=interpret,
        name="grouped_matmul" if over == 1 else "grouped_matmul_transposed",
    )(*visits, x, w)


def _products_kernel(
    tile: Any, group: Any, first: Any, end: Any, x: Any, w: Any, y: Any, sums: Any = None, *, over: int
) -> None:
    """`sums` hold the product so far where k is cut."""
    i, p = pl.program_id(1), pl.program_id(2)
    starts = (i == 0) | (tile[i] != tile[jnp.maximum(i - 1, 0)])

    @pl.when(end[i] > first[i])
    def _() -> None:
        product = _dot(x[...], w[...], (1, over - 1))
        if sums is not None:
            product += jnp.where(p == 0, 0.0, sums[...])
            sums[...] = product

        @pl.when(p == pl.num_programs(2) - 1)
        def _() -> None:
            others = jnp.where(starts, 0, y[...])
            y[...] = jnp.where(_is_inside(y, first[i], end[i]), product.astype(y.dtype), others)

    @pl.when((end[i] == first[i]) & starts)
    def _() -> None:
        y[...] = jnp.zeros_like(y)


def _inside(rows: Any, first: Array, end: Array) -> Array:
    """Zeros in the rows of others, which may hold anything."""
    return jnp.where(_is_inside(rows, first, end), rows[...], 0)


def _is_inside(rows: Any, first: Array, end: Array) -> Array:
    row = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return (row >= first) & (row < end)


def _dot(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    precision = "highest" if a.dtype == jnp.float32 else "default"
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
