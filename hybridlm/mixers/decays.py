"""Decays per channel. Letters: b batch, t time, d model width or rank, h heads, k key dim or slots."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridlm.mixers.heads import project_heads


def log_sigmoid_decay(
    x: Float[Array, "b t d"],
    w: nnx.Param[Array],
    bias: nnx.Param[Array] | None = None,
    *,
    temperature: float,
) -> Float[Array, "b t h k"]:
    """log of sigmoid(x W + bias)^(1 / temperature), float32, for W [d, h, k]."""
    z = project_logits(x, w)
    return jax.nn.log_sigmoid(z if bias is None else z + bias[...]) / temperature


def project_logits(x: Float[Array, "b t d"], w: nnx.Param[Array]) -> Float[Array, "b t h k"]:
    """x W in float32 for W [d, h, k]: bfloat16 would round a decay that is multiplied thousands of times."""
    return project_heads(x, w, jnp.float32)
