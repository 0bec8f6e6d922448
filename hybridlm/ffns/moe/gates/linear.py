"""The usual gate. Letters: n tokens, d model width, x experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.moe.routing import Tokens
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context
from hybridlm.sharding import param

INIT_SCALE = 0.1
"""Of the variance of logits at first (Fedus et al., 2021, arXiv:2101.03961, section 2.4): choices begin nearly even."""


class LinearGate(nnx.Module):
    """logits = x W."""

    def __init__(self, cfg: config.LinearGate, num_experts: int, context: Context, rngs: nnx.Rngs):
        self.w = param(rngs, (context.width, num_experts), (None, None), fan_in_normal(INIT_SCALE))

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Float[Array, "n x"], Carry]:
        return exact_dot(tokens.x, self.w[...]), carry

    @staticmethod
    def flops(cfg: config.LinearGate, num_experts: int, context: Context) -> int:
        return 2 * context.width * num_experts


def exact_dot(x: Float[Array, "n i"], w: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x W in float32. A TPU would by default round its operands to bfloat16, and with them the choice of experts."""
    return jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
