"""Small parts that mixers, FFNs and the model share.

Letters: b batch, t time, d model width, h heads, k key dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from hybridlm.sharding import out_sharding, param


def fan_in_normal(scale: float, in_axis: int | tuple[int, ...] = 0) -> jax.nn.initializers.Initializer:
    """Normal with variance scale / fan-in; every axis outside `in_axis` but the last is a batch of matrices."""
    axes = (in_axis,) if isinstance(in_axis, int) else in_axis
    return jax.nn.initializers.variance_scaling(
        scale, "fan_in", "normal", in_axis=axes, out_axis=-1, batch_axis=tuple(range(min(axes)))
    )


def merge_tokens(x: Shaped[Array, "b t *rest"]) -> Shaped[Array, "bt *rest"]:
    """[b, t, ...] -> [b t, ...], the shape in which projections and what is elementwise between them are computed.

    XLA on CPU flattens the operands of a matmul anyway, and elementwise work fused with that reshape does not
    vectorise: the gradient of a gated MLP took 42 ms in three dimensions and 15 in two (4,096 tokens, width 128).
    """
    return x.reshape(-1, *x.shape[2:])


def split_tokens(x: Shaped[Array, "bt *rest"], batch: int) -> Shaped[Array, "b t *rest"]:
    """The inverse of `merge_tokens`."""
    sharding = jax.typeof(x).sharding
    # Else mesh axes of size 1 would come to stand on time.
    out = None if sharding.mesh.empty else PartitionSpec(sharding.spec[0], None, *sharding.spec[1:])
    return jnp.reshape(x, (batch, -1, *x.shape[1:]), out_sharding=out)


class Linear(nnx.Module):
    """y = x W (+ b) in x's dtype."""

    def __init__(self, rngs: nnx.Rngs, d_in: int, d_out: int, axes: tuple[str, str], *, bias: bool, scale: float = 1.0):
        self.w = param(rngs, (d_in, d_out), axes, fan_in_normal(scale))
        # The residual stream is not sharded over its width, whatever the weight is.
        self.out_axis = None if axes[1] == "embed" else axes[1]
        self.b = param(rngs, (d_out,), (self.out_axis,), nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "bt i"]) -> Float[Array, "bt o"]:
        y = jnp.dot(x, self.w[...].astype(x.dtype), out_sharding=out_sharding("batch", self.out_axis))
        return y if self.b is None else y + self.b[...].astype(x.dtype)


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
