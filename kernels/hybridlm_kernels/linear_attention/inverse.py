"""The inverse of a unit lower triangular matrix, which turns what tokens would write into what they do write.

Letters: m blocks, s rows of a block, c chunk.

Substitution in blocks of 16 and matmuls that join them. No power of the matrix is ever formed, as a Neumann series or a
Newton iteration would: with keys that resemble one another powers grow beyond what cancels again.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.jax_compat import align_varying

BASE = 16


@jax.custom_vjp
def inverse(lower: Array) -> Array:
    """(I + lower)^-1 of strictly lower triangular [..., c, c], c a power of two."""
    return _inverse(lower)


def _inverse(lower: Array) -> Array:
    c = lower.shape[-1]
    size = min(c, BASE)
    x = _substitute(_diagonal_blocks(lower, size))  # ... m s s
    while size < c:
        between = _diagonal_blocks(lower, 2 * size)[..., size:, :size]
        first, second = x[..., 0::2, :, :], x[..., 1::2, :, :]
        corner = -_dot(_dot(second, between), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        x = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return x[..., 0, :, :]


def _diagonal_blocks(x: Array, size: int) -> Array:
    """[..., c, c] -> [..., c / size, size, size]"""
    blocks = [x[..., i : i + size, i : i + size] for i in range(0, x.shape[-1], size)]
    return jnp.stack(blocks, axis=-3)


def _substitute(lower: Array) -> Array:
    """Row i of the inverse is e_i minus row i of `lower` times the rows before it."""
    size = lower.shape[-1]
    unit, lower = align_varying(jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape), lower)

    def one_row(i: Array, rows: Array) -> Array:
        weights = lax.dynamic_index_in_dim(lower, i, axis=-2, keepdims=False)[..., None]
        row = lax.dynamic_index_in_dim(unit, i, axis=-2, keepdims=False) - jnp.sum(weights * rows, axis=-2)
        return lax.dynamic_update_index_in_dim(rows, row, i, axis=-2)

    return lax.fori_loop(1, size, one_row, unit)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _inverse_fwd(lower: Array) -> tuple[Array, Array]:
    x = _inverse(lower)
    return x, x


def _inverse_bwd(x: Array, dx: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(x, -1, -2)
    return (-jnp.tril(_dot(_dot(transposed, dx), transposed), -1),)


inverse.defvjp(_inverse_fwd, _inverse_bwd)
