"""Reading a table of memory: weighted sums of chosen rows, and the inner products of chosen rows with a vector.

The lookup of product-key memories (Lample et al. 2019, arXiv:1907.05242) and of their successors; with one row per
token it is an embedding. Letters: t tokens, k rows per token, n rows, v row width, a tiles of a row, l lanes of a tile.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float, Int

from hybridlm_kernels.dispatch import Tier, check_operand, check_whole, choose
from hybridlm_kernels.jax_compat import align_varying

Table = Float[Array, "n v"] | Float[Array, "n a l"]
Residuals = tuple[Array, Array, Array, bool | None]
"""table, indices, the third operand, and True where the table is differentiated, else None: what a pytree can tell."""


def memory_lookup(
    table: Table, indices: Int[Array, "*t k"], weights: Float[Array, "*t k"], *, impl: str = "auto"
) -> Float[Array, "*t v"]:
    """y_t = sum_k w_tk table[i_tk].

    A row of `table` is v numbers, or [a, l] with v = a l: TPUs read single rows of [n, a, 128] without a copy of the
    table. An index outside [0, n) is a row of another device: it adds nothing, and the gradient of its weight is 0.

    y has the dtype of `weights`; sums are of float32 (float64 with a float64 operand). Differentiable in `table` and
    `weights`, reverse mode only. Both gradients come from one pass over the pairs (t, k) sorted by row, that of the
    table in its own dtype, rounded once from the sums; where the table is not differentiated, as under
    `jax.lax.stop_gradient`, the weights' gradient is `memory_scores` and no array of the table's size is made.

    Every device reads the rows that it holds: with operands that are sharded, call it inside a `jax.shard_map`.
    """
    table, indices, weights = jnp.asarray(table), jnp.asarray(indices), jnp.asarray(weights)
    _check_table(table, indices)
    check_operand("weights", weights, indices.shape, "[tokens, rows per token], as indices,")
    check_whole("memory_lookup", table=table, indices=indices, weights=weights)
    operands = table, _flat(indices.astype(jnp.int32)), _flat(weights)
    y: Any = _read(*align_varying(*operands), choose("memory_lookup", *operands, impl=impl), "lookup")
    return y.reshape(*indices.shape[:-1], y.shape[-1])


def memory_scores(
    table: Table, indices: Int[Array, "*t k"], x: Float[Array, "*t v"], *, impl: str = "auto"
) -> Float[Array, "*t k"]:
    """s_tk = table[i_tk] . x_t, and 0 where i_tk is outside [0, n): the transpose of `memory_lookup`, and like it.

    s has the dtype of `x`. Differentiable in `table` and `x`, reverse mode only.
    """
    table, indices, x = jnp.asarray(table), jnp.asarray(indices), jnp.asarray(x)
    _check_table(table, indices)
    width = table.size // table.shape[0]
    check_operand("x", x, (*indices.shape[:-1], width), "[tokens, row width]")
    check_whole("memory_scores", table=table, indices=indices, x=x)
    operands = table, _flat(indices.astype(jnp.int32)), _flat(x)
    s: Any = _read(*align_varying(*operands), choose("memory_scores", *operands, impl=impl), "scores")
    return s.reshape(indices.shape)


def _flat(x: Array) -> Array:
    """With one axis of tokens."""
    return x.reshape(-1, x.shape[-1])


def _check_table(table: Array, indices: Array) -> None:
    """Raises ValueError that names the operand that is wrong or does not fit the other."""
    if table.ndim not in (2, 3) or 0 in table.shape:
        raise ValueError(f"table: shape {table.shape} must be [rows, width] or [rows, tiles, lanes], none of them 0")
    check_operand("table", table, table.shape, "[rows, width]")
    if indices.ndim < 2 or 0 in indices.shape:
        raise ValueError(f"indices: shape {indices.shape} must be [tokens, rows per token], with at least one of each")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices: dtype {indices.dtype.name} must be an integer type")


def _instantiated(cotangent: Array | SymbolicZero) -> Array:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    like: Any = cotangent.aval
    return jnp.zeros(like.shape, like.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _read(table: Array, indices: Array, operand: Array, tier: Tier, how: str) -> Array:
    """`how` is "lookup" or "scores", which is each other's transpose in the operand."""
    return getattr(tier, how)(table, indices, operand)


def _read_fwd(table: Any, indices: Any, operand: Any, tier: Tier, how: str) -> tuple[Array, Residuals]:
    operands = table.value, indices.value, operand.value
    return getattr(tier, how)(*operands), (*operands, True if table.perturbed else None)


def _read_bwd(
    tier: Tier, how: str, residuals: Residuals, cotangent: Array | SymbolicZero
) -> tuple[Array | None, None, Array]:
    table, indices, operand, table_is_differentiated = residuals
    cotangent = _instantiated(cotangent)
    if table_is_differentiated is not None and how == "lookup":
        scores, dtable = tier.gradients(table, indices, operand, cotangent)
        return dtable, None, scores
    transposed = getattr(tier, "scores" if how == "lookup" else "lookup")(table, indices, cotangent)
    if table_is_differentiated is None:
        return None, None, transposed
    return tier.gradients(table, indices, cotangent, operand)[1], None, transposed


_read.defvjp(_read_fwd, _read_bwd, symbolic_zeros=True)
