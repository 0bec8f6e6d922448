"""Liger attention: a gated linear recurrence beside local attention, with the weights of softmax attention alone.

Lan et al., 2025, arXiv:2503.01496, section 3.

Letters: b batch, t time, d model width, h query heads, g key-value heads, k head dim, s cached tokens.
"""

import jax
import jax.numpy as jnp
from hybridlm_kernels import gated_delta_rule, gated_linear_attention
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.mixers.attend import attended_tokens
from hybridlm.mixers.attention import SoftmaxHeads, head_dim
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.heads import l2_normalize, recurrence_flops
from hybridlm.sharding import constrain, per_device


class Liger(SoftmaxHeads):
    """o = w SWA(rope(q), rope(k), v) + (1 - w) GRM(q, k, v), then W_o, with q, k, v as in `Attention`.

    SWA is softmax attention over a window. GRM, in each head, with its group's key and value:

        gla             S_t = Diag(a_t) S_{t-1} + k'_t v_t^T,                        o_t = S_t^T q'_t
        simple_gla      S_t = a_t S_{t-1} + k'_t v_t^T,                              o_t = S_t^T q'_t
        gated_deltanet  S_t = a_t S_{t-1} + b_t k'_t (v_t - a_t S_{t-1}^T k'_t)^T,   o_t = S_t^T q'_t

    q' = softmax(q) and k' = softmax(k) over the head's channels, of unit L2 norm for the delta rule; the gates are
    pooled keys: a_t = sigmoid(p_t)^(1 / temperature) and b_t = sigmoid(p_t), where p_t is the key itself, channel by
    channel, for `gla`, as in the authors' code, and the mean over its channels for the others. There is no parameter
    that `Attention` has not. State: `s` [b, h, k, k] float32, and the cache of `Attention`.
    """

    cfg: config.Liger

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        cfg = self.cfg
        q, k, v = self.projected(x)
        held = None if state is None else {name: a for name, a in state.items() if name != "s"}
        near, held = self.attended(q, k, v, segments, held)
        far, s = self._recur(q, k, v, segments, None if state is None else state["s"])
        o = cfg.window_weight * near + (1.0 - cfg.window_weight) * far
        return self.output(x, o), None if held is None else {"s": s, **held}, carry

    def _recur(
        self,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g k"],
        segments: Segments,
        s0: Float[Array, "b h k k"] | None,
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b h k k"]]:
        cfg, kernels = self.cfg, self.context.kernels
        heads = ("sequences", "time", "heads", None)
        kv = ("sequences", "time", self.kv_axis, None)
        k, v = per_device(for_each_query_head, (heads, kv, kv), (heads, heads))(q, k, v)  # b t h k
        pooled = k.astype(jnp.float32)  # bfloat16 would round a decay that is multiplied thousands of times
        if cfg.recurrence != "gla":
            pooled = jnp.mean(pooled, axis=-1)
        log_decay = jax.nn.log_sigmoid(pooled) / cfg.decay_temperature
        q, k = feature_map(q), feature_map(k)
        options = {"scale": 1.0, "s0": s0, "segment_ids": segments.ids, "positions": segments.positions}
        if cfg.recurrence == "gated_deltanet":
            q, k, beta = l2_normalize(q), l2_normalize(k), jax.nn.sigmoid(pooled)
            return gated_delta_rule(q, k, v, beta, log_decay, **options, impl=kernels.gated_delta_rule)
        return gated_linear_attention(q, k, v, log_decay, **options, impl=kernels.gated_linear_attention)

    def init_state(self, batch: int, length: int) -> State:
        cfg, k = self.cfg, head_dim(self.cfg, self.context.width)
        s = jnp.zeros((batch, cfg.num_heads, k, k), jnp.float32)
        return {"s": constrain(s, "sequences", "heads", None, None), **self.empty_cache(batch, length)}

    @staticmethod
    def flops(cfg: config.Liger, context: Context, length: int) -> int:
        h, g, k = cfg.num_heads, cfg.num_kv_heads, head_dim(cfg, context.width)
        projections = context.width * k * ((3 if cfg.out_gate else 2) * h + 2 * g)
        local = round(2 * (projections + 2 * h * k * attended_tokens(length, cfg.window)))
        return local + recurrence_flops(h, k, k, erase=cfg.recurrence == "gated_deltanet")


def feature_map(x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
    """softmax over the channels of a head, computed in float32."""
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype)


def for_each_query_head(
    q: Float[Array, "b t h k"], k: Float[Array, "b t g k"], v: Float[Array, "b t g k"]
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h k"]]:
    """Keys and values once for each of their group's query heads, which are neighbours."""
    group = q.shape[2] // k.shape[2]
    return jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
