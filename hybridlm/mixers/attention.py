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
from hybridlm.layers import RMSNorm, contract, fan_in_normal, rope
from hybridlm.mixers.attend import attend, attend_cached, attended_tokens
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.sharding import RULES, constrain, is_time_cut, param, per_device


class SoftmaxHeads(nnx.Module):
    """Parameters of softmax attention, and what is computed with them."""

    def __init__(self, cfg: config.Attention | config.Liger, context: Context, rngs: nnx.Rngs):
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
        bias = cfg.qkv_bias
        self.b_q = param(rngs, (h, k), ("heads", None), nnx.initializers.zeros) if bias else None
        self.b_k = param(rngs, (g, k), (self.kv_axis, None), nnx.initializers.zeros) if bias else None
        self.b_v = param(rngs, (g, k), (self.kv_axis, None), nnx.initializers.zeros) if bias else None
        norm = partial(RMSNorm, rngs, k, context.norm_eps, offset=context.norm_offset)
        self.q_norm = norm() if cfg.qk_norm else None
        self.k_norm = norm() if cfg.qk_norm else None

    def projected(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t g k"], Float[Array, "b t g k"]]:
        """Queries, keys and values, without positions."""
        q = project(x, self.w_q, "heads", self.b_q)
        k = project(x, self.w_k, self.kv_axis, self.b_k)
        v = project(x, self.w_v, self.kv_axis, self.b_v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def attended(
        self,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g k"],
        segments: Segments,
        state: State | None,
    ) -> tuple[Float[Array, "b t h k"], State | None]:
        """What the heads read at the positions in `segments`, and the cache with these tokens in it."""
        cfg = self.cfg
        rotary: Any = {"fraction": cfg.rope_fraction, "theta": cfg.rope_theta, "scaling": cfg.rope_scaling}
        q, k = rope(q, segments.positions, **rotary), rope(k, segments.positions, **rotary)
        options: Any = {"window": cfg.window, "soft_cap": cfg.logit_soft_cap}
        rows: Any = ("sequences", "time")
        heads = ("sequences", "time", "heads", None)
        kv = ("sequences", "time", self.kv_axis, None)
        operands: Any = (heads, kv, kv, Segments(rows, rows))
        if state is None:
            across = partial(attend, **options, axis=RULES["time"] if is_time_cut(q) else None)
            return per_device(across, operands, heads)(q, k, v, segments), None
        held, kept = ("sequences",), ("sequences", None, self.kv_axis, None)
        cache = {"k": kept, "v": kept, "start": held, "order": held, "count": held}
        local = per_device(partial(attend_cached, **options), (*operands, cache), (heads, cache))
        return local(q, k, v, segments, state)

    def empty_cache(self, batch: int, length: int) -> State:
        """A ring of as many tokens as the window reaches."""
        cfg = self.cfg
        slots = length if cfg.window is None else min(cfg.window, length)
        kv = jnp.zeros((batch, slots, cfg.num_kv_heads, head_dim(cfg, self.context.width)), self.context.dtype)
        empty = constrain(jnp.full((batch, slots), -1, jnp.int32), "sequences", None)
        return {
            "k": constrain(kv, "sequences", None, self.kv_axis, None),
            "v": constrain(kv, "sequences", None, self.kv_axis, None),
            "start": empty,
            "order": empty,
            "count": constrain(jnp.zeros((batch,), jnp.int32), "sequences"),
        }

    def output(self, x: Float[Array, "b t d"], o: Float[Array, "b t h k"]) -> Float[Array, "b t d"]:
        """From what the heads read, with the output gate if there is one."""
        if self.w_g is not None:
            o = o * jax.nn.sigmoid(project(x, self.w_g, "heads"))
        y = contract("bthk,hkd->btd", o, self.w_o[...], "sequences", "time", None)
        return y if self.b_o is None else y + self.b_o[...].astype(x.dtype)


class Attention(SoftmaxHeads):
    """softmax(q k^T / sqrt(k)) v per head, times sigmoid(W_g x) with `out_gate`, then W_o.

    State, a ring of s = min(window, length) tokens: `k`, `v` [b, s, g, k]; `start` [b, s] int32, where the document of
    each cached token began, counted in tokens of the row (-1: empty slot); `order` [b, s] its place in the row;
    `count` [b] real tokens seen.
    """

    cfg: config.Attention

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        q, k, v = self.projected(x)
        o, state = self.attended(q, k, v, segments, state)
        return self.output(x, o), state, carry

    def init_state(self, batch: int, length: int) -> State:
        return self.empty_cache(batch, length)

    @staticmethod
    def flops(cfg: config.Attention, context: Context, length: int) -> int:
        k = head_dim(cfg, context.width)
        projections = context.width * k * ((3 if cfg.out_gate else 2) * cfg.num_heads + 2 * cfg.num_kv_heads)
        return round(2 * (projections + 2 * cfg.num_heads * k * attended_tokens(length, cfg.window)))


def project(
    x: Float[Array, "b t d"], w: nnx.Param[Array], axis: str | None, bias: nnx.Param[Array] | None = None
) -> Float[Array, "b t h k"]:
    """x W + bias for W [d, h, k] and a bias [h, k]; the heads lie along `axis`."""
    y = contract("btd,dhk->bthk", x, w[...], "sequences", "time", axis, None)
    return y if bias is None else y + bias[...].astype(x.dtype)


def head_dim(cfg: config.Attention | config.Liger, width: int) -> int:
    return width // cfg.num_heads if cfg.head_dim is None else cfg.head_dim
