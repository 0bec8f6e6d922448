"""Grouped matrix multiplication on Hopper GPUs (Pallas' Mosaic GPU backend).

Letters: m rows, k inputs, n outputs, g groups.

`gpu_rows` has y and dx, one kernel that reads the matrices as they are or transposed; `gpu_weights` has dw. Both take
groups of any size as they lie in memory, through `gpu_stages`. Products are of 16-bit operands, summed in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hybridlm_kernels.grouped_matmul import gpu_rows, gpu_weights
from hybridlm_kernels.grouped_matmul.gpu_stages import ALIGNMENT, BLOCK

DTYPES = ("bfloat16", "float16")
Operand = Array | jax.ShapeDtypeStruct


def supports(x: Operand, w: Operand, group_sizes: Operand, *, compute_capability: float | None) -> str | None:
    """Why x [m, k] and w [g, k, n] cannot be served on a device of this compute capability, or None."""
    if compute_capability is None or not 9.0 <= compute_capability < 10.0:
        return "needs a Hopper GPU (compute capability 9.0): its warpgroup matrix products"
    for operand in (x, w):
        if operand.dtype.name not in DTYPES:
            return f"serves {' and '.join(DTYPES)} operands, not {operand.dtype.name}"
    if x.dtype != w.dtype:
        return f"needs operands of one dtype, not {x.dtype.name} and {w.dtype.name}"
    for name, dim in (("inputs", w.shape[1]), ("outputs", w.shape[2])):
        if dim % BLOCK:
            return f"needs a multiple of {BLOCK} {name}, not {dim}"
    return None


def forward(x: Array, w: Array, group_sizes: Array) -> Array:
    """y [m, n] in the dtype of x [m, k]; w [g, k, n]."""
    return gpu_rows.multiply(filled_up(x), w, group_sizes, transposed=False)[: x.shape[0]]


def transposed(dy: Array, w: Array, group_sizes: Array) -> Array:
    """dx [m, k] in the dtype of dy [m, n]; w [g, k, n] is read as it is."""
    return gpu_rows.multiply(filled_up(dy), w, group_sizes, transposed=True)[: dy.shape[0]]


def weights(x: Array, dy: Array, group_sizes: Array, dtype: Any) -> Array:
    """dw [g, k, n] of x [m, k] and dy [m, n], rounded once from the sums."""
    stored = dtype if jnp.dtype(dtype).itemsize <= 4 else jnp.float32
    return gpu_weights.gradients(filled_up(x), filled_up(dy), group_sizes, stored).astype(dtype)


def filled_up(x: Array) -> Array:
    """With as many rows as the copy engine needs, at no cost where it has them; the new ones belong to no group."""
    missing = max(-x.shape[0] % ALIGNMENT, BLOCK - x.shape[0])
    return jnp.pad(x, ((0, missing), (0, 0))) if missing > 0 else x
