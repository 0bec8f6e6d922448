"""Kimi delta attention: the delta rule with one decay per channel of the key (Kimi Linear, 2025, arXiv:2510.26692).

Letters: b batch, t time, d model width, h query-key heads, r value heads, k key dim, v value dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_delta_rule
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import contract, fan_in_normal, merge_tokens, split_tokens
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.heads import (
    GatedRMSNorm,
    HeadProjection,
    init_all,
    into_heads,
    l2_normalize,
    log_decay,
    log_uniform_rate,
    project_all,
    project_gates,
    project_heads,
    project_out,
    recurrence_flops,
    step_size_bias,
)
from hybridlm.sharding import constrain, param


class KimiDeltaAttention(nnx.Module):
    """y = W_o (norm(o) * sigmoid(W_g2 W_g1 x + b_g)) with o of the delta rule with decays per channel, per head:

    q, k = l2norm(silu(conv(W x))), v = silu(conv(W_v x)), beta = sigmoid(W_b x) (times 2 with `allow_neg_eigval`),
    f = W_f2 W_f1 x + dt_bias, log decay = -exp(A_log) softplus(f), or bound * sigmoid(exp(A_log) f) with a bound,
    S = Diag(decay) S, S += beta k (v - S^T k)^T, o = S^T q / sqrt(k). W_f1 and W_g1 are of rank v.

    State: `s` [b, r, k, v] float32; `conv_q`, `conv_k`, `conv_v` [b, conv_width - 1, channels] float32, the last inputs
    of the convolutions.
    """

    def __init__(self, cfg: config.KimiDeltaAttention, context: Context, rngs: nnx.Rngs):
        d, h, k = context.width, cfg.num_heads, cfg.head_dim
        r, v = value_shape(cfg)
        self.cfg, self.context = cfg, context
        self.q = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation="silu")
        self.k = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation="silu")
        self.v = HeadProjection(rngs, context, r, v, conv_width=cfg.conv_width, activation="silu")
        self.w_b = param(rngs, (d, r), ("embed", "heads"), fan_in_normal(1.0))
        self.w_f1 = param(rngs, (d, v), ("embed", None), fan_in_normal(1.0))
        self.w_f2 = param(rngs, (v, r, k), (None, "heads", None), into_heads)
        rates = nnx.initializers.zeros if cfg.decay_lower_bound is not None else log_uniform_rate(1.0, 16.0)
        self.A_log = param(rngs, (r,), ("heads",), rates)
        self.dt_bias = param(rngs, (r, k), ("heads", None), step_size_bias())
        self.w_g1 = param(rngs, (d, v), ("embed", None), fan_in_normal(1.0))
        self.w_g2 = param(rngs, (v, r, v), (None, "heads", None), into_heads)
        self.b_g = param(rngs, (r, v), ("heads", None), nnx.initializers.zeros) if cfg.gate_bias else None
        self.norm = GatedRMSNorm(rngs, v, context.norm_eps, "sigmoid")
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
            self._log_decay(x),
            s0=None if state is None else state["s"],
            segment_ids=segments.ids,
            positions=segments.positions,
            impl=self.context.kernels.gated_delta_rule,
        )
        gate = project_heads(project_down(x, self.w_g1), self.w_g2)
        gate = gate if self.b_g is None else gate + self.b_g[...].astype(gate.dtype)
        return project_out(self.norm(o, gate), self.w_o), None if state is None else new | {"s": s}, carry

    def _log_decay(self, x: Float[Array, "b t d"]) -> Float[Array, "b t r k"]:
        f = project_heads(project_down(x, self.w_f1), self.w_f2, jnp.float32)
        if self.cfg.decay_lower_bound is None:
            return log_decay(f, self.A_log[...], self.dt_bias[...])
        rate = jnp.exp(self.A_log[...])[:, None]
        return self.cfg.decay_lower_bound * jax.nn.sigmoid(rate * (f + self.dt_bias[...]))

    def _convolved(self) -> dict[str, HeadProjection]:
        return {"conv_q": self.q, "conv_k": self.k, "conv_v": self.v}

    def init_state(self, batch: int, length: int) -> State:
        r, v = value_shape(self.cfg)
        s = jnp.zeros((batch, r, self.cfg.head_dim, v), jnp.float32)
        return init_all(self._convolved(), batch) | {"s": constrain(s, "sequences", "heads", None, None)}

    @staticmethod
    def flops(cfg: config.KimiDeltaAttention, context: Context, length: int) -> int:
        (r, v), k = value_shape(cfg), cfg.head_dim
        keys, values = cfg.num_heads * k, r * v
        projections = context.width * (2 * keys + 2 * values + r + 2 * v) + v * r * (k + v)
        convolutions = (cfg.conv_width or 0) * (2 * keys + values)
        return 2 * (projections + convolutions) + recurrence_flops(r, k, v, erase=True)


def project_down(x: Float[Array, "b t d"], w: nnx.Param[Array]) -> Float[Array, "b t v"]:
    """x W for W [d, v], the same on every device of the heads' axis."""
    return split_tokens(contract("nd,dv->nv", merge_tokens(x), w[...], "batch", None), x)


def value_shape(cfg: config.KimiDeltaAttention) -> tuple[int, int]:
    """Number of value heads and their dim."""
    return cfg.num_value_heads or cfg.num_heads, cfg.value_head_dim or cfg.head_dim
