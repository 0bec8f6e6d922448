"""Small parts that mixers, FFNs and the model share.

Letters: b batch, t time, d model width, h heads, k key dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridlm.sharding import out_sharding, param


def fan_in_normal(scale: float, in_axis: int | tuple[int, ...] = 0) -> jax.nn.initializers.Initializer:
    """Normal with variance scale / fan-in; every axis outside `in_axis` but the last is a batch of matrices."""
    axes = (in_axis,) if isinstance(in_axis, int) else in_axis
    return jax.nn.initializers.variance_scaling(
        scale, "fan_in", "normal", in_axis=axes, out_axis=-1, batch_axis=tuple(range(min(axes)))
    )


class Linear(nnx.Module):
    """y = x W (+ b) in x's dtype."""

    def __init__(
        self, rngs: nnx.Rngs, d_in: int, d_out: int, axes: tuple[str, str], *, bias: bool, scale: float = 1.0
    ):
        self.w = param(rngs, (d_in, d_out), axes, fan_in_normal(scale))
        self.b = param(rngs, (d_out,), (axes[1],), nnx.initializers.zeros) if bias else None
        self.out_axis = axes[1]

    def __call__(self, x: Float[Array, "b t i"]) -> Float[Array, "b t o"]:
        # The residual stream is not sharded over its width, whatever the weight is.
        axis = None if self.out_axis == "embed" else self.out_axis
        y = jnp.einsum("bti,io->bto", x, self.w[...].astype(x.dtype), out_sharding=out_sharding("batch", None, axis))
        return y if self.b is None else y + _bias(self.b[...].astype(x.dtype), axis)


def _bias(b: Float[Array, " o"], axis: str | None) -> Float[Array, " o"]:
    sharding = out_sharding(axis)
    return b if sharding is None else jax.sharding.reshard(b, sharding)


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale), computed in float32; `scale` starts at 0."""

    def __init__(self, rngs: nnx.Rngs, width: int, eps: float):
        self.scale = param(rngs, (width,), (None,), nnx.initializers.zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * (1.0 + self.scale[...])).astype(x.dtype)


def rope(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], *, fraction: float, theta: float
) -> Float[Array, "b t h k"]:
    """Rotate the first `fraction` of each head by its position (Su et al., 2021, arXiv:2104.09864).

    The rotated part is split in halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); angles are float32.
    """
    rotated = 2 * int(x.shape[-1] * fraction / 2)
    if rotated == 0:
        return x
    frequency = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # b t 1 k/2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., rotated:]], axis=-1)
