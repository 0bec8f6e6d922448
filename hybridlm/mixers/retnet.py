"""Multi-scale retention (Sun et al., 2023, arXiv:2307.08621, sections 2.1 and 2.2).

The norm per head has a scale and no mean, as flash-linear-attention's published models have it; the paper's group norm
subtracts the mean and has none.

Letters: b batch, t time, d model width, h heads, k key dim, v value dim.
"""

import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_linear_attention
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import fan_in_normal, rope
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.heads import GatedRMSNorm, HeadProjection, project_out, recurrence_flops
from hybridlm.sharding import constrain, param


class RetNet(nnx.Module):
    """S_t = gamma S_{t-1} + k_t v_t^T, o_t = k^-1/2 S_t^T q_t, y = W_o (rmsnorm(o) * silu(W_g x)) per head.

    q and k are rotated by their position in the document; gamma = 1 - 2^(-5 - i) in head i.
    State: `s` [b, h, k, v] float32.
    """

    def __init__(self, cfg: config.RetNet, context: Context, rngs: nnx.Rngs):
        d, h, k, v = context.width, cfg.num_heads, cfg.head_dim, cfg.value_head_dim
        self.cfg, self.context = cfg, context
        self.q = HeadProjection(rngs, context, h, k)
        self.k = HeadProjection(rngs, context, h, k)
        self.v = HeadProjection(rngs, context, h, v)
        self.gate = HeadProjection(rngs, context, h, v)
        self.norm = GatedRMSNorm(rngs, v, context.norm_eps)
        self.w_o = param(rngs, (h, v, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        q = rope(self.q(x, segments)[0], segments.positions, fraction=1.0, theta=self.cfg.rope_theta)
        k = rope(self.k(x, segments)[0], segments.positions, fraction=1.0, theta=self.cfg.rope_theta)
        v, _ = self.v(x, segments)
        # log1p: in late heads 1 - 2^(-5 - i) is 1 in float32.
        log_gamma = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.cfg.num_heads, dtype=jnp.float32))))
        o, s = gated_linear_attention(
            q,
            k,
            v,
            jnp.broadcast_to(log_gamma, q.shape[:3]),
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
    def flops(cfg: config.RetNet, context: Context, length: int) -> int:
        h, k, v = cfg.num_heads, cfg.head_dim, cfg.value_head_dim
        return 2 * context.width * h * (2 * k + 3 * v) + recurrence_flops(h, k, v, erase=False)
