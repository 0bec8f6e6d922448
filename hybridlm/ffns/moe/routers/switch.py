"""The best expert alone. Letters: n tokens, d model width, x experts."""

import jax
import jax.numpy as jnp

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.routers.gated import GatedRouter
from hybridlm.ffns.moe.routing import Routing, Tokens, balance_loss, noise_key, only_real, z_loss
from hybridlm.mixers.base import Carry


class Switch(GatedRouter):
    """p = softmax(gate(x u)), e = argmax p, w = p_e; in training u is uniform in [1 - jitter, 1 + jitter], else 1.

    Fedus et al., 2021, arXiv:2101.03961, section 2.2 and its algorithm of the appendix.
    """

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        cfg, seen = self.cfg, tokens
        if given.training and cfg.jitter:
            x = tokens.x.astype(jnp.float32)
            jitter = jax.random.uniform(noise_key(given), x.shape, minval=1.0 - cfg.jitter, maxval=1.0 + cfg.jitter)
            seen = tokens._replace(x=x * jitter)
        logits, carry = self.gate(seen, carry, given)
        scores = jax.nn.softmax(logits)
        weights, experts = jax.lax.top_k(scores, 1)
        routing = only_real(Routing(experts, weights), tokens.real, self.num_experts)
        losses: Aux = {}
        if cfg.balance_loss:
            losses["moe_balance_loss"] = cfg.balance_loss * balance_loss(scores, routing.experts, tokens.real)
        if cfg.z_loss:
            losses["moe_z_loss"] = cfg.z_loss * z_loss(logits, tokens.real)
        return routing, losses, carry

    @staticmethod
    def slots(cfg: config.Switch, num_experts: int) -> int:
        return 1

    @staticmethod
    def experts_per_token(cfg: config.Switch, num_experts: int) -> float:
        return 1.0
