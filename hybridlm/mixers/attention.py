"""Causal softmax attention: full or local, MHA, GQA or MQA, with rotary positions.

Letters: b batch, t time, d model width, h query heads, g key-value heads, k head dim, s cached tokens.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import RMSNorm, fan_in_normal, rope
from hybridlm.mixers.attend import attend, attend_cached, attended_tokens
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.sharding import constrain, out_sharding, param, per_device


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(k)) v per head, times sigmoid(W_g x) with `out_gate`, then W_o.

    State, a ring of s = min(window, length) tokens: `k`, `v` [b, s, g, k]; `start` [b, s] int32, where the document of
    each cached token began, counted in tokens of the row (-1: empty slot); `order` [b, s] its place in the row;
    `count` [b] real tokens seen.
    """

    def __init__(self, cfg: config.Attention, context: Context, rngs: nnx.Rngs):
        d, h, g, k = context.width, cfg.num_heads, cfg.num_kv_heads, head_dim(cfg, context.width)
        self.cfg, self.context = cfg, context
        # A single key-value head (MQA) is computed on every device; more are split like the query heads.
        self.kv_axis = "heads" if g > 1 else None
        self.w_q = param(rngs, (d, h, k), ("embed", "heads", None), fan_in_normal(1.0))
        self.w_k = param(rngs, (d, g, k), ("embed", self.kv_axis, None), fan_in_normal(1.0))
        self.w_v = param(rngs, (d, g, k), ("embed", self.kv_axis, None), fan_in_normal(1.0))
        self.w_g = param(rngs, (d, h, k), ("embed", "heads", None), fan_in_normal(1.0)) if cfg.out_gate else None
        self.w_o = param(rngs, (h, k, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))
        self.b_o = param(rngs, (d,), (None,), nnx.initializers.zeros) if cfg.out_bias else None
        self.q_norm = RMSNorm(rngs, k, context.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(rngs, k, context.norm_eps) if cfg.qk_norm else None

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        cfg = self.cfg
        q = self._project(x, self.w_q, "heads")
        k = self._project(x, self.w_k, self.kv_axis)
        v = self._project(x, self.w_v, self.kv_axis)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rope(q, segments.positions, fraction=cfg.rope_fraction, theta=cfg.rope_theta)
        k = rope(k, segments.positions, fraction=cfg.rope_fraction, theta=cfg.rope_theta)
        rows: Any = ("batch", None)
        heads = ("batch", None, "heads", None)
        kv = ("batch", None, self.kv_axis, None)
        options: Any = {"window": cfg.window, "soft_cap": cfg.logit_soft_cap}
        if state is None:
            local = per_device(partial(attend, **options), (heads, kv, kv, Segments(rows, rows)), heads)
            o = local(q, k, v, segments)
        else:
            cache = {"k": kv, "v": kv, "start": rows, "order": rows, "count": ("batch",)}
            local = per_device(
                partial(attend_cached, **options), (heads, kv, kv, Segments(rows, rows), cache), (heads, cache)
            )
            o, state = local(q, k, v, segments, state)
        if self.w_g is not None:
            o = o * jax.nn.sigmoid(self._project(x, self.w_g, "heads"))
        y = jnp.einsum(
            "bthk,hkd->btd", o, self.w_o[...].astype(x.dtype), out_sharding=out_sharding("batch", None, None)
        )
        return y if self.b_o is None else y + self.b_o[...].astype(x.dtype), state, carry

    def _project(self, x: Float[Array, "b t d"], w: nnx.Param[Array], axis: str | None) -> Float[Array, "b t h k"]:
        sharding = out_sharding("batch", None, axis, None)
        return jnp.einsum("btd,dhk->bthk", x, w[...].astype(x.dtype), out_sharding=sharding)

    def init_state(self, batch: int, length: int) -> State:
        slots = length if self.cfg.window is None else min(self.cfg.window, length)
        kv = jnp.zeros(
            (batch, slots, self.cfg.num_kv_heads, head_dim(self.cfg, self.context.width)), self.context.dtype
        )
        empty = constrain(jnp.full((batch, slots), -1, jnp.int32), "batch", None)
        return {
            "k": constrain(kv, "batch", None, self.kv_axis, None),
            "v": constrain(kv, "batch", None, self.kv_axis, None),
            "start": empty,
            "order": empty,
            "count": constrain(jnp.zeros((batch,), jnp.int32), "batch"),
        }

    @staticmethod
    def flops(cfg: config.Attention, context: Context, length: int) -> int:
        k = head_dim(cfg, context.width)
        projections = context.width * k * ((3 if cfg.out_gate else 2) * cfg.num_heads + 2 * cfg.num_kv_heads)
        return round(2 * (projections + 2 * cfg.num_heads * k * attended_tokens(length, cfg.window)))


def head_dim(cfg: config.Attention, width: int) -> int:
    return width // cfg.num_heads if cfg.head_dim is None else cfg.head_dim
