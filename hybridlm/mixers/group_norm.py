"""RMS norm over groups of heads. Letters: b batch, t time, h heads, k head dim, g groups."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridlm.sharding import constrain, param


class GroupRMSNorm(nnx.Module):
    """x / rms(x) * scale in float32, the mean over all channels of a group of neighbouring heads.

    `scale` [h, k] starts at 1. One group is the norm over the whole width.
    """

    def __init__(self, rngs: nnx.Rngs, num_heads: int, head_dim: int, eps: float, num_groups: int = 1):
        self.scale = param(rngs, (num_heads, head_dim), ("heads", None), nnx.initializers.ones)
        self.eps, self.num_groups = eps, num_groups

    def __call__(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
        wide = x.astype(jnp.float32)
        # A group may be cut over devices: they exchange one number per head and token.
        square = constrain(jnp.mean(wide * wide, axis=-1), "sequences", "time", None)  # b t h
        square = jnp.mean(square.reshape(*x.shape[:2], self.num_groups, -1), axis=-1)  # b t g
        square = constrain(jnp.repeat(square, x.shape[2] // self.num_groups, axis=-1), "sequences", "time", "heads")
        return (wide * jax.lax.rsqrt(square[..., None] + self.eps) * self.scale[...]).astype(x.dtype)
