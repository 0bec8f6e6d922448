"""Experts choose tokens. Letters: b sequences, t time, n tokens (b t), x experts, c tokens per expert and sequence."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.routers.gated import GatedRouter
from hybridlm.ffns.moe.routing import Routing, Tokens, dense_routing
from hybridlm.mixers.base import Carry


class ExpertChoice(GatedRouter):
    """S = softmax(gate(x)) over experts; each takes the c = ceil(capacity_factor t / x) best real tokens of a sequence.

    Zhou et al., 2022, arXiv:2202.09368, eq. 1 to 3, with sequences for its groups of tokens. Outside training a token
    takes its round(capacity_factor) best experts instead, and with them no other token matters.

    A token may be taken by every expert, so it has x slots, most of them empty: x / capacity_factor times the memory
    of a routing that says the same expert by expert.
    """

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        logits, carry = self.gate(tokens, carry, given)
        scores = jax.nn.softmax(logits)  # n x
        if not given.training or tokens.length == 1:
            return dense_routing(scores, tokens.real, experts_of_a_token(self.cfg, self.num_experts)), {}, carry
        capacity = min(math.ceil(self.cfg.capacity_factor * tokens.length / self.num_experts), tokens.length)
        chosen = best_of_each_sequence(scores, tokens, capacity)
        return dense_routing(jnp.where(chosen, scores, 0.0), tokens.real, self.num_experts), {}, carry

    @staticmethod
    def slots(cfg: config.ExpertChoice, num_experts: int) -> int:
        return num_experts

    @staticmethod
    def experts_per_token(cfg: config.ExpertChoice, num_experts: int) -> float:
        return min(cfg.capacity_factor, float(num_experts))


def experts_of_a_token(cfg: config.ExpertChoice, num_experts: int) -> int:
    return min(max(round(cfg.capacity_factor), 1), num_experts)


def best_of_each_sequence(scores: Float[Array, "n x"], tokens: Tokens, capacity: int) -> Bool[Array, "n x"]:
    """Where a token is among an expert's `capacity` best of its sequence."""
    preference = jnp.where(tokens.real[:, None], scores, -1.0).reshape(-1, tokens.length, scores.shape[1])
    _, best = jax.lax.top_k(jnp.moveaxis(preference, 1, 2), capacity)  # b x c
    sequence, expert = jnp.arange(best.shape[0])[:, None, None], jnp.arange(best.shape[1])[:, None]
    chosen = jnp.zeros(preference.shape, bool).at[sequence, best, expert].set(True)
    return chosen.reshape(scores.shape)
