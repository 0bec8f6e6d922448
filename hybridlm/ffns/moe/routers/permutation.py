"""Learning an order. Letters: k trees, x leaves and experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sinkhorn(scores: Float[Array, "k x x"], steps: int) -> Float[Array, "k x x"]:
    """Logarithms of nearly doubly stochastic matrices: rows and columns of exp(scores) normalised in turn.

    Adams and Zemel, 2011, arXiv:1106.1925. At scores / t it tends to the best permutation as t falls (Mena et al.,
    2018, arXiv:1802.08665).
    """

    def normalise(_: Array, logs: Array) -> Array:
        logs = jax.nn.log_softmax(logs, axis=2)
        return jax.nn.log_softmax(logs, axis=1)

    return jax.lax.fori_loop(0, steps, normalise, scores)


def nearest_permutation(scores: Float[Array, "k x x"]) -> Float[Array, "k x x"]:
    """A permutation matrix for each: the largest entry, then the largest outside its row and column, and so on."""
    size = scores.shape[-1]

    def one(left: Float[Array, "x x"]) -> Float[Array, "x x"]:
        def take(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            left, taken = state
            row, column = jnp.divmod(jnp.argmax(left), size)
            left = left.at[row].set(-jnp.inf).at[:, column].set(-jnp.inf)
            return left, taken.at[row, column].set(1.0)

        return jax.lax.fori_loop(0, size, take, (left, jnp.zeros((size, size))))[1]

    return jax.vmap(one)(jax.lax.stop_gradient(scores))
