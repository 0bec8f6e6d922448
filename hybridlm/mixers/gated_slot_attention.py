"""Gated slot attention (Zhang et al., 2024, arXiv:2409.07146, section 3).

Letters: b batch, t time, d model width, h heads, k key dim, v value dim, m slots.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_linear_attention
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.decays import log_sigmoid_decay
from hybridlm.mixers.group_norm import GroupRMSNorm
from hybridlm.mixers.heads import HeadProjection, into_heads, project_out, recurrence_flops
from hybridlm.mixers.slot_scores import slot_scores
from hybridlm.sharding import constrain, param


class GatedSlotAttention(nnx.Module):
    """o_t = V_t^T softmax(K_t q_t) per head, y = W_o rmsnorm(silu(o)) over all heads.

    K_t = Diag(a_t) K_{t-1} + (1 - a_t) k_t^T and V_t = Diag(a_t) V_{t-1} + (1 - a_t) v_t^T hold a row per slot;
    q, k, v = silu(W x), a_t = sigmoid(W_a x_t)^(1 / temperature), a number per slot.
    State: `slot_keys` [b, h, m, k] and `slot_values` [b, h, m, v] float32.
    """

    def __init__(self, cfg: config.GatedSlotAttention, context: Context, rngs: nnx.Rngs):
        d, h, k, v, m = context.width, cfg.num_heads, cfg.head_dim, cfg.value_head_dim, cfg.num_slots
        self.cfg, self.context = cfg, context
        self.q = HeadProjection(rngs, context, h, k, activation="silu")
        self.k = HeadProjection(rngs, context, h, k, activation="silu")
        self.v = HeadProjection(rngs, context, h, v, activation="silu")
        self.w_decay = param(rngs, (d, h, m), ("embed", "heads", None), into_heads)
        self.norm = GroupRMSNorm(rngs, h, v, cfg.norm_eps)
        self.w_o = param(rngs, (h, v, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        q, _ = self.q(x, segments)
        k, _ = self.k(x, segments)
        v, _ = self.v(x, segments)
        log_decay = log_sigmoid_decay(x, self.w_decay, temperature=self.cfg.decay_temperature)
        write = -jnp.expm1(log_decay).astype(x.dtype)  # b t h m
        held = {} if state is None else state
        impl = self.context.kernels.gated_linear_attention
        scores, keys = slot_scores(q, write, k, log_decay, held.get("slot_keys"), segments, impl)
        attention = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        o, values = gated_linear_attention(
            attention,
            write,
            v,
            log_decay,
            scale=1.0,
            s0=held.get("slot_values"),
            segment_ids=segments.ids,
            positions=segments.positions,
            impl=impl,
        )
        y = project_out(self.norm(jax.nn.silu(o)), self.w_o)
        return y, None if state is None else {"slot_keys": keys, "slot_values": values}, carry

    def init_state(self, batch: int, length: int) -> State:
        cfg = self.cfg
        keys = jnp.zeros((batch, cfg.num_heads, cfg.num_slots, cfg.head_dim), jnp.float32)
        values = jnp.zeros((batch, cfg.num_heads, cfg.num_slots, cfg.value_head_dim), jnp.float32)
        return {
            "slot_keys": constrain(keys, "sequences", "heads", None, None),
            "slot_values": constrain(values, "sequences", "heads", None, None),
        }

    @staticmethod
    def flops(cfg: config.GatedSlotAttention, context: Context, length: int) -> int:
        h, k, v, m = cfg.num_heads, cfg.head_dim, cfg.value_head_dim, cfg.num_slots
        projections = 2 * context.width * h * (2 * k + 2 * v + m)
        return projections + recurrence_flops(h, m, k, erase=False) + recurrence_flops(h, m, v, erase=False)
