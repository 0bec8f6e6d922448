"""All experts at first, few in the end. Letters: n tokens, x experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.routers.gated import GatedRouter
from hybridlm.ffns.moe.routing import Routing, Tokens, balance_loss, dense_routing, noise_key
from hybridlm.mixers.base import Carry

ACTIVATIONS = {"identity": lambda z: z, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "gelu": jax.nn.gelu}


class DenseToSparse(GatedRouter):
    """w = softmax((act(gate(x)) + Gumbel noise) / temperature), where it is above the threshold.

    Nie et al., 2021, arXiv:2112.14397: as in it and its code, weights are not divided by their sum once some fall
    away, and they are differentiated as they are. The best expert stays even below the threshold. The temperature
    falls linearly. There is noise in training only, and none with an activation (Nguyen et al., 2024,
    arXiv:2401.13875).
    """

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        cfg = self.cfg
        logits, carry = self.gate(tokens, carry, given)
        logits = ACTIVATIONS[cfg.activation](logits)
        if given.training and cfg.activation == "identity":
            logits += jax.random.gumbel(noise_key(given), logits.shape)
        scores = jax.nn.softmax(logits / temperature(cfg, given))
        kept = (scores > cfg.threshold) | (scores == jnp.max(scores, axis=1, keepdims=True))
        slots = self.slots(cfg, self.num_experts)
        routing = dense_routing(jnp.where(kept, scores, 0.0), tokens.real, slots)
        losses: Aux = {}
        if cfg.balance_loss:
            losses["moe_balance_loss"] = cfg.balance_loss * balance_loss(scores, routing.experts, tokens.real)
        return routing, losses, carry

    @staticmethod
    def slots(cfg: config.DenseToSparse, num_experts: int) -> int:
        return cfg.max_experts or num_experts

    @staticmethod
    def experts_per_token(cfg: config.DenseToSparse, num_experts: int) -> float:
        """One is left when the temperature has done its work."""
        return 1.0


def temperature(cfg: config.DenseToSparse, given: Pass) -> Float[Array, ""]:
    passed = given.progress(cfg.anneal_steps)
    return cfg.start_temperature + (cfg.end_temperature - cfg.start_temperature) * passed
