"""Gated MLPs (Shazeer, 2020, arXiv:2002.05202). Letters: b batch, t time, d model width, f FFN width."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.layers import Linear, merge_tokens, split_tokens
from hybridlm.mixers.base import Carry, Context, Segments

ACTIVATIONS = {
    config.GLU: jax.nn.sigmoid,
    config.Bilinear: lambda x: x,
    config.ReGLU: jax.nn.relu,
    config.GeGLU: jax.nn.gelu,
    config.SwiGLU: jax.nn.silu,
}


class GatedMLP(nnx.Module):
    """y = (act(x W_gate) * x W_up) W_down."""

    def __init__(self, cfg: config.GatedMLP, context: Context, rngs: nnx.Rngs):
        d, f = context.width, cfg.hidden
        self.activation = ACTIVATIONS[type(cfg)]
        self.gate = Linear(rngs, d, f, ("embed", "mlp"), bias=cfg.bias)
        self.up = Linear(rngs, d, f, ("embed", "mlp"), bias=cfg.bias)
        self.down = Linear(rngs, f, d, ("mlp", "embed"), bias=cfg.bias, scale=2.0 / context.num_layers)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        tokens = merge_tokens(x)
        y = self.down(self.activation(self.gate(tokens)) * self.up(tokens))
        return split_tokens(y, x), {}, carry

    @staticmethod
    def flops(cfg: config.GatedMLP, context: Context) -> int:
        return 2 * 3 * context.width * cfg.hidden
