"""Gated linear attention (Yang et al., 2023, arXiv:2312.06635, sections 4.1 and 4.4).

Letters: b batch, t time, d model width, h heads, k key dim, v value dim, r rank of the gate.
"""

import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_linear_attention
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import contract, fan_in_normal
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.decays import log_sigmoid_decay
from hybridlm.mixers.heads import GatedRMSNorm, HeadProjection, into_heads, project_out, recurrence_flops
from hybridlm.sharding import constrain, param


class GatedLinearAttention(nnx.Module):
    """S_t = Diag(a_t) S_{t-1} + k_t v_t^T, o_t = k^-1/2 S_t^T q_t, y = W_o (rmsnorm(o) * silu(W_g x)) per head.

    a_t = sigmoid(W_a2 W_a1 x_t + b)^(1 / temperature), a number per channel of the key.
    State: `s` [b, h, k, v] float32.
    """

    def __init__(self, cfg: config.GatedLinearAttention, context: Context, rngs: nnx.Rngs):
        d, h, k, v = context.width, cfg.num_heads, cfg.head_dim, cfg.value_head_dim
        self.cfg, self.context = cfg, context
        self.q = HeadProjection(rngs, context, h, k)
        self.k = HeadProjection(rngs, context, h, k)
        self.v = HeadProjection(rngs, context, h, v)
        self.gate = HeadProjection(rngs, context, h, v)
        self.w_decay1 = param(rngs, (d, cfg.gate_rank), ("embed", None), fan_in_normal(1.0))
        self.w_decay2 = param(rngs, (cfg.gate_rank, h, k), (None, "heads", None), into_heads)
        self.b_decay = param(rngs, (h, k), ("heads", None), nnx.initializers.zeros)
        self.norm = GatedRMSNorm(rngs, v, context.norm_eps)
        self.w_o = param(rngs, (h, v, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        q, _ = self.q(x, segments)
        k, _ = self.k(x, segments)
        v, _ = self.v(x, segments)
        low = contract("btd,dr->btr", x, self.w_decay1[...], "sequences", "time", None)
        log_decay = log_sigmoid_decay(low, self.w_decay2, self.b_decay, temperature=self.cfg.decay_temperature)
        o, s = gated_linear_attention(
            q,
            k,
            v,
            log_decay,
            s0=None if state is None else state["s"],
            segment_ids=segments.ids,
            positions=segments.positions,
            impl=self.context.kernels.gated_linear_attention,
        )
        y = project_out(self.norm(o, self.gate(x, segments)[0]), self.w_o)
        return y, None if state is None else {"s": s}, carry

    def init_state(self, batch: int, length: int) -> State:
        cfg = self.cfg
        s = jnp.zeros((batch, cfg.num_heads, cfg.head_dim, cfg.value_head_dim), jnp.float32)
        return {"s": constrain(s, "sequences", "heads", None, None)}

    @staticmethod
    def flops(cfg: config.GatedLinearAttention, context: Context, length: int) -> int:
        h, k, v = cfg.num_heads, cfg.head_dim, cfg.value_head_dim
        projections = context.width * (h * (2 * k + 3 * v) + cfg.gate_rank) + cfg.gate_rank * h * k
        return 2 * projections + recurrence_flops(h, k, v, erase=False)
