"""What selectors that are differentiable, and yet exactly sparse, are made of."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def smooth_step(z: Float[Array, "*n"], width: float) -> Float[Array, "*n"]:
    """0 below -width / 2, 1 above width / 2, the cubic with slope 0 at both ends between (Hazimeh et al., 2020,
    arXiv:2002.07772, eq. 2)."""
    u = z / width
    return jnp.where(u <= -0.5, 0.0, jnp.where(u >= 0.5, 1.0, 0.5 + u * (1.5 - 2.0 * u * u)))


def entropy(p: Float[Array, "*n x"]) -> Float[Array, "*n"]:
    """-sum p log p over the last axis. Its gradient is finite, 0 for a probability that is exactly 0."""
    return -jnp.sum(p * jnp.log(jnp.where(p > 0.0, p, 1.0)), axis=-1)
