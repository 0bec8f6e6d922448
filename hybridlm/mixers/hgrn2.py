"""HGRN2: a gated linear RNN with an outer product for a state (Qin et al., 2024, arXiv:2404.07904, section 3).

Letters: b batch, t time, d model width, h heads, k key dim, v value dim.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_linear_attention
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import fan_in_normal
from hybridlm.mixers.base import Carry, Context, Segments, State
from hybridlm.mixers.decays import project_logits
from hybridlm.mixers.group_norm import GroupRMSNorm
from hybridlm.mixers.heads import HeadProjection, into_heads, project_out, recurrence_flops
from hybridlm.sharding import constrain, param


class HGRN2(nnx.Module):
    """S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T, o_t = k^-1/2 S_t^T silu(W_q x_t), y = W_o rmsnorm(o) over all heads.

    f_t = l + (1 - l) sigmoid(W_f x_t), per channel. State: `s` [b, h, k, v] float32.

    The paper computes the lower bounds l of all layers from one array, as sums of a softmax over layers: 0 in the
    first, growing with depth. Here every layer learns its own, l = sigmoid(lower_bound), which can take the value of
    any published one; lower_bound = -100 stands for the first layer's 0.
    """

    def __init__(self, cfg: config.HGRN2, context: Context, rngs: nnx.Rngs):
        d, h, k, v = context.width, cfg.num_heads, cfg.head_dim, cfg.value_head_dim
        self.cfg, self.context = cfg, context
        self.q = HeadProjection(rngs, context, h, k, activation="silu")
        self.w_f = param(rngs, (d, h, k), ("embed", "heads", None), into_heads)
        self.v = HeadProjection(rngs, context, h, v)
        if cfg.lower_bound > 0:
            logit = math.log(cfg.lower_bound / (1 - cfg.lower_bound))
            self.lower_bound = param(rngs, (h, k), ("heads", None), nnx.initializers.constant(logit))
        else:
            self.lower_bound = None
        self.norm = GroupRMSNorm(rngs, h, v, cfg.norm_eps)
        self.w_o = param(rngs, (h, v, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        q, _ = self.q(x, segments)
        v, _ = self.v(x, segments)
        log_f, k = self._forget(project_logits(x, self.w_f))
        o, s = gated_linear_attention(
            q,
            k.astype(x.dtype),
            v,
            log_f,
            s0=None if state is None else state["s"],
            segment_ids=segments.ids,
            positions=segments.positions,
            impl=self.context.kernels.gated_linear_attention,
        )
        return project_out(self.norm(o), self.w_o), None if state is None else {"s": s}, carry

    def _forget(self, z: Float[Array, "b t h k"]) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h k"]]:
        """log f, and 1 - f without the cancellation of a subtraction from 1."""
        if self.lower_bound is None:
            return jax.nn.log_sigmoid(z), jax.nn.sigmoid(-z)
        bound = self.lower_bound[...]
        log_f = jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + jax.nn.log_sigmoid(z))
        return log_f, jax.nn.sigmoid(-bound) * jax.nn.sigmoid(-z)

    def init_state(self, batch: int, length: int) -> State:
        cfg = self.cfg
        s = jnp.zeros((batch, cfg.num_heads, cfg.head_dim, cfg.value_head_dim), jnp.float32)
        return {"s": constrain(s, "sequences", "heads", None, None)}

    @staticmethod
    def flops(cfg: config.HGRN2, context: Context, length: int) -> int:
        h, k, v = cfg.num_heads, cfg.head_dim, cfg.value_head_dim
        return 4 * context.width * h * (k + v) + recurrence_flops(h, k, v, erase=False)
