"""Experts by the token's id. Letters: b batch, t time, n tokens (b t), k experts per token."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, UInt

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.routing import Routing, Tokens, only_real
from hybridlm.mixers.base import Carry, Context


class HashRouter(nnx.Module):
    """The experts of token id v in layer l are k distinct ones that hashes of (v, l, 1) to (v, l, k) draw.

    Roller et al., 2021, arXiv:2106.04426, section 3.1, with a hash function for its random table.
    """

    def __init__(self, cfg: config.HashRouter, num_experts: int, context: Context, rngs: nnx.Rngs):
        self.cfg, self.num_experts = cfg, num_experts

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        experts = hashed_experts(given.tokens.reshape(-1), given.layer, self.cfg.k, self.num_experts)
        weights = jnp.full(experts.shape, 1.0 / self.cfg.k, jnp.float32)
        return only_real(Routing(experts, weights), tokens.real, self.num_experts), {}, carry

    @staticmethod
    def slots(cfg: config.HashRouter, num_experts: int) -> int:
        return cfg.k

    @staticmethod
    def experts_per_token(cfg: config.HashRouter, num_experts: int) -> float:
        return float(cfg.k)

    @staticmethod
    def flops(cfg: config.HashRouter, num_experts: int, context: Context) -> int:
        return 0


def hashed_experts(ids: Int[Array, " n"], layer: Int[Array, ""] | int, k: int, num_experts: int) -> Int[Array, "n k"]:
    """The j-th expert is one of those that the first j - 1 left over, each as likely."""
    per_layer = combined(ids.astype(jnp.uint32), jnp.asarray(layer).astype(jnp.uint32))
    chosen: list[Array] = []
    for j in range(k):
        drawn = combined(per_layer, jnp.uint32(j)) % jnp.uint32(num_experts - j)
        # From a rank among the experts left over to an expert: step over each chosen one at or below it.
        expert = drawn.astype(jnp.int32)
        for earlier in jnp.sort(jnp.stack(chosen, axis=1), axis=1).T if chosen else ():
            expert += expert >= earlier
        chosen.append(expert)
    return jnp.stack(chosen, axis=1)


def combined(hashed: UInt[Array, "*n"], value: UInt[Array, ""]) -> UInt[Array, "*n"]:
    """A hash of both. The odd constant is 2^32 over the golden ratio: it keeps small integers apart."""
    return mixed(hashed * jnp.uint32(0x9E3779B1) + mixed(value + jnp.uint32(0x9E3779B1)))


def mixed(bits: UInt[Array, "*n"]) -> UInt[Array, "*n"]:
    """The finaliser of MurmurHash3 (Appleby, 2011): each bit of the argument flips half of the result's."""
    bits ^= bits >> 16
    bits *= jnp.uint32(0x85EBCA6B)
    bits ^= bits >> 13
    bits *= jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
