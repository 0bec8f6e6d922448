"""The k experts with the best scores. Letters: n tokens, x experts, k experts per token, g groups of experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.routers.gated import GatedRouter
from hybridlm.ffns.moe.routing import (
    Routing,
    Tokens,
    balance_loss,
    expert_counts,
    only_real,
    report_load,
    sequence_balance_loss,
    z_loss,
)
from hybridlm.mixers.base import Carry, Context
from hybridlm.sharding import param


class TopK(GatedRouter):
    """s = score(gate(x)), T = the k best of s + b, w_e = scale s_e / sum_{i in T} s_i.

    b is 0 without `bias_balance`. With `top_groups` = m, T lies in the m groups of experts whose k / m best s + b have
    the largest sums (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """

    def __init__(self, cfg: config.TopK, num_experts: int, context: Context, rngs: nnx.Rngs):
        super().__init__(cfg, num_experts, context, rngs)
        self.balance_bias = param(rngs, (num_experts,), (None,), nnx.initializers.zeros) if cfg.bias_balance else None

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        cfg = self.cfg
        logits, carry = self.gate(tokens, carry, given)
        # In logarithms quotients of scores are exact where the scores themselves underflow.
        log_scores = LOG_SCORES[cfg.score](logits)  # n x
        preference = jax.lax.stop_gradient(jnp.exp(log_scores))
        if self.balance_bias is not None:
            preference += jax.lax.stop_gradient(self.balance_bias[...])
        if cfg.num_groups > 1:
            preference = within_best_groups(preference, cfg.k, cfg.num_groups, cfg.top_groups or cfg.num_groups)
        _, experts = jax.lax.top_k(preference, cfg.k)  # n k
        chosen = jnp.take_along_axis(log_scores, experts, axis=1)
        weights = cfg.scale * (jax.nn.softmax(chosen) if cfg.renormalize else jnp.exp(chosen))
        routing = only_real(Routing(experts, weights), tokens.real, self.num_experts)
        if self.balance_bias is not None:
            counts = expert_counts(routing.experts, self.num_experts).astype(jnp.float32)
            weights = report_load(routing.weights, self.balance_bias[...], counts - jnp.mean(counts))
            routing = routing._replace(weights=weights)
        return routing, self._losses(logits, log_scores, routing.experts, tokens), carry

    def _losses(
        self,
        logits: Float[Array, "n x"],
        log_scores: Float[Array, "n x"],
        experts: Int[Array, "n k"],
        tokens: Tokens,
    ) -> Aux:
        cfg, losses = self.cfg, {}
        shares = jax.nn.softmax(log_scores)  # scores divided by their sum over experts
        if cfg.balance_loss:
            losses["moe_balance_loss"] = cfg.balance_loss * balance_loss(shares, experts, tokens.real)
        if cfg.sequence_balance_loss:
            loss = sequence_balance_loss(shares, experts, tokens.real, tokens.length)
            losses["moe_sequence_balance_loss"] = cfg.sequence_balance_loss * loss
        if cfg.z_loss:
            losses["moe_z_loss"] = cfg.z_loss * z_loss(logits, tokens.real)
        return losses

    @staticmethod
    def slots(cfg: config.TopK, num_experts: int) -> int:
        return cfg.k

    @staticmethod
    def experts_per_token(cfg: config.TopK, num_experts: int) -> float:
        return float(cfg.k)


def within_best_groups(
    preference: Float[Array, "n x"], k: int, num_groups: int, top_groups: int
) -> Float[Array, "n x"]:
    """`preference`, -inf outside the `top_groups` groups whose k / top_groups best are the largest in sum."""
    groups = preference.reshape(preference.shape[0], num_groups, -1)  # n g x/g
    best, _ = jax.lax.top_k(groups, max(k // top_groups, 1))
    _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), top_groups)
    is_kept = jnp.any(kept[:, :, None] == jnp.arange(num_groups), axis=1)  # n g
    return jnp.where(is_kept[:, :, None], groups, -jnp.inf).reshape(preference.shape)


def log_sqrt_softplus(logits: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log sqrt(log(1 + e^z)), finite with finite gradients for every z."""
    low = logits < -16.0  # there log(1 + e^z) is e^z within the precision of float32
    return 0.5 * jnp.where(low, logits, jnp.log(jax.nn.softplus(jnp.where(low, 0.0, logits))))


LOG_SCORES = {
    "softmax": jax.nn.log_softmax,
    "sigmoid": jax.nn.log_sigmoid,
    "sqrt_softplus": log_sqrt_softplus,
}
