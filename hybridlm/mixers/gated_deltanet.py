"""Gated DeltaNet: the delta rule with one decay per head (Yang et al., 2024, arXiv:2412.06464).

Letters: b batch, t time, d model width, h query-key heads, r value heads, k key dim, v value dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_delta_rule
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.heads import (
    GatedRMSNorm,
    HeadDecay,
    HeadProjection,
    init_all,
    l2_normalize,
    project_all,
    project_gates,
    project_out,
    recurrence_flops,
)
from hybridlm.sharding import constrain, param


class GatedDeltaNet(nnx.Module):
    """y = W_o (norm(o) * silu(W_g x)) with o of the gated delta rule, per head:

    q, k = l2norm(silu(conv(W x))), v = silu(conv(W_v x)), beta = sigmoid(W_b x) (times 2 with `allow_neg_eigval`),
    log decay = -exp(A_log) softplus(W x + dt_bias), S = decay S, S += beta k (v - S^T k)^T, o = S^T q / sqrt(k).

    State: `s` [b, r, k, v] float32; `conv_q`, `conv_k`, `conv_v` [b, conv_width - 1, channels] float32, the last inputs
    of the convolutions.
    """

    def __init__(self, cfg: config.GatedDeltaNet, context: Context, rngs: nnx.Rngs):
        d, h, k = context.width, cfg.num_heads, cfg.head_dim
        r, v = value_shape(cfg)
        self.cfg, self.context = cfg, context
        self.q = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation="silu")
        self.k = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation="silu")
        self.v = HeadProjection(rngs, context, r, v, conv_width=cfg.conv_width, activation="silu")
        self.w_b = param(rngs, (d, r), ("embed", "heads"), fan_in_normal(1.0))
        self.decay = HeadDecay(rngs, context, r)
        self.g = HeadProjection(rngs, context, r, v) if cfg.output_gate else None
        self.norm = GatedRMSNorm(rngs, v, context.norm_eps, cfg.output_gate)
        self.w_o = param(rngs, (r, v, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        (q, k, v), new = project_all(self._convolved(), x, segments, state)
        beta = jax.nn.sigmoid(project_gates(x, self.w_b))
        o, s = gated_delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            v,
            2.0 * beta if self.cfg.allow_neg_eigval else beta,
            self.decay(x),
            s0=None if state is None else state["s"],
            segment_ids=segments.ids,
            positions=segments.positions,
            impl=self.context.kernels.gated_delta_rule,
        )
        gate = None if self.g is None else self.g(x, segments)[0]
        return project_out(self.norm(o, gate), self.w_o), None if state is None else new | {"s": s}, carry

    def _convolved(self) -> dict[str, HeadProjection]:
        return {"conv_q": self.q, "conv_k": self.k, "conv_v": self.v}

    def init_state(self, batch: int, length: int) -> State:
        r, v = value_shape(self.cfg)
        s = jnp.zeros((batch, r, self.cfg.head_dim, v), jnp.float32)
        return init_all(self._convolved(), batch) | {"s": constrain(s, "sequences", "heads", None, None)}

    @staticmethod
    def flops(cfg: config.GatedDeltaNet, context: Context, length: int) -> int:
        (r, v), keys = value_shape(cfg), cfg.num_heads * cfg.head_dim
        projections = context.width * (2 * keys + (3 if cfg.output_gate else 2) * r * v + 2 * r)
        convolutions = (cfg.conv_width or 0) * (2 * keys + r * v)
        return 2 * (projections + convolutions) + recurrence_flops(r, cfg.head_dim, v, erase=True)


def value_shape(cfg: config.GatedDeltaNet | config.DeltaProduct) -> tuple[int, int]:
    """Number of value heads and their dim."""
    return cfg.num_value_heads or cfg.num_heads, cfg.value_head_dim or 2 * cfg.head_dim
