"""Grouped matrix multiplication: rows sorted by group, one matrix per group, as the experts of a mixture need it.

The dropless form of Gale et al. 2022 (MegaBlocks, arXiv:2211.15841): groups have any size, and nothing is padded to a
capacity. Letters: m rows, k inputs, n outputs, g groups.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hybridlm_kernels.debug import check_range
from hybridlm_kernels.dispatch import Tier, check_operand, check_whole, choose
from hybridlm_kernels.jax_compat import align_varying

Residuals = tuple[Array, Array, Array]  # x, w and the sizes of the groups


def grouped_matmul(
    x: Float[Array, "m k"],
    w: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    *,
    impl: str = "auto",
) -> Float[Array, "m n"]:
    """y_i = x_i w[j] for the rows i of group j, which are the `group_sizes[j]` rows after those of the groups before.

    Groups may be empty. Rows past the last group belong to none: they are not computed, and y is 0 there whatever x
    holds. `group_sizes` add up to m at most.

    y has the dtype of `x` and is summed in float32 (float64 for float64 operands); `w` is rounded to the dtype of `x`.
    Differentiable in `x` and `w`, reverse mode only: the gradient of `w` has the dtype of `w` and comes unrounded from
    the sums, 0 for an empty group. Kept for it are the operands. A non-finite row spoils its own group's alone.

    Every device multiplies the rows and the groups that it holds: with operands that are sharded, call it inside a
    `jax.shard_map` which has brought rows and groups together.
    """
    x, w, group_sizes = jnp.asarray(x), jnp.asarray(w), jnp.asarray(group_sizes)
    _check(x, w, group_sizes)
    rounded = jax.ShapeDtypeStruct(w.shape, x.dtype)
    tier = choose("grouped_matmul", x, rounded, group_sizes, impl=impl)
    return _multiply(*align_varying(x, w, group_sizes.astype(jnp.int32)), tier)


def _check(x: Array, w: Array, group_sizes: Array) -> None:
    """Raises ValueError that names the operand that does not fit the others."""
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x: shape {x.shape} must be [rows, inputs], with at least one of each")
    check_operand("x", x, x.shape, "[rows, inputs]")
    k = x.shape[1]
    if w.ndim != 3 or 0 in w.shape or w.shape[1] != k:
        raise ValueError(f"w: shape {w.shape} must be [groups, inputs = {k}, outputs], with at least one of each")
    check_operand("w", w, w.shape, "[groups, inputs, outputs]")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"group_sizes: shape {group_sizes.shape} must be [groups] = {w.shape[:1]}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes: dtype {group_sizes.dtype.name} must be an integer type")
    check_range("group_sizes", group_sizes, 0, x.shape[0])
    check_range("group_sizes, added up,", jnp.sum(group_sizes), 0, x.shape[0])
    check_whole("grouped_matmul", x=x, w=w, group_sizes=group_sizes)


def _multiply_fwd(x: Array, w: Array, group_sizes: Array, tier: Tier) -> tuple[Array, Residuals]:
    return tier.forward(x, w.astype(x.dtype), group_sizes), (x, w, group_sizes)


def _multiply_bwd(tier: Tier, residuals: Residuals, dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = residuals
    dx = tier.transposed(dy, w.astype(x.dtype), group_sizes)
    return dx, tier.weights(x, dy, group_sizes, w.dtype), None


_multiply = jax.custom_vjp(lambda *operands: _multiply_fwd(*operands)[0], nondiff_argnums=(3,))
_multiply.defvjp(_multiply_fwd, _multiply_bwd)
