"""Dispatch by one-hot matrices with a fixed capacity (GShard, Lepikhin et al., 2020, arXiv:2006.16668, algorithm 1).

Letters: n tokens, g groups, s tokens of a group, k experts per token, x experts, c capacity, d model width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ffns.moe.routing import Routing


def places(
    experts: Int[Array, "g s k"], num_experts: int, capacity: int
) -> tuple[Int[Array, "g s k x"], Int[Array, "g s k"]]:
    """Which expert each choice is of, one-hot, and its place in that expert's queue; below `capacity` it is taken.

    All first choices of a group come before all second ones, and earlier tokens before later ones.
    """
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32)
    queue = jnp.swapaxes(chosen, 1, 2)  # g k s x
    g, k, s, x = queue.shape
    before = jnp.cumsum(queue.reshape(g, k * s, x), axis=1).reshape(queue.shape) - queue
    place = jnp.sum(before * queue, axis=-1)
    return chosen, jnp.swapaxes(place, 1, 2)


def one_hot_dispatch(
    routing: Routing, num_experts: int, group: int, capacity: int
) -> tuple[Float[Array, "g s x c"], Float[Array, "g s x c"], Int[Array, ""]]:
    """1 where a token takes a place of an expert, that times the token's weight, and how many choices found none."""
    experts, weights = (a.reshape(-1, group, a.shape[-1]) for a in routing)
    chosen, place = places(experts, num_experts, capacity)
    slots = jax.nn.one_hot(place, capacity, dtype=jnp.float32)  # zeros from `capacity` on
    expert = chosen.astype(jnp.float32)
    taken = jnp.einsum("gskx,gskc->gsxc", expert, slots)
    weighted = jnp.einsum("gskx,gskc,gsk->gsxc", expert, slots, weights)
    dropped = jnp.sum(chosen) - jnp.sum(taken).astype(jnp.int32)
    return jax.lax.stop_gradient(taken), weighted, dropped
