"""Mamba-2's block: state space duality with a short convolution (Dao and Gu, 2024, arXiv:2405.21060, section 7).

Letters: b batch, t time, d model width, h heads, g groups, n state dim (the key dim), p head dim (the value dim).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import gated_linear_attention, short_conv
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.layers import contract, fan_in_normal
from hybridlm.mixers.base import Carry, Context, Segments, State, continues, document_numbers
from hybridlm.mixers.group_norm import GroupRMSNorm
from hybridlm.mixers.heads import (
    HeadProjection,
    init_all,
    into_heads,
    log_uniform_rate,
    merge_heads,
    project_all,
    project_gates,
    project_out,
    recurrence_flops,
    split_heads,
    step_size_bias,
    uniform_taps,
)
from hybridlm.sharding import axis_size, constrain, param


class Mamba2(nnx.Module):
    """S_t = exp(-A dt_t) S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t + D x_t, out = W_o rmsnorm_group(y * silu(z)).

    x, B, C = silu(conv(W u)), dt = softplus(W_dt u + bias) and z = W_z u of the input u; A > 0, D and dt are one number
    per head, B and C are shared by the h / g heads of a group. The published fused projection is [W_z, W_x, W_B, W_C,
    W_dt] and its convolution [x, B, C], in this order.
    State: `s` [b, h, n, p], `conv_x` [b, conv_width - 1, h p], `conv_bc` [b, conv_width - 1, 2 g n], float32.
    """

    def __init__(self, cfg: config.Mamba2, context: Context, rngs: nnx.Rngs):
        d, h, g, n, p = context.width, cfg.num_heads, cfg.num_groups, cfg.state_dim, cfg.head_dim
        self.cfg, self.context = cfg, context
        self.z = HeadProjection(rngs, context, h, p)
        self.x = HeadProjection(rngs, context, h, p, conv_width=cfg.conv_width, conv_bias=True, activation="silu")
        # There are few groups, mostly one: every device computes all of them.
        self.w_bc = param(rngs, (d, 2 * g, n), ("embed", None, None), into_heads)
        self.conv_bc = param(rngs, (cfg.conv_width, 2 * g, n), (None, None, None), uniform_taps)
        self.conv_bc_bias = param(rngs, (2 * g, n), (None, None), nnx.initializers.zeros)
        self.w_dt = param(rngs, (d, h), ("embed", "heads"), fan_in_normal(1.0))
        self.dt_bias = param(rngs, (h,), ("heads",), step_size_bias())
        self.log_rate = param(rngs, (h,), ("heads",), log_uniform_rate(1.0, 16.0))  # log A
        self.skip = param(rngs, (h,), ("heads",), nnx.initializers.ones)  # D
        self.norm = GroupRMSNorm(rngs, h, p, context.norm_eps, g)
        self.w_o = param(rngs, (h, p, d), ("heads", None, "embed"), fan_in_normal(2.0 / context.num_layers, (0, 1)))

    def __call__(
        self, u: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        held = {} if state is None else state
        (x,), conv = project_all({"conv_x": self.x}, u, segments, state)
        b, c, conv_bc = self._keys_and_queries(u, segments, held.get("conv_bc"))
        dt = jax.nn.softplus(project_gates(u, self.w_dt) + self.dt_bias[...])
        dt = jnp.clip(dt, self.cfg.dt_low, self.cfg.dt_high)
        wide = x.astype(jnp.float32)
        y, s = gated_linear_attention(
            c,
            b,
            (dt[..., None] * wide).astype(x.dtype),
            -jnp.exp(self.log_rate[...]) * dt,
            scale=1.0,
            s0=held.get("s"),
            segment_ids=segments.ids,
            positions=segments.positions,
            impl=self.context.kernels.gated_linear_attention,
        )
        y = y.astype(jnp.float32) + self.skip[...][:, None] * wide
        z = self.z(u, segments)[0].astype(jnp.float32)
        out = project_out(self.norm(y * jax.nn.silu(z)).astype(u.dtype), self.w_o)
        return out, None if state is None else {"s": s, **conv, "conv_bc": conv_bc}, carry

    def _keys_and_queries(
        self, u: Float[Array, "b t d"], segments: Segments, held: Float[Array, "b w c"] | None
    ) -> tuple[Float[Array, "b t g n"], Float[Array, "b t g n"], Float[Array, "b w c"]]:
        """B and C, each group once on each device that has heads of it, and the last inputs of their convolution."""
        bc = contract("btd,dgn->btgn", u, self.w_bc[...], "sequences", "time", None, None)
        bc, held = short_conv(
            merge_heads(bc),
            merge_heads(self.conv_bc[...]),
            bias=merge_heads(self.conv_bc_bias[...]),
            state=None if held is None else jnp.where(continues(segments)[:, None, None], held, 0.0),
            segment_ids=document_numbers(segments),
            activation="silu",
            impl=self.context.kernels.short_conv,
        )
        g, devices = self.cfg.num_groups, axis_size("heads")
        b, c = jnp.split(split_heads(bc, 2 * g), 2, axis=2)
        copies = devices // math.gcd(g, devices)
        b, c = (constrain(jnp.repeat(part, copies, axis=2), "sequences", "time", "heads", None) for part in (b, c))
        return b, c, held

    def init_state(self, batch: int, length: int) -> State:
        cfg = self.cfg
        s = jnp.zeros((batch, cfg.num_heads, cfg.state_dim, cfg.head_dim), jnp.float32)
        bc = jnp.zeros((batch, cfg.conv_width - 1, 2 * cfg.num_groups * cfg.state_dim), jnp.float32)
        return {
            "s": constrain(s, "sequences", "heads", None, None),
            **init_all({"conv_x": self.x}, batch),
            "conv_bc": constrain(bc, "sequences", None, None),
        }

    @staticmethod
    def flops(cfg: config.Mamba2, context: Context, length: int) -> int:
        inner, groups = cfg.num_heads * cfg.head_dim, 2 * cfg.num_groups * cfg.state_dim
        projections = context.width * (3 * inner + groups + cfg.num_heads)
        taps = cfg.conv_width * (inner + groups)
        return 2 * (projections + taps) + recurrence_flops(cfg.num_heads, cfg.state_dim, cfg.head_dim, erase=False)
