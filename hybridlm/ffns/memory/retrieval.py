"""Queries of a layer's inputs and the rows that they find by product keys.

Letters: b batch, t time, d model width, h heads, e query width, r half keys of an axis, k rows per head, n tokens.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config
from hybridlm.ffns.base import Aux
from hybridlm.ffns.memory.product_keys import product_top_k
from hybridlm.ffns.memory.query_norms import EPSILON, QUERY_NORMS
from hybridlm.layers import RMSNorm, contract, fan_in_normal, merge_tokens, split_tokens
from hybridlm.mixers.base import Context
from hybridlm.sharding import param, per_device


class ProductKeys(nnx.Module):
    """q = norm(x W_q); of each head, the k rows with the best scores, and softmax over these k.

    `query_norm` is a name in `QUERY_NORMS`; with "rms", keys are normed as well. With `shared_keys`, all heads compare
    with the same keys, else each with its own.
    """

    def __init__(
        self,
        cfg: config.Memory,
        num_heads: int,
        key_dim: int,
        query_norm: str,
        context: Context,
        rngs: nnx.Rngs,
        shared_keys: bool = False,
    ):
        self.top_k, self.num_heads = cfg.top_k, num_heads
        bound, half = key_dim**-0.5, key_dim // 2
        shape = (2, 1 if shared_keys else num_heads, cfg.half_keys, half)
        self.w_query = param(rngs, (context.width, num_heads * key_dim), ("embed", None), fan_in_normal(1.0))
        self.query_norm = QUERY_NORMS[query_norm](rngs, num_heads, key_dim)
        self.keys = param(rngs, shape, (None,) * 4, partial(_uniform, bound=bound))
        self.key_norm = RMSNorm(rngs, half, EPSILON) if query_norm == "rms" else None

    def __call__(
        self, x: Float[Array, "b t d"], real: Bool[Array, "b t"], *, training: bool
    ) -> tuple[Int[Array, "b t h k"], Float[Array, "b t h k"], Aux]:
        """Rows, -1 at padding; their weights in float32; losses."""
        queries = project_queries(x, self.w_query[...])
        keys = self.keys[...] if self.key_norm is None else self.key_norm(self.keys[...])
        keys = jnp.broadcast_to(keys, (2, self.num_heads, *keys.shape[2:]))
        tokens = ("batch",)
        search = per_device(
            partial(_search, top_k=self.top_k, training=training),
            in_axes=((), (), tokens, tokens),
            out_axes=(tokens, tokens, ()),
        )
        return search(self.query_norm, keys, queries, real)

    @staticmethod
    def flops(cfg: config.Memory, num_heads: int, key_dim: int, context: Context) -> int:
        return 2 * num_heads * key_dim * (context.width + cfg.half_keys)


def _search(
    query_norm: Any,
    keys: Float[Array, "2 h r e"],
    queries: Float[Array, "b t f"],
    real: Bool[Array, "b t"],
    *,
    top_k: int,
    training: bool,
) -> tuple[Int[Array, "b t h k"], Float[Array, "b t h k"], Aux]:
    """One device's tokens."""
    heads = queries.reshape(real.size, keys.shape[1], -1)
    heads, aux = query_norm(heads, real.reshape(-1), training=training)
    scores, rows = product_top_k(heads, keys, top_k)
    rows = jnp.where(real[:, :, None, None], rows.reshape(*real.shape, *rows.shape[1:]), -1)
    return rows, jax.nn.softmax(scores).reshape(rows.shape), aux


def project_queries(x: Float[Array, "b t d"], w: Float[Array, "d f"]) -> Float[Array, "b t f"]:
    """x W on the devices that have the tokens, whole: each finds the rows of its own."""
    return split_tokens(contract("nd,df->nf", merge_tokens(x), w, "batch", None), x)


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any, *, bound: float) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)
