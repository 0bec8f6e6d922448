"""Griffin's recurrent block (De et al., 2024, arXiv:2402.19427, sections 2.3 and 2.4, appendix A).

Letters: b batch, t time, d model width, e recurrence width, h gate blocks, k = e / h.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import rg_lru, short_conv
from jaxtyping import Array, Float, Key

from hybridlm import config
from hybridlm.layers import Linear, fan_in_normal, merge_tokens, split_tokens
from hybridlm.mixers.base import Carry, Context, Segments, State, continues, document_numbers
from hybridlm.sharding import constrain, param

DECAY_SCALE = 8.0
"""c of the paper: log a_t = -c softplus(L) r_t."""


class RGLRU(nnx.Module):
    """y = W_o (gelu(W_y x) * rg_lru(conv(W_x x))).

    State: `h` [b, e] float32, the recurrence; `conv` [b, conv_width - 1, e] float32, its last inputs.
    """

    def __init__(self, cfg: config.RGLRU, context: Context, rngs: nnx.Rngs):
        d, e, h = context.width, cfg.width, cfg.num_heads
        self.cfg, self.context = cfg, context
        self.in_x = Linear(rngs, d, e, ("embed", "lru"), bias=cfg.bias)
        self.in_y = Linear(rngs, d, e, ("embed", "lru"), bias=cfg.bias)
        self.w_conv = param(
            rngs, (cfg.conv_width, e), (None, "lru"), nnx.initializers.normal(0.1 / cfg.conv_width**0.5)
        )
        self.b_conv = param(rngs, (e,), ("lru",), nnx.initializers.zeros)
        self.w_gate_a = param(rngs, (h, e // h, e // h), ("lru", None, None), fan_in_normal(1.0, in_axis=1))
        self.b_gate_a = param(rngs, (h, e // h), ("lru", None), nnx.initializers.zeros)
        self.w_gate_x = param(rngs, (h, e // h, e // h), ("lru", None, None), fan_in_normal(1.0, in_axis=1))
        self.b_gate_x = param(rngs, (h, e // h), ("lru", None), nnx.initializers.zeros)
        self.decay = param(rngs, (e,), ("lru",), decay_init(cfg.init))
        self.out = Linear(rngs, e, d, ("lru", "embed"), bias=cfg.bias, scale=2.0 / context.num_layers)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        tokens = merge_tokens(x)
        y = jax.nn.gelu(self.in_y(tokens))
        h0 = conv0 = None
        if state is not None:
            h0, conv0 = state["h"], jnp.where(continues(segments)[:, None, None], state["conv"], 0.0)
        u, conv = short_conv(
            split_tokens(self.in_x(tokens), x),
            self.w_conv[...],
            bias=self.b_conv[...],
            state=conv0,
            segment_ids=document_numbers(segments),
            impl=self.context.kernels.short_conv,
        )
        # float32: bfloat16 gates were measured to cost 19 % output error, 51 % on slow channels.
        tokens32 = merge_tokens(u.astype(jnp.float32))
        h, h_last = rg_lru(
            u,
            split_tokens(self._gate(tokens32, self.w_gate_a, self.b_gate_a), x),
            split_tokens(self._gate(tokens32, self.w_gate_x, self.b_gate_x), x),
            self.decay[...],
            h0=h0,
            segment_ids=segments.ids,
            positions=segments.positions,
            scale=DECAY_SCALE,
            impl=self.context.kernels.rg_lru,
        )
        new_state = None if state is None else {"h": h_last, "conv": conv}
        out = self.out(y * merge_tokens(h.astype(y.dtype)))
        return split_tokens(out, x), new_state, carry

    def _gate(self, u: Float[Array, "bt e"], w: nnx.Param[Array], bias: nnx.Param[Array]) -> Float[Array, "bt e"]:
        """Block-diagonal linear map, so that tensor parallelism needs no communication here."""
        heads = u.reshape(u.shape[0], self.cfg.num_heads, -1)  # bt h k
        return (jnp.einsum("nhk,hkj->nhj", heads, w[...]) + bias[...]).reshape(u.shape)

    def init_state(self, batch: int, length: int) -> State:
        h = jnp.zeros((batch, self.cfg.width), jnp.float32)
        conv = jnp.zeros((batch, self.cfg.conv_width - 1, self.cfg.width), jnp.float32)
        return {"h": constrain(h, "sequences", "lru"), "conv": constrain(conv, "sequences", None, "lru")}

    @staticmethod
    def flops(cfg: config.RGLRU, context: Context, length: int) -> int:
        projections = 3 * context.width * cfg.width
        gates = 2 * cfg.width * cfg.width // cfg.num_heads
        return 2 * (projections + gates + cfg.conv_width * cfg.width)


def decay_init(kind: str):
    """Initialiser of L. With u uniform on a ring of radii in [0.9, 0.999]:

    `paper`: a = u at r = 1 (softplus(L) = -log(u) / c).
    `recurrentgemma`: its code omits c (softplus(L) = -log(u)), so a = u^8 at r = 1, in [0.43, 0.992].
    """
    scale = {"paper": DECAY_SCALE, "recurrentgemma": 1.0}[kind]

    def init(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Float[Array, " e"]:
        low, high = 0.9, 0.999
        uniform = jax.random.uniform(key, shape, dtype)
        if kind == "paper":
            minus_log = -jnp.log(low + (high - low) * uniform)
        else:
            minus_log = -0.5 * jnp.log(low**2 + (high**2 - low**2) * uniform)
        return jnp.log(jnp.expm1(minus_log / scale))

    return init
