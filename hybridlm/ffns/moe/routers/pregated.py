"""Choosing a layer ahead. Letters: b batch, t time, n tokens (b t), k experts per token."""

import jax.numpy as jnp
from flax import nnx

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.routers.gated import carry_of, shared_of
from hybridlm.ffns.moe.routers.registry import ROUTERS
from hybridlm.ffns.moe.routing import Routing, Tokens
from hybridlm.mixers.base import Carry, Context


class PreGated(nnx.Module):
    """A layer's router chooses the experts of the next layer that has one; the first layer's choice serves two.

    Hwang et al., 2023, arXiv:2308.12066, section 4.1. What is chosen is in the carry: `pregate_experts` and
    `pregate_weights` [b, t, k], through which the weights are differentiated, and `pregate_ready`, 0 before the first
    layer. Losses are those of the layer that chooses. What the last layer chooses serves none.
    """

    def __init__(self, cfg: config.PreGated, num_experts: int, context: Context, rngs: nnx.Rngs):
        self.num_experts = num_experts
        self.router = ROUTERS.module_of(cfg.router)(cfg.router, num_experts, context, rngs)

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        own, losses, carry = self.router(tokens, carry, given)
        shape = carry["pregate_experts"].shape  # b t k
        empty = ((0, 0), (0, shape[-1] - own.experts.shape[1]))  # some routers have fewer outside training
        experts = jnp.pad(own.experts, empty, constant_values=self.num_experts)
        weights = jnp.pad(own.weights, empty)
        ready = carry["pregate_ready"] > 0
        routing = Routing(
            jnp.where(ready, carry["pregate_experts"].reshape(experts.shape), experts),
            jnp.where(ready, carry["pregate_weights"].reshape(weights.shape), weights),
        )
        ahead = {
            "pregate_experts": experts.reshape(shape),
            "pregate_weights": weights.reshape(shape),
            "pregate_ready": jnp.ones_like(carry["pregate_ready"]),
        }
        return routing, losses, carry | ahead

    @staticmethod
    def init_carry(cfg: config.PreGated, num_experts: int, context: Context, batch: int, length: int) -> Carry:
        inner = ROUTERS.module_of(cfg.router)
        shape = (batch, length, inner.slots(cfg.router, num_experts))
        return carry_of(inner, cfg.router, num_experts, context, batch, length) | {
            "pregate_experts": jnp.full(shape, num_experts, jnp.int32),
            "pregate_weights": jnp.zeros(shape, jnp.float32),
            "pregate_ready": jnp.zeros((), jnp.int32),
        }

    @staticmethod
    def shared(cfg: config.PreGated, num_experts: int, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return shared_of(ROUTERS.module_of(cfg.router), cfg.router, num_experts, context, rngs)

    @staticmethod
    def slots(cfg: config.PreGated, num_experts: int) -> int:
        return ROUTERS.module_of(cfg.router).slots(cfg.router, num_experts)

    @staticmethod
    def experts_per_token(cfg: config.PreGated, num_experts: int) -> float:
        return ROUTERS.module_of(cfg.router).experts_per_token(cfg.router, num_experts)

    @staticmethod
    def flops(cfg: config.PreGated, num_experts: int, context: Context) -> int:
        return ROUTERS.module_of(cfg.router).flops(cfg.router, num_experts, context)
