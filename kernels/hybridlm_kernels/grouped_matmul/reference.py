"""grouped_matmul by its definition: every group's matrix times all rows, masked. Letters: m rows, k inputs, n outputs,
g groups."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from hybridlm_kernels.grouped_matmul.visits import bounds


def forward(x: Array, w: Array, group_sizes: Array) -> Array:
    """y [m, n] in x's dtype."""
    wide = jnp.result_type(x.dtype, jnp.float32)
    y = jnp.zeros((x.shape[0], w.shape[2]), wide)
    for j, rows in enumerate(_masks(group_sizes, x.shape[0])):
        product = jnp.einsum("mk,kn->mn", x.astype(wide), w[j].astype(wide), precision="highest")
        y = jnp.where(rows, product, y)
    return y.astype(x.dtype)


def transposed(dy: Array, w: Array, group_sizes: Array) -> Array:
    """dx [m, k] in dy's dtype."""
    return forward(dy, jnp.swapaxes(w, 1, 2), group_sizes)


def weights(x: Array, dy: Array, group_sizes: Array, dtype: Any) -> Array:
    """dw [g, k, n], rounded once from the sums."""
    wide = jnp.result_type(x.dtype, jnp.float32)
    products = [
        jnp.einsum("mk,mn->kn", jnp.where(rows, x, 0).astype(wide), jnp.where(rows, dy, 0).astype(wide),
                   precision="highest")
        for rows in _masks(group_sizes, x.shape[0])
    ]  # fmt: skip
    return jnp.stack(products).astype(dtype)


def _masks(group_sizes: Array, num_rows: int) -> list[Array]:
    """For each group its rows, [m, 1]."""
    starts, ends = bounds(group_sizes, num_rows)
    row = jnp.arange(num_rows)[:, None]
    return [(row >= starts[j]) & (row < ends[j]) for j in range(group_sizes.shape[0])]
