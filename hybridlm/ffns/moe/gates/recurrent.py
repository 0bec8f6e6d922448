"""A gate with a memory over layers. Letters: b batch, t time, n tokens, d model width, p state width, x experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.moe.gates.linear import INIT_SCALE, exact_dot
from hybridlm.ffns.moe.routing import Tokens
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context
from hybridlm.sharding import param


class RecurrentGate(nnx.Module):
    """h_l = GRU(x W_l, h_{l-1}), logits = h_l W'_l (RMoE; Qiu et al., 2024, arXiv:2408.06793, section 3).

    h [b, t, p] float32 crosses layers in the carry, as `router_state_<p>`; it is 0 before the first. Layers with the
    same p share the GRU.
    """

    def __init__(self, cfg: config.RecurrentGate, num_experts: int, context: Context, rngs: nnx.Rngs):
        self.cfg = cfg
        self.w_in = param(rngs, (context.width, cfg.state_dim), (None, None), fan_in_normal(1.0))
        self.w_out = param(rngs, (cfg.state_dim, num_experts), (None, None), fan_in_normal(INIT_SCALE))

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Float[Array, "n x"], Carry]:
        name = state_name(self.cfg)
        before = carry[name]
        assert given.shared is not None, "shared() says what this gate needs of the model"
        gru = given.shared[gru_name(self.cfg)]
        h = gru(exact_dot(tokens.x, self.w_in[...]), before.reshape(-1, self.cfg.state_dim))
        return exact_dot(h, self.w_out[...]), carry | {name: h.reshape(before.shape)}

    @staticmethod
    def init_carry(cfg: config.RecurrentGate, num_experts: int, context: Context, batch: int, length: int) -> Carry:
        return {state_name(cfg): jnp.zeros((batch, length, cfg.state_dim), jnp.float32)}

    @staticmethod
    def shared(cfg: config.RecurrentGate, num_experts: int, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {gru_name(cfg): GRU(rngs, cfg.state_dim)}

    @staticmethod
    def flops(cfg: config.RecurrentGate, num_experts: int, context: Context) -> int:
        return 2 * cfg.state_dim * (context.width + 6 * cfg.state_dim + num_experts)


def state_name(cfg: config.RecurrentGate) -> str:
    return f"router_state_{cfg.state_dim}"


def gru_name(cfg: config.RecurrentGate) -> str:
    return f"router_gru_{cfg.state_dim}"


class GRU(nnx.Module):
    """r, z = sigmoid(u W + b + h V + c), m = tanh(u W + b + r (h V + c)), h' = (1 - z) m + z h.

    The cell of Cho et al., 2014, arXiv:1406.1078, with the reset gate r after the product, as cuDNN and PyTorch have
    it. The columns of each matrix are those of r, z and m.
    """

    def __init__(self, rngs: nnx.Rngs, width: int):
        self.w_input = param(rngs, (width, 3 * width), (None, None), fan_in_normal(1.0))
        self.b_input = param(rngs, (3 * width,), (None,), nnx.initializers.zeros)
        self.w_state = param(rngs, (width, 3 * width), (None, None), fan_in_normal(1.0))
        self.b_state = param(rngs, (3 * width,), (None,), nnx.initializers.zeros)

    def __call__(self, u: Float[Array, "n p"], h: Float[Array, "n p"]) -> Float[Array, "n p"]:
        reset_u, update_u, new_u = jnp.split(exact_dot(u, self.w_input[...]) + self.b_input[...], 3, axis=1)
        reset_h, update_h, new_h = jnp.split(exact_dot(h, self.w_state[...]) + self.b_state[...], 3, axis=1)
        reset, update = jax.nn.sigmoid(reset_u + reset_h), jax.nn.sigmoid(update_u + update_h)
        new = jnp.tanh(new_u + reset * new_h)
        return (1.0 - update) * new + update * h
