"""Noisy top-k gating. Letters: n tokens, d model width, x experts, k experts per token."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.gates.linear import exact_dot
from hybridlm.ffns.moe.routers.gated import GatedRouter
from hybridlm.ffns.moe.routing import Routing, Tokens, noise_key, only_real
from hybridlm.mixers.base import Carry, Context
from hybridlm.sharding import param, total

LEAST_NOISE = 0.01
"""Added to the noise's scale, as the authors' tensor2tensor does: the load is a quotient by it."""


class NoisyTopK(GatedRouter):
    """H = gate(x) + N(0, 1) (softplus(x W_noise) + 0.01), w = softmax over the k best of H.

    Shazeer et al., 2017, arXiv:1701.06538, eq. 3 to 5; losses of its section 4 and appendix A. Without noise the loss
    of the load is that of the counts, which has no gradient. The paper starts both matrices at 0; here the gate starts
    as gates do.
    """

    def __init__(self, cfg: config.NoisyTopK, num_experts: int, context: Context, rngs: nnx.Rngs):
        super().__init__(cfg, num_experts, context, rngs)
        self.w_noise = param(rngs, (context.width, num_experts), (None, None), nnx.initializers.zeros)

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        cfg, x = self.cfg, self.num_experts
        clean, carry = self.gate(tokens, carry, given)
        noisy, scale = clean, jnp.zeros_like(clean)
        if given.training:
            scale = jax.nn.softplus(exact_dot(tokens.x, self.w_noise[...])) + LEAST_NOISE
            noisy = clean + scale * jax.random.normal(noise_key(given), clean.shape)
        best, experts = jax.lax.top_k(noisy, cfg.k + 1)  # n k+1
        routing = only_real(Routing(experts[:, : cfg.k], jax.nn.softmax(best[:, : cfg.k])), tokens.real, x)
        losses: Aux = {}
        if cfg.importance_loss:
            losses["moe_importance_loss"] = cfg.importance_loss * squared_variation(_by_expert(routing, x))
        if cfg.load_loss:
            if given.training:
                load = _over_batch(chance_of_top_k(clean, noisy, scale, best), tokens.real)
            else:
                load = _by_expert(routing._replace(weights=jnp.ones_like(routing.weights)), x)
            losses["moe_load_loss"] = cfg.load_loss * squared_variation(load)
        return routing, losses, carry

    @staticmethod
    def slots(cfg: config.NoisyTopK, num_experts: int) -> int:
        return cfg.k

    @staticmethod
    def experts_per_token(cfg: config.NoisyTopK, num_experts: int) -> float:
        return float(cfg.k)

    @staticmethod
    def flops(cfg: config.NoisyTopK, num_experts: int, context: Context) -> int:
        return GatedRouter.flops(cfg, num_experts, context) + 2 * context.width * num_experts


def chance_of_top_k(
    clean: Float[Array, "n x"], noisy: Float[Array, "n x"], scale: Float[Array, "n x"], best: Float[Array, "n best"]
) -> Float[Array, "n x"]:
    """P(x, e): expert e is among the k best if only its own noise is drawn again. `best`: the k + 1 largest of `noisy`.

    Phi((clean_e - the k-th best of the others) / scale_e), appendix A, eq. 9.
    """
    last_in, first_out = best[:, -2:-1], best[:, -1:]
    threshold = jnp.where(noisy > first_out, first_out, last_in)
    return jax.scipy.stats.norm.cdf((clean - threshold) / scale)


def squared_variation(values: Float[Array, " x"]) -> Float[Array, ""]:
    """The squared coefficient of variation, variance / mean^2; 0 where all are 0."""
    squared_mean = jnp.square(jnp.mean(values))
    return jnp.var(values) / jnp.where(squared_mean > 0.0, squared_mean, 1.0)


def _by_expert(routing: Routing, num_experts: int) -> Float[Array, " x"]:
    """The sum of each expert's weights over the batch."""
    sums = jnp.zeros(num_experts).at[routing.experts].add(routing.weights, mode="drop")
    return total(sums, "batch")


def _over_batch(values: Float[Array, "n x"], real: Bool[Array, " n"]) -> Float[Array, " x"]:
    return total(jnp.sum(jnp.where(real[:, None], values, 0.0), axis=0), "batch")
