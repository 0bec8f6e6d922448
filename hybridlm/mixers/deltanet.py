"""DeltaNet: the delta rule without decay (Yang et al., 2024, arXiv:2406.06484; Schlag et al., 2021, arXiv:2102.11174).

Letters: b batch, t time, d model width, h heads, k key dim, v value dim.
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
    HeadProjection,
    init_all,
    l2_normalize,
    project_all,
    project_gates,
    project_out,
    recurrence_flops,
)
from hybridlm.sharding import constrain, param


class DeltaNet(nnx.Module):
    """y = W_o norm(o) with o of the delta rule, per head:

    q, k = l2norm(silu(conv(W x))), v = silu(conv(W_v x)), beta = sigmoid(W_b x) (times 2 with `allow_neg_eigval`),
    S += beta k (v - S^T k)^T, o = S^T q / sqrt(k).

    State: `s` [b, h, k, v] float32; `conv_q`, `conv_k`, `conv_v` [b, conv_width - 1, channels] float32, the last inputs
    of the convolutions.
    """

    def __init__(self, cfg: config.DeltaNet, context: Context, rngs: nnx.Rngs):
        d, h, k, v = context.width, cfg.num_heads, cfg.head_dim, value_dim(cfg)
        self.cfg, self.context = cfg, context
        self.q = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation=cfg.qk_activation)
        self.k = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation=cfg.qk_activation)
        self.v = HeadProjection(rngs, context, h, v, conv_width=cfg.conv_width, activation="silu")
        self.w_b = param(rngs, (d, h), ("embed", "heads"), fan_in_normal(1.0)) if cfg.use_beta else None
        self.g = HeadProjection(rngs, context, h, v) if cfg.output_gate else None
        self.norm = GatedRMSNorm(rngs, v, context.norm_eps, cfg.output_gate)
        self.w_o = param(rngs, (h, v, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        (q, k, v), new = project_all(self._convolved(), x, segments, state)
        normalize = {"l2": l2_normalize, "sum": sum_normalize}[self.cfg.qk_norm]
        if self.w_b is None:
            beta = jnp.ones_like(v[..., 0], jnp.float32)
        else:
            beta = jax.nn.sigmoid(project_gates(x, self.w_b))
        o, s = gated_delta_rule(
            normalize(q),
            normalize(k),
            v,
            2.0 * beta if self.cfg.allow_neg_eigval else beta,
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
        s = jnp.zeros((batch, self.cfg.num_heads, self.cfg.head_dim, value_dim(self.cfg)), jnp.float32)
        return init_all(self._convolved(), batch) | {"s": constrain(s, "sequences", "heads", None, None)}

    @staticmethod
    def flops(cfg: config.DeltaNet, context: Context, length: int) -> int:
        h, v, keys = cfg.num_heads, value_dim(cfg), cfg.num_heads * cfg.head_dim
        projections = context.width * (2 * keys + (3 if cfg.output_gate else 2) * h * v + (h if cfg.use_beta else 0))
        convolutions = (cfg.conv_width or 0) * (2 * keys + h * v)
        return 2 * (projections + convolutions) + recurrence_flops(h, cfg.head_dim, v, erase=True)


def value_dim(cfg: config.DeltaNet) -> int:
    return cfg.value_head_dim or cfg.head_dim


def sum_normalize(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """x / max(sum|x|, 1e-6) over the last axis, computed in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide / jnp.maximum(jnp.sum(jnp.abs(wide), axis=-1, keepdims=True), 1e-6)).astype(x.dtype)
