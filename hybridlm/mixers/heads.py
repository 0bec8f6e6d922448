"""Small parts of mixers whose state is a matrix per head: projections into heads, norms, and Mamba's decay.

Letters: b batch, t time, d model width, h heads, k key dim or any head dim, w conv width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import short_conv
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from hybridlm.layers import contract, fan_in_normal, merge_tokens, split_tokens
from hybridlm.mixers.base import Context, Segments, State, continues, document_numbers
from hybridlm.sharding import constrain, param

ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    # 1 + ELU, positive everywhere (Katharopoulos et al., 2020, arXiv:2006.16236).
    "elu": lambda x: jax.nn.elu(x) + 1.0,
}
IN_CONVOLUTION = (None, "silu", "relu")
"""Activations that `short_conv` applies itself."""
SMALLEST_RATE = 1e-4
"""Of a decay: the logarithm of a rate that was drawn as 0 would be infinite."""


class HeadProjection(nnx.Module):
    """activation(conv(x W)) in heads: queries, keys, values and gates. Without `conv_width` there is no convolution.

    W is [d, h, k] and the taps are [w, h, k]: a published linear layer's weight, transposed and split into heads.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        context: Context,
        num_heads: int,
        head_dim: int,
        *,
        conv_width: int | None = None,
        conv_bias: bool = False,
        activation: str | None = None,
    ):
        self.context, self.activation = context, activation
        self.w = param(rngs, (context.width, num_heads, head_dim), ("embed", "heads", None), into_heads)
        taps, channels = (conv_width or 0, num_heads, head_dim), ("heads", None)
        self.conv = param(rngs, taps, (None, *channels), uniform_taps) if conv_width else None
        self.conv_bias = param(rngs, taps[1:], channels, nnx.initializers.zeros) if conv_width and conv_bias else None

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, held: Float[Array, "b w c"] | None = None
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b w c"] | None]:
        """The heads, and the convolution's inputs to go on with when `held` are those before the first token."""
        heads = project_heads(x, self.w)
        if self.conv is None:
            return ACTIVATIONS[self.activation](heads), None
        num_heads = heads.shape[2]
        if held is not None:
            held = jnp.where(continues(segments)[:, None, None], held, 0.0)
        in_convolution = self.activation in IN_CONVOLUTION
        y, new = short_conv(
            merge_heads(heads),
            merge_heads(self.conv[...]),
            bias=None if self.conv_bias is None else merge_heads(self.conv_bias[...]),
            state=held,
            segment_ids=document_numbers(segments),
            activation=self.activation if in_convolution else None,
            impl=self.context.kernels.short_conv,
        )
        y = y if in_convolution else ACTIVATIONS[self.activation](y)
        return split_heads(y, num_heads), None if held is None else new

    def init_held(self, batch: int) -> Float[Array, "b w c"] | None:
        """The convolution's inputs before the first token, [b, w - 1, h k] float32; None without a convolution."""
        if self.conv is None:
            return None
        width, num_heads, head_dim = self.conv.shape
        return constrain(jnp.zeros((batch, width - 1, num_heads * head_dim), jnp.float32), "sequences", None, "heads")


class HeadDecay(nnx.Module):
    """One log decay per head and token, -exp(A_log) softplus(x W + dt_bias), drawn as Mamba-2 and Gated DeltaNet do.

    exp(A_log) is uniform in (0, 16), softplus(dt_bias) log-uniform in (0.001, 0.1).
    """

    def __init__(self, rngs: nnx.Rngs, context: Context, num_heads: int):
        self.w = param(rngs, (context.width, num_heads), ("embed", "heads"), fan_in_normal(1.0))
        self.A_log = param(rngs, (num_heads,), ("heads",), log_uniform_rate(0.0, 16.0))
        self.dt_bias = param(rngs, (num_heads,), ("heads",), step_size_bias())

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h"]:
        return log_decay(project_gates(x, self.w), self.A_log[...], self.dt_bias[...])


def project_all(
    projections: dict[str, HeadProjection], x: Float[Array, "b t d"], segments: Segments, state: State | None
) -> tuple[list[Float[Array, "b t _ _"]], State]:
    """What each projection makes of `x`, and what its convolution holds by the same name; nothing without a state."""
    outputs, new = [], {}
    for name, projection in projections.items():
        y, held = projection(x, segments, None if state is None else state.get(name))
        outputs.append(y)
        if held is not None:
            new[name] = held
    return outputs, new


def init_all(projections: dict[str, HeadProjection], batch: int) -> State:
    """What the convolutions of `project_all` hold before the first token."""
    held = {name: projection.init_held(batch) for name, projection in projections.items()}
    return {name: x for name, x in held.items() if x is not None}


class GatedRMSNorm(nnx.Module):
    """x / rms(x) * scale * activation(gate) over the last axis, in float32; `scale` [k] starts at 1, shared by heads.

    The norm comes before the gate. Without a gate this is an RMSNorm per head.
    """

    def __init__(self, rngs: nnx.Rngs, head_dim: int, eps: float, activation: str | None = "silu"):
        self.scale = param(rngs, (head_dim,), (None,), nnx.initializers.ones)
        self.eps, self.activation = eps, activation

    def __call__(
        self, x: Float[Array, "b t h k"], gate: Float[Array, "b t h k"] | None = None
    ) -> Float[Array, "b t h k"]:
        normed = rms_normalize(x, self.eps) * self.scale[...]
        if gate is not None:
            normed = normed * ACTIVATIONS[self.activation](gate.astype(jnp.float32))
        return normed.astype(x.dtype)


def rms_normalize(x: Float[Array, "*b k"], eps: float) -> Float[Array, "*b k"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


def l2_normalize(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, computed in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def project_heads(x: Float[Array, "b t d"], w: nnx.Param[Array], dtype: Any = None) -> Float[Array, "b t h k"]:
    """x W for W [d, h, k], in x's dtype or another that the products are summed in."""
    heads = contract("nd,dhk->nhk", merge_tokens(x), w[...], "batch", "heads", None, dtype=dtype)
    return split_tokens(heads, x)


def project_gates(x: Float[Array, "b t d"], w: nnx.Param[Array]) -> Float[Array, "b t h"]:
    """x W in float32 for W [d, h]: one number per head, for gates and decays, which bfloat16 is too coarse for."""
    gates = contract("nd,dh->nh", merge_tokens(x), w[...], "batch", "heads", dtype=jnp.float32)
    return split_tokens(gates, x)


def project_out(heads: Float[Array, "b t h k"], w: nnx.Param[Array]) -> Float[Array, "b t d"]:
    """Heads back to the model width, for W [h, k, d]."""
    return contract("bthk,hkd->btd", heads, w[...], "sequences", "time", None)


def split_heads(x: Float[Array, "*b c"], num_heads: int) -> Float[Array, "*b h k"]:
    """[..., h k] -> [..., h, k]; what the channels are sharded over, the heads then are."""
    sharding = jax.typeof(x).sharding
    out = None if sharding.mesh.empty else PartitionSpec(*sharding.spec, None)
    return jnp.reshape(x, (*x.shape[:-1], num_heads, -1), out_sharding=out)


def merge_heads(x: Float[Array, "*b h k"]) -> Float[Array, "*b c"]:
    """The inverse of `split_heads`."""
    sharding = jax.typeof(x).sharding
    out = None if sharding.mesh.empty else PartitionSpec(*sharding.spec[:-1])
    return jnp.reshape(x, (*x.shape[:-2], -1), out_sharding=out)


def log_decay(
    x: Float[Array, "b t h *k"], log_rate: Float[Array, " h"], bias: Float[Array, "h *k"]
) -> Float[Array, "b t h *k"]:
    """-exp(log_rate) softplus(x + bias) in float32 (Mamba-2: Dao and Gu, 2024, arXiv:2405.21060)."""
    rate = jnp.exp(log_rate).reshape(-1, *[1] * (x.ndim - 3))
    return -rate * jax.nn.softplus(x.astype(jnp.float32) + bias)


def log_uniform_rate(low: float, high: float) -> Callable[..., Array]:
    """Initialiser of `log_rate`: log A with A uniform in (low, high)."""

    def init(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "..."]:
        return jnp.log(jnp.maximum(jax.random.uniform(key, shape, dtype, low, high), SMALLEST_RATE))

    return init


def step_size_bias(low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Callable[..., Array]:
    """Initialiser of the decay's bias: softplus(bias) is log-uniform in (low, high), and at least `floor`."""

    def init(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "..."]:
        log_dt = jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))
        dt = jnp.maximum(jnp.exp(log_dt), floor)
        return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus

    return init


def uniform_taps(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "w h k"]:
    """Uniform in +-1 / sqrt(w), as PyTorch draws the depthwise convolutions of the published models."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


into_heads = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
"""Normal with variance 1 / d for [d, h, k]."""


def recurrence_flops(num_heads: int, key_dim: int, value_dim: int, *, erase: bool) -> int:
    """Of one token: the state is written and read, and read once more to be erased (the delta rule).

    What a chunk of tokens costs among themselves is left out: it depends on the implementation.
    """
    return 2 * num_heads * key_dim * value_dim * (3 if erase else 2)
