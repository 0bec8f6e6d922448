"""The experts: gated MLPs with their weights stacked. Letters: x experts, r rows, d model width, f FFN width."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import grouped_matmul
from jaxtyping import Array, Float, Int

from hybridlm import config
from hybridlm.ffns.gated_mlp import ACTIVATIONS
from hybridlm.layers import fan_in_normal, gather_weight, gradient_dtype
from hybridlm.mixers.base import Context
from hybridlm.sharding import param

Weights = tuple[Array, Array, Array]
"""W_gate, W_up [x d f] and W_down [x f d]."""
AXES = ("experts", "expert_embed", "mlp"), ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
"""How the three weights are laid out; while a device computes, they are whole over d."""


class Experts(nnx.Module):
    """(act(x W_gate) * x W_up) W_down, one set of weights per expert.

    The methods compute with one device's experts and part of f, inside a `jax.shard_map`: over `tensor` their results
    are parts of a sum.
    """

    def __init__(self, cfg: config.MoE, context: Context, rngs: nnx.Rngs):
        x, d, f = cfg.num_experts, context.width, cfg.hidden
        self.activation = ACTIVATIONS[getattr(config, cfg.activation)]
        self.impl = context.kernels.grouped_matmul
        self.w_gate = param(rngs, (x, d, f), ("experts", "expert_embed", "mlp"), fan_in_normal(1.0, in_axis=1))
        self.w_up = param(rngs, (x, d, f), ("experts", "expert_embed", "mlp"), fan_in_normal(1.0, in_axis=1))
        init = fan_in_normal(2.0 / context.num_layers, in_axis=1)
        self.w_down = param(rngs, (x, f, d), ("experts", "mlp", "expert_embed"), init)

    def weights(self, dtype: jnp.dtype) -> Weights:
        """In their layout, to be taken into a `jax.shard_map`. Cast, so that gradients are added up in `dtype`, unless
        they are to be in another one."""
        held = dtype if gradient_dtype.value is None else jnp.float32
        return self.w_gate[...].astype(held), self.w_up[...].astype(held), self.w_down[...].astype(held)

    @staticmethod
    def gathered(weights: Weights, dtype: jnp.dtype) -> Weights:
        """As they are computed with, in `dtype`. Inside a `jax.shard_map`."""
        w_gate, w_up, w_down = weights
        whole = partial(gather_weight, logical="expert_embed", dtype=dtype.name)
        return whole(w_gate, 1), whole(w_up, 1), whole(w_down, 2)

    def grouped(self, weights: Weights, rows: Float[Array, "r d"], sizes: Int[Array, " e"]) -> Float[Array, "r d"]:
        """Each expert on its rows, of which it has `sizes`, in the order of the experts. 0 in rows beyond the last."""
        w_gate, w_up, w_down = weights
        # One product: rows are read once, and so is the sum of their two cotangents.
        both = grouped_matmul(rows, jnp.concatenate([w_gate, w_up], axis=-1), sizes, impl=self.impl)

        # Recomputed in the backward pass, which keeps `both` alone: hidden rows are as many again by half.
        @jax.checkpoint
        def down(both: Float[Array, "r f2"], w_down: Float[Array, "x f d"]) -> Float[Array, "r d"]:
            gate, up = jnp.split(both, 2, axis=-1)
            return grouped_matmul(self.activation(gate) * up, w_down, sizes, impl=self.impl)

        return down(both, w_down)

    def batched(self, weights: Weights, rows: Float[Array, "x r d"]) -> Float[Array, "x r d"]:
        """Each expert on as many rows."""
        w_gate, w_up, w_down = weights
        gate, up = (jnp.einsum("xrd,xdf->xrf", rows, w) for w in (w_gate, w_up))
        return jnp.einsum("xrf,xfd->xrd", self.activation(gate) * up, w_down)
