"""One expert or two. Letters: n tokens, x experts."""

import jax
import jax.numpy as jnp

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.routers.gated import GatedRouter
from hybridlm.ffns.moe.routing import Routing, Tokens, balance_loss, only_real
from hybridlm.mixers.base import Carry


class AdaptiveTopK(GatedRouter):
    """p = softmax(gate(x)), w_i = p_i for the best expert, and for the second where p_1 - p_2 <= threshold.

    Li et al., 2023, arXiv:2310.07188, section 3.1; its balance loss (eq. 4) counts the choices of tokens with one
    expert, and has the mean probabilities of all tokens.
    """

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        cfg, x = self.cfg, self.num_experts
        logits, carry = self.gate(tokens, carry, given)
        scores = jax.nn.softmax(logits)
        weights, experts = jax.lax.top_k(scores, 2)
        alone = weights[:, :1] - weights[:, 1:] > cfg.threshold  # n 1
        kept = jnp.concatenate([jnp.ones_like(alone), ~alone], axis=1)
        routing = Routing(jnp.where(kept, experts, x), jnp.where(kept, weights, 0.0))
        routing = only_real(routing, tokens.real, x)
        losses: Aux = {}
        if cfg.balance_loss:
            firsts = jnp.where(alone, routing.experts[:, :1], x)
            losses["moe_balance_loss"] = cfg.balance_loss * balance_loss(scores, firsts, tokens.real)
        return routing, losses, carry

    @staticmethod
    def slots(cfg: config.AdaptiveTopK, num_experts: int) -> int:
        return 2

    @staticmethod
    def experts_per_token(cfg: config.AdaptiveTopK, num_experts: int) -> float:
        """At most; the paper saw 1.1 to 1.3."""
        return 2.0
