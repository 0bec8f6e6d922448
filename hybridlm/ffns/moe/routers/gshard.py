"""Top-2 gating. Letters: n tokens, x experts."""

import jax
import jax.numpy as jnp

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.routers.gated import GatedRouter
from hybridlm.ffns.moe.routing import Routing, Tokens, balance_loss, noise_key, only_real
from hybridlm.mixers.base import Carry


class GShardTop2(GatedRouter):
    """g = softmax(gate(x)); the two best with w_i = g_i / (g_1 + g_2), the second with probability min(1, 2 w_2).

    Lepikhin et al., 2020, arXiv:2006.16668, algorithm 1: a first expert keeps its weight where the second falls away,
    and the balance loss counts first choices alone. (It is x^2 times theirs, 1 in balance.)
    """

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        cfg = self.cfg
        logits, carry = self.gate(tokens, carry, given)
        best, experts = jax.lax.top_k(logits, 2)
        weights = jax.nn.softmax(best)  # n 2
        if given.training and cfg.random_second:
            drawn = jax.random.uniform(noise_key(given), weights[:, 1].shape) < 2.0 * weights[:, 1]
            kept = jnp.stack([jnp.ones_like(drawn), drawn], axis=1)
            experts, weights = jnp.where(kept, experts, self.num_experts), jnp.where(kept, weights, 0.0)
        routing = only_real(Routing(experts, weights), tokens.real, self.num_experts)
        losses: Aux = {}
        if cfg.balance_loss:
            loss = balance_loss(jax.nn.softmax(logits), routing.experts[:, :1], tokens.real)
            losses["moe_balance_loss"] = cfg.balance_loss * loss
        return routing, losses, carry

    @staticmethod
    def slots(cfg: config.GShardTop2, num_experts: int) -> int:
        return 2

    @staticmethod
    def experts_per_token(cfg: config.GShardTop2, num_experts: int) -> float:
        return 2.0
