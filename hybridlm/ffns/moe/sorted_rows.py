"""Tokens sorted by expert, and back: gathers both ways, forward and backward.

Letters: n tokens, k experts per token, r rows (n k), d model width, x experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ffns.moe.routing import expert_counts


class Order(NamedTuple):
    """The rows (token, choice) in the order of their experts; rows without an expert come last."""

    row_of: Int[Array, "n k"]
    """Where each choice of each token lies."""
    choice_of: Int[Array, " r"]
    """Which choice, as n k numbers, lies in each row: the inverse."""
    counts: Int[Array, " x"]
    """Rows of each expert."""


def sort_by_expert(experts: Int[Array, "n k"], num_experts: int) -> Order:
    """Tokens keep their order within an expert."""
    choice_of = jnp.argsort(experts.reshape(-1), stable=True)
    positions = jnp.arange(experts.size, dtype=choice_of.dtype)
    row_of = jnp.zeros_like(choice_of).at[choice_of].set(positions, unique_indices=True)
    return Order(row_of.reshape(experts.shape), choice_of, expert_counts(experts, num_experts))


@jax.custom_vjp
def take_rows(x: Float[Array, "n d"], order: Order) -> Float[Array, "r d"]:
    """The token of every row. Backward a token gathers its rows, where automatic differentiation would scatter them."""
    return x[order.choice_of // order.row_of.shape[1]]


def _take_forward(x: Float[Array, "n d"], order: Order) -> tuple[Float[Array, "r d"], Order]:
    return take_rows(x, order), order


def _take_backward(order: Order, dy: Float[Array, "r d"]) -> tuple[Float[Array, "n d"], None]:
    return jnp.sum(dy[order.row_of], axis=1, dtype=jnp.float32).astype(dy.dtype), None


take_rows.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def combine(rows: Float[Array, "r d"], weights: Float[Array, "n k"], order: Order) -> Float[Array, "n d"]:
    """y_n = sum_k w_nk rows[row of (n, k)], summed in float32."""
    y = jnp.einsum("nkd,nk->nd", rows[order.row_of], weights.astype(rows.dtype), preferred_element_type=jnp.float32)
    return y.astype(rows.dtype)


def _combine_forward(
    rows: Float[Array, "r d"], weights: Float[Array, "n k"], order: Order
) -> tuple[Float[Array, "n d"], tuple[Array, Array, Order]]:
    return combine(rows, weights, order), (rows, weights, order)


def _combine_backward(
    saved: tuple[Array, Array, Order], dy: Float[Array, "n d"]
) -> tuple[Float[Array, "r d"], Float[Array, "n k"], None]:
    rows, weights, order = saved
    dweights = jnp.einsum("nkd,nd->nk", rows[order.row_of], dy, preferred_element_type=jnp.float32)
    of_row = weights.reshape(-1)[order.choice_of].astype(dy.dtype)
    drows = of_row[:, None] * dy[order.choice_of // weights.shape[1]]
    return drows, dweights.astype(weights.dtype), None


combine.defvjp(_combine_forward, _combine_backward)
