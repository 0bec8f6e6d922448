"""COMET's trees. Letters: n tokens, d model width, x experts and leaves, k trees."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.gates.linear import INIT_SCALE, exact_dot
from hybridlm.ffns.moe.routers.dselect import CODE_SCALE
from hybridlm.ffns.moe.routers.permutation import nearest_permutation, sinkhorn
from hybridlm.ffns.moe.routers.smooth_step import entropy, smooth_step
from hybridlm.ffns.moe.routing import Routing, Tokens, dense_routing, mean_over
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context
from hybridlm.sharding import param


class Comet(nnx.Module):
    """v = softmax over all k x leaves of (a(x) + log p(x)), q = sum_i v_i P_i divided by its sum.

    p_il is the probability of leaf l in tree i, the product of smooth steps S(x w) (to the left) and 1 - S(x w) on
    the way from the root; a is linear. P_i is tree i's order of leaves, [leaf, expert]: during the search a doubly
    stochastic matrix, Sinkhorn's of (order + Gumbel noise) / temperature, then a permutation. Ibrahim et al., 2023,
    arXiv:2306.02824, sections 4 and 5. Until the search is over and every step is 0 or 1 a token goes to many experts,
    at most to k of them afterwards.
    """

    def __init__(self, cfg: config.Comet, num_experts: int, context: Context, rngs: nnx.Rngs):
        self.cfg, self.num_experts = cfg, num_experts
        d, x, k = context.width, num_experts, cfg.k
        init = fan_in_normal(CODE_SCALE * cfg.smooth_step**2)
        self.w_node = param(rngs, (d, k * (x - 1)), (None, None), init)
        self.w_leaf = param(rngs, (d, k * x), (None, None), fan_in_normal(INIT_SCALE))
        self.b_leaf = param(rngs, (k * x,), (None,), nnx.initializers.zeros)
        searches = cfg.search_steps > 0
        self.order = param(rngs, (k, x, x), (None, None, None), nnx.initializers.normal(0.05)) if searches else None

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        cfg, x = self.cfg, self.num_experts
        nodes = exact_dot(tokens.x, self.w_node[...]).reshape(-1, cfg.k, x - 1)
        leaves = leaf_chances(smooth_step(nodes, cfg.smooth_step))  # n k x
        bonus = (exact_dot(tokens.x, self.w_leaf[...]) + self.b_leaf[...]).reshape(leaves.shape)
        shares = weighted_softmax(bonus.reshape(-1, cfg.k * x), leaves.reshape(-1, cfg.k * x)).reshape(leaves.shape)
        if self.order is None:
            weights = jnp.sum(shares, axis=1)
        else:
            orders = self._orders(self.order[...], given)
            weights = jnp.einsum("nkl,klx->nx", shares, orders, precision=jax.lax.Precision.HIGHEST)
        weights /= jnp.sum(weights, axis=1, keepdims=True)
        losses: Aux = {}
        if cfg.entropy_loss:
            mean_entropy = jnp.mean(entropy(leaves), axis=1)
            losses["moe_entropy_loss"] = cfg.entropy_loss * mean_over(mean_entropy, tokens.real)
        return dense_routing(weights, tokens.real, x), losses, carry

    def _orders(self, order: Float[Array, "k x x"], given: Pass) -> Float[Array, "k x x"]:
        cfg, passed = self.cfg, given.progress(self.cfg.search_steps)
        temperature = cfg.start_temperature * (cfg.end_temperature / cfg.start_temperature) ** passed
        # The same on every device: one order of leaves serves the whole batch.
        noise = jax.random.gumbel(given.layer_key(), order.shape) if given.training else jnp.zeros_like(order)
        return jax.lax.cond(
            passed < 1.0,
            lambda: jnp.exp(sinkhorn((order + noise) / temperature, cfg.sinkhorn_steps)),
            lambda: nearest_permutation(sinkhorn(order / cfg.end_temperature, cfg.sinkhorn_steps)),
        )

    @staticmethod
    def slots(cfg: config.Comet, num_experts: int) -> int:
        return num_experts

    @staticmethod
    def experts_per_token(cfg: config.Comet, num_experts: int) -> float:
        return float(cfg.k)

    @staticmethod
    def flops(cfg: config.Comet, num_experts: int, context: Context) -> int:
        return 2 * context.width * cfg.k * (2 * num_experts - 1)


def leaf_chances(left: Float[Array, "n k nodes"]) -> Float[Array, "n k x"]:
    """The probability of each leaf of a binary tree of which `left` are the probabilities of going left.

    Nodes are numbered as in a heap, the children of i being 2 i + 1 and 2 i + 2, then come the leaves.
    """
    nodes = left.shape[-1]
    at = np.arange(nodes, 2 * nodes + 1)  # where each leaf's way to the root has come to
    chances = jnp.ones((*left.shape[:-1], nodes + 1))
    while at.any():
        parent = np.maximum((at - 1) // 2, 0)
        step = left[..., parent]
        chances *= jnp.where(at == 0, 1.0, jnp.where(at % 2 == 1, step, 1.0 - step))
        at = parent
    return chances


def weighted_softmax(logits: Float[Array, "n x"], p: Float[Array, "n x"]) -> Float[Array, "n x"]:
    """softmax(logits + log p), exactly 0 with a finite gradient where p is."""
    possible = p > 0.0
    greatest = jnp.max(jnp.where(possible, logits + jnp.log(jnp.where(possible, p, 1.0)), -jnp.inf), axis=1)
    above = jnp.where(possible, logits - jax.lax.stop_gradient(greatest)[:, None], 0.0)
    terms = p * jnp.exp(above)
    return terms / jnp.sum(terms, axis=1, keepdims=True)
