"""Gated linear attention with one decay per head and short convolutions, as flash-linear-attention has it.

The layer of Yang et al., 2023, arXiv:2312.06635, with the decays of section 4.1's coarser forms.

Letters: b batch, t time, d model width, h heads, k key dim, v value dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_linear_attention
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.heads import (
    GatedRMSNorm,
    HeadProjection,
    init_all,
    project_all,
    project_gates,
    project_out,
    recurrence_flops,
)
from hybridlm.sharding import constrain, param


class SimpleGLA(nnx.Module):
    """S_t = a_t S_{t-1} + k_t v_t^T, o_t = k^-1/2 S_t^T q_t, y = W_o (rmsnorm(o) * silu(W_g x)) per head.

    q, k, v = silu(conv(W x)), a_t = sigmoid(W_a x_t + b)^(1 / temperature), a number per head.
    State: `s` [b, h, k, v] float32; `conv_q`, `conv_k`, `conv_v` [b, conv_width - 1, channels] float32.
    """

    def __init__(self, cfg: config.SimpleGLA, context: Context, rngs: nnx.Rngs):
        d, h, k, v = context.width, cfg.num_heads, cfg.head_dim, cfg.value_head_dim
        self.cfg, self.context = cfg, context
        activation = None if cfg.conv_width is None else "silu"
        self.q = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation=activation)
        self.k = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation=activation)
        self.v = HeadProjection(rngs, context, h, v, conv_width=cfg.conv_width, activation=activation)
        self.gate = HeadProjection(rngs, context, h, v)
        self.w_decay = param(rngs, (d, h), ("embed", "heads"), fan_in_normal(1.0))
        self.b_decay = param(rngs, (h,), ("heads",), nnx.initializers.zeros)
        self.norm = GatedRMSNorm(rngs, v, context.norm_eps)
        self.w_o = param(rngs, (h, v, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        (q, k, v), conv = project_all(self._projections(), x, segments, state)
        log_decay = jax.nn.log_sigmoid(project_gates(x, self.w_decay) + self.b_decay[...]) / self.cfg.decay_temperature
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
        return y, None if state is None else {"s": s, **conv}, carry

    def _projections(self) -> dict[str, HeadProjection]:
        return {"conv_q": self.q, "conv_k": self.k, "conv_v": self.v}

    def init_state(self, batch: int, length: int) -> State:
        cfg = self.cfg
        s = jnp.zeros((batch, cfg.num_heads, cfg.head_dim, cfg.value_head_dim), jnp.float32)
        return {"s": constrain(s, "sequences", "heads", None, None), **init_all(self._projections(), batch)}

    @staticmethod
    def flops(cfg: config.SimpleGLA, context: Context, length: int) -> int:
        h, k, v = cfg.num_heads, cfg.head_dim, cfg.value_head_dim
        projections = context.width * h * (2 * k + 3 * v + 1)
        taps = (cfg.conv_width or 0) * h * (2 * k + v)
        return 2 * (projections + taps) + recurrence_flops(h, k, v, erase=False)
