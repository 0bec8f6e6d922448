"""DeltaProduct: several delta rule steps per token (Siems et al., 2025, arXiv:2502.10297).

Letters: b batch, t time, n steps per token, d model width, h query-key heads, r value heads, k key dim, v value dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_delta_rule
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.gated_deltanet import value_shape
from hybridlm.mixers.heads import (
    GatedRMSNorm,
    HeadDecay,
    HeadProjection,
    init_all,
    into_heads,
    l2_normalize,
    project_all,
    project_heads,
    project_out,
    recurrence_flops,
)
from hybridlm.sharding import constrain, param


class DeltaProduct(nnx.Module):
    """Gated DeltaNet whose state takes n steps per token, each with a key, a value and a beta of its own.

    S = decay S once, then S += beta_j k_j (v_j - S^T k_j)^T for j = 1 ... n, and o = S^T q / sqrt(k) after the last:
    the transition is a decay times a product of n Householder matrices. All else is as in `GatedDeltaNet`.

    A head's channels of `k`, `v` and `w_b` are ordered by step: a published weight's columns [n h k] become [h, n k].

    State: `s` [b, r, k, v] float32; `conv_q`, `conv_k`, `conv_v` [b, conv_width - 1, channels] float32.
    """

    def __init__(self, cfg: config.DeltaProduct, context: Context, rngs: nnx.Rngs):
        d, n, h, k = context.width, cfg.num_householder, cfg.num_heads, cfg.head_dim
        r, v = value_shape(cfg)
        self.cfg, self.context = cfg, context
        self.q = HeadProjection(rngs, context, h, k, conv_width=cfg.conv_width, activation="silu")
        self.k = HeadProjection(rngs, context, h, n * k, conv_width=cfg.conv_width, activation="silu")
        self.v = HeadProjection(rngs, context, r, n * v, conv_width=cfg.conv_width, activation="silu")
        self.w_b = param(rngs, (d, r, n), ("embed", "heads", None), into_heads)
        self.decay = HeadDecay(rngs, context, r) if cfg.use_decay else None
        self.g = HeadProjection(rngs, context, r, v) if cfg.output_gate else None
        self.norm = GatedRMSNorm(rngs, v, context.norm_eps, cfg.output_gate)
        self.w_o = param(rngs, (r, v, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        n = self.cfg.num_householder
        (q, k, v), new = project_all(self._convolved(), x, segments, state)
        k, v = steps_in_time(k, n), steps_in_time(v, n)
        beta = steps_in_time(jax.nn.sigmoid(project_heads(x, self.w_b, jnp.float32)), n)[..., 0]  # b tn r
        o, s = gated_delta_rule(
            pad_steps(l2_normalize(q), n, at=n - 1),
            l2_normalize(k),
            v,
            2.0 * beta if self.cfg.allow_neg_eigval else beta,
            None if self.decay is None else pad_steps(self.decay(x), n, at=0),
            s0=None if state is None else state["s"],
            segment_ids=(segments.ids[:, :, None] + jnp.zeros(n, jnp.int32)).reshape(x.shape[0], -1),
            # A document begins with the first step of its first token alone.
            positions=(n * segments.positions[:, :, None] + jnp.arange(n)).reshape(x.shape[0], -1),
            impl=self.context.kernels.gated_delta_rule,
        )
        gate = None if self.g is None else self.g(x, segments)[0]
        y = project_out(self.norm(o[:, n - 1 :: n], gate), self.w_o)
        return y, None if state is None else new | {"s": s}, carry

    def _convolved(self) -> dict[str, HeadProjection]:
        return {"conv_q": self.q, "conv_k": self.k, "conv_v": self.v}

    def init_state(self, batch: int, length: int) -> State:
        r, v = value_shape(self.cfg)
        s = jnp.zeros((batch, r, self.cfg.head_dim, v), jnp.float32)
        return init_all(self._convolved(), batch) | {"s": constrain(s, "sequences", "heads", None, None)}

    @staticmethod
    def flops(cfg: config.DeltaProduct, context: Context, length: int) -> int:
        n, (r, v), keys = cfg.num_householder, value_shape(cfg), cfg.num_heads * cfg.head_dim
        into_values = n + (2 if cfg.output_gate else 1)
        gates = n * r + (r if cfg.use_decay else 0)
        projections = context.width * ((1 + n) * keys + into_values * r * v + gates)
        convolutions = (cfg.conv_width or 0) * ((1 + n) * keys + n * r * v)
        # Steps but the last are not read by a query, yet computed as if they were.
        return 2 * (projections + convolutions) + n * recurrence_flops(r, cfg.head_dim, v, erase=True)


def steps_in_time(x: Float[Array, "b t h nk"], num_steps: int) -> Float[Array, "b tn h k"]:
    """The steps that a head's channels are made of, one after another in time."""
    batch, time, heads, channels = x.shape
    steps = x.reshape(batch, time, heads, num_steps, channels // num_steps)
    return jnp.moveaxis(steps, 3, 2).reshape(batch, time * num_steps, heads, -1)


def pad_steps(x: Float[Array, "b t *rest"], num_steps: int, *, at: int) -> Float[Array, "b tn *rest"]:
    """What a token has once, at its step `at`; zeros at its other steps."""
    padding = [(0, 0), (0, 0), (at, num_steps - 1 - at), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x[:, :, None], padding).reshape(x.shape[0], -1, *x.shape[2:])
