"""Decays per channel. Letters: b batch, t time, d model width or rank, h heads, k key dim or slots."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridlm.layers import merge_tokens, split_tokens
from hybridlm.sharding import out_sharding


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
    sharding = out_sharding("batch", "heads", None)
    z = jnp.einsum(
        "nd,dhk->nhk",
        merge_tokens(x),
        w[...].astype(x.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=sharding,
    )
    return split_tokens(z, x.shape[0])
