"""A gate of splines. Letters: n tokens, d model width, p hidden width, i inputs, o outputs, s splines, x experts."""

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

SPLINE_SCALE = 0.1
"""Of the splines' initial standard deviation, relative to that of the base: a KAN begins near its base."""


class GRKANGate(nnx.Module):
    """logits = LayerNorm(x + GLU(e_1)) W, e_1 = KAN(silu(e_2)), e_2 = KAN(elu(x)), GLU(e) = sigmoid(e W_g) * (e W_v).

    Inzirillo and Genet, 2024, arXiv:2409.15161, section III; x [n, d], e_1 and e_2 [n, p].
    """

    def __init__(self, cfg: config.GRKANGate, num_experts: int, context: Context, rngs: nnx.Rngs):
        d, p = context.width, cfg.hidden
        self.eps = context.norm_eps
        self.first = KAN(rngs, d, p, cfg.grid_size, cfg.spline_order)
        self.second = KAN(rngs, p, p, cfg.grid_size, cfg.spline_order)
        self.w_gate = param(rngs, (p, d), (None, None), fan_in_normal(1.0))
        self.w_value = param(rngs, (p, d), (None, None), fan_in_normal(1.0))
        self.scale = param(rngs, (d,), (None,), nnx.initializers.zeros)
        self.shift = param(rngs, (d,), (None,), nnx.initializers.zeros)
        self.w_out = param(rngs, (d, num_experts), (None, None), fan_in_normal(INIT_SCALE))

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Float[Array, "n x"], Carry]:
        x = tokens.x.astype(jnp.float32)
        hidden = self.second(jax.nn.silu(self.first(jax.nn.elu(x))))
        y = x + jax.nn.sigmoid(exact_dot(hidden, self.w_gate[...])) * exact_dot(hidden, self.w_value[...])
        centred = y - jnp.mean(y, axis=1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True) + self.eps)
        return exact_dot(normed * (1.0 + self.scale[...]) + self.shift[...], self.w_out[...]), carry

    @staticmethod
    def flops(cfg: config.GRKANGate, num_experts: int, context: Context) -> int:
        d, p = context.width, cfg.hidden
        return 2 * ((d + p) * p * (1 + cfg.grid_size + cfg.spline_order) + 2 * p * d + d * num_experts)


class KAN(nnx.Module):
    """y_o = sum_i (W_io silu(x_i) + sum_s C_iso B_s(x_i)) (Liu et al., 2024, arXiv:2404.19756, eq. 2.10)."""

    def __init__(self, rngs: nnx.Rngs, d_in: int, d_out: int, grid_size: int, order: int):
        self.grid_size, self.order = grid_size, order
        self.w_base = param(rngs, (d_in, d_out), (None, None), fan_in_normal(1.0))
        init = nnx.initializers.normal(SPLINE_SCALE / d_in**0.5)
        self.w_spline = param(rngs, (d_in, grid_size + order, d_out), (None, None, None), init)

    def __call__(self, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
        splines = b_splines(x, self.grid_size, self.order).reshape(x.shape[0], -1)  # n i*s
        coefficients = self.w_spline[...].reshape(-1, self.w_spline.shape[-1])  # i*s o
        return exact_dot(jax.nn.silu(x), self.w_base[...]) + exact_dot(splines, coefficients)


def b_splines(x: Float[Array, "*n"], grid_size: int, order: int) -> Float[Array, "*n s"]:
    """The values at x of all B-splines of an order, by the recursion of Cox and de Boor; 0 beyond the last knot.

    Their knots are even: `grid_size` intervals on [-1, 1], and `order` more on either side.
    """
    step = 2.0 / grid_size
    knots = step * jnp.arange(-order, grid_size + order + 1, dtype=jnp.float32) - 1.0
    x = x[..., None]
    values = ((x >= knots[:-1]) & (x < knots[1:])).astype(jnp.float32)
    for p in range(1, order + 1):
        rising = (x - knots[: -p - 1]) / (p * step)
        falling = (knots[p + 1 :] - x) / (p * step)
        values = rising * values[..., :-1] + falling * values[..., 1:]
    return values
