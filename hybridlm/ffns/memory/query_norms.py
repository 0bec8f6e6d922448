"""What queries pass through before they meet keys. Inside `per_device`. Letters: n tokens, h heads, e query width."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from hybridlm.ffns.base import Aux
from hybridlm.layers import RMSNorm
from hybridlm.sharding import param, total

EPSILON = 1e-5


class QueryNorm(Protocol):
    def __call__(
        self, queries: Float[Array, "n h e"], real: Bool[Array, " n"], *, training: bool
    ) -> tuple[Float[Array, "n h e"], Aux]: ...


class BatchNorm(nnx.Module):
    """(q - mean) / std * scale + bias of each feature (Ioffe and Szegedy, 2015, arXiv:1502.03167).

    In training over the real tokens of all devices; outside it by the running statistics. What moves those is their
    gradient, running - batch's: that of a term of the loss which is 0 itself. The optimizer subtracts a fixed share of
    it and nothing else, so that microbatches count by their tokens.
    """

    def __init__(self, rngs: nnx.Rngs, num_heads: int, width: int):
        shape, axes = (num_heads, width), (None, None)
        self.scale = param(rngs, shape, axes, nnx.initializers.ones)
        self.bias = param(rngs, shape, axes, nnx.initializers.zeros)
        self.running_mean = param(rngs, shape, axes, nnx.initializers.zeros)
        self.running_variance = param(rngs, shape, axes, nnx.initializers.ones)

    def __call__(
        self, queries: Float[Array, "n h e"], real: Bool[Array, " n"], *, training: bool
    ) -> tuple[Float[Array, "n h e"], Aux]:
        wide, running = queries.astype(jnp.float32), (self.running_mean[...], self.running_variance[...])
        aux: Aux = {}
        if training:
            mean = _mean(wide, real)
            variance = _mean(jnp.square(wide - mean), real)
            aux["memory_statistics_loss"] = _moves(running, (mean, variance))
        else:
            mean, variance = running
        normed = (wide - mean) * jax.lax.rsqrt(variance + EPSILON)
        return (normed * self.scale[...] + self.bias[...]).astype(queries.dtype), aux


class LayerNorm(nnx.Module):
    """(q - mean(q)) / std(q) * scale + bias of each head's query."""

    def __init__(self, rngs: nnx.Rngs, num_heads: int, width: int):
        self.scale = param(rngs, (num_heads, width), (None, None), nnx.initializers.ones)
        self.bias = param(rngs, (num_heads, width), (None, None), nnx.initializers.zeros)

    def __call__(
        self, queries: Float[Array, "n h e"], real: Bool[Array, " n"], *, training: bool
    ) -> tuple[Float[Array, "n h e"], Aux]:
        return (standardized(queries) * self.scale[...] + self.bias[...]).astype(queries.dtype), {}


class HalvesRMSNorm(nnx.Module):
    """RMSNorm of each half of a query, as keys get it that are normed too."""

    def __init__(self, rngs: nnx.Rngs, num_heads: int, width: int):
        self.norm = RMSNorm(rngs, width // 2, EPSILON)

    def __call__(
        self, queries: Float[Array, "n h e"], real: Bool[Array, " n"], *, training: bool
    ) -> tuple[Float[Array, "n h e"], Aux]:
        halves = queries.reshape(*queries.shape[:2], 2, -1)
        return self.norm(halves).reshape(queries.shape), {}


class NoNorm(nnx.Module):
    """q."""

    def __init__(self, rngs: nnx.Rngs, num_heads: int, width: int): ...

    def __call__(
        self, queries: Float[Array, "n h e"], real: Bool[Array, " n"], *, training: bool
    ) -> tuple[Float[Array, "n h e"], Aux]:
        return queries, {}


QUERY_NORMS: dict[str, Callable[[nnx.Rngs, int, int], QueryNorm]] = {
    "batch": BatchNorm,
    "layer": LayerNorm,
    "rms": HalvesRMSNorm,
    "none": NoNorm,
}


def standardized(x: Float[Array, "*n e"]) -> Float[Array, "*n e"]:
    """(x - mean(x)) / std(x) in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPSILON)


def _mean(values: Float[Array, "n h e"], real: Bool[Array, " n"]) -> Float[Array, "h e"]:
    """Over the real tokens of the whole batch."""
    tokens = jnp.maximum(total(jnp.sum(real), "batch"), 1)
    return total(jnp.sum(jnp.where(real[:, None, None], values, 0.0), axis=0), "batch") / tokens


def _moves(running: tuple[Array, Array], batch: tuple[Array, Array]) -> Float[Array, ""]:
    """0, with the gradient running - batch's in `running`."""
    squares = [jnp.sum(jnp.square(old - jax.lax.stop_gradient(new))) for old, new in zip(running, batch, strict=True)]
    half = 0.5 * (squares[0] + squares[1])
    return half - jax.lax.stop_gradient(half)
