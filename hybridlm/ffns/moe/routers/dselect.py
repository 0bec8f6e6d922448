"""DSelect-k. Letters: n tokens, d model width, x experts, k selectors, m bits of a code, c codes (2^m)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.gates.linear import INIT_SCALE, exact_dot
from hybridlm.ffns.moe.routers.smooth_step import entropy, smooth_step
from hybridlm.ffns.moe.routing import Routing, Tokens, dense_routing, mean_over
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context
from hybridlm.sharding import param

CODE_SCALE = 0.01
"""Of the variance of the bits' inputs at first, for steps of width 1: all bits begin near 1/2, where they learn."""


class DSelectK(nnx.Module):
    """q = sum_i softmax(x W)_i r(z_i), z_i = x Z_i + b_i, r(z)_e = prod_j S(z_j) or 1 - S(z_j) by bit j of e's code.

    Hazimeh et al., 2021, arXiv:2106.03760, section 3.3, conditioned on the example. At most k experts have a weight
    once every S is 0 or 1, which the loss of the selectors' entropy drives them to; before that any of them may.
    Where x is no power of two, a code without an expert means the expert of the code without its first bit, and there
    is nothing for the paper's penalty on such codes to do.
    """

    def __init__(self, cfg: config.DSelectK, num_experts: int, context: Context, rngs: nnx.Rngs):
        self.cfg, self.num_experts = cfg, num_experts
        bits = num_bits(num_experts)
        init = fan_in_normal(CODE_SCALE * cfg.smooth_step**2)
        self.w_code = param(rngs, (context.width, cfg.k * bits), (None, None), init)
        self.b_code = param(rngs, (cfg.k * bits,), (None,), nnx.initializers.zeros)
        self.w_mix = param(rngs, (context.width, cfg.k), (None, None), fan_in_normal(INIT_SCALE))
        self.b_mix = param(rngs, (cfg.k,), (None,), nnx.initializers.zeros)

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        cfg, x = self.cfg, self.num_experts
        z = (exact_dot(tokens.x, self.w_code[...]) + self.b_code[...]).reshape(-1, cfg.k, num_bits(x))  # n k m
        selectors = select(smooth_step(z, cfg.smooth_step), x)  # n k x
        mix = jax.nn.softmax(exact_dot(tokens.x, self.w_mix[...]) + self.b_mix[...])  # n k
        weights = jnp.sum(mix[:, :, None] * selectors, axis=1)
        losses: Aux = {}
        if cfg.entropy_loss:
            mean_entropy = jnp.mean(entropy(selectors), axis=1)
            losses["moe_entropy_loss"] = cfg.entropy_loss * mean_over(mean_entropy, tokens.real)
        return dense_routing(weights, tokens.real, x), losses, carry

    @staticmethod
    def slots(cfg: config.DSelectK, num_experts: int) -> int:
        return num_experts

    @staticmethod
    def experts_per_token(cfg: config.DSelectK, num_experts: int) -> float:
        return float(cfg.k)

    @staticmethod
    def flops(cfg: config.DSelectK, num_experts: int, context: Context) -> int:
        return 2 * context.width * cfg.k * (num_bits(num_experts) + 1)


def num_bits(num_experts: int) -> int:
    return math.ceil(math.log2(num_experts))


def select(steps: Float[Array, "n k m"], num_experts: int) -> Float[Array, "n k x"]:
    """The probability of each expert where bit j of its code, the first the highest, is 1 with probability s_j."""
    bits = steps.shape[-1]
    codes = np.arange(2**bits)
    chances = jnp.ones((*steps.shape[:-1], 2**bits))
    for j in range(bits):
        is_one = jnp.asarray(codes >> (bits - 1 - j) & 1, bool)
        chances *= jnp.where(is_one, steps[..., j : j + 1], 1.0 - steps[..., j : j + 1])  # n k c
    first = num_experts - 2 ** (bits - 1)  # the expert that the first code without one means
    spare = jnp.pad(chances[..., num_experts:], ((0, 0), (0, 0), (first, first)))
    return chances[..., :num_experts] + spare
