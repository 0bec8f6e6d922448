"""Next-token losses, without ever holding the logits of a whole large-vocabulary batch.

Letters: b batch, t time, d model width, v vocabulary, w words of one device.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.layers import add_up_gradient, gather_weight, gradient_dtype
from hybridlm.sharding import axis_size, fold_time, mesh_axes, per_device, position, total, unfold_time

LOGITS_PER_CHUNK = 2**22
"""Logits of one row kept at a time: at 256,000 words 16 tokens, 16 MiB a row."""


class Head(NamedTuple):
    """What turns features into logits."""

    weight: Float[Array, "v d"] | Float[Array, "d v"]
    """The embedding where `tied`."""
    tied: bool
    soft_cap: float | None = None

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical, of the weight."""
        return ("vocab", None) if self.tied else ("embed", "logits")

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0 if self.tied else 1]


def token_losses(
    head: Head, x: Float[Array, "b t d"], targets: Int[Array, "b t"]
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """-log p(target) in nats and log Z of every token, float32.

    Logits are computed in chunks of time, and once more in the backward pass. Each device gathers its part of the
    vocabulary once, and adds up that part's gradient over all of its tokens.
    """
    chunk = max(1, LOGITS_PER_CHUNK // head.vocab_size)
    options = _Options(head.axes, head.tied, head.soft_cap, chunk, gradient_dtype.value)
    losses: Any = _losses(options, head.weight, fold_time(x), fold_time(targets))
    nll, log_z = map(unfold_time, losses)
    return nll, log_z


@dataclass(frozen=True)
class _Options:
    axes: tuple[str | None, ...]
    tied: bool
    soft_cap: float | None
    chunk: int
    summed_in: str | None

    def logits(self, x: Float[Array, "b t d"], weight: Array) -> Float[Array, "b t w"]:
        equation = "btd,wd->btw" if self.tied else "btd,dw->btw"
        return jnp.einsum(equation, x, weight, preferred_element_type=jnp.float32)

    def capped(self, y: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        return y if self.soft_cap is None else self.soft_cap * jnp.tanh(y / self.soft_cap)

    def words(self, weight: Array) -> Int[Array, " w"]:
        """Those of a device's part of the vocabulary, which it has gathered from blocks that lie far apart."""
        if not self.tied:
            return position("logits") * weight.shape[1] + jnp.arange(weight.shape[1])
        blocks, devices = axis_size("embed"), axis_size("logits")
        size = weight.shape[0] // blocks
        first = (jnp.arange(blocks) * devices + position("logits")) * size
        return (first[:, None] + jnp.arange(size)).reshape(-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options: _Options, weight: Array, x: Array, targets: Array) -> tuple[Array, Array]:
    tokens = ("batch", None)
    run = per_device(partial(_losses_of_device, options), (options.axes, tokens, tokens), (tokens, tokens))
    return run(weight, x, targets)


def _losses_of_device(options: _Options, weight: Array, x: Array, targets: Array) -> tuple[Array, Array]:
    weight = gather_weight(weight, 0, "embed", x.dtype.name)
    words = options.words(weight)

    def of_chunk(x: Float[Array, "b t d"], targets: Int[Array, "b t"]) -> tuple[Array, Array]:
        y = options.capped(options.logits(x, weight))
        top = highest(jnp.max(y, axis=-1))
        log_z = top + jnp.log(total(jnp.sum(jnp.exp(y - top[..., None]), axis=-1), "logits"))
        # A masked sum, not a gather: each device sums over its part of the vocabulary.
        picked = total(jnp.sum(jnp.where(words == targets[..., None], y, 0.0), axis=-1), "logits")
        return log_z - picked, log_z

    t = x.shape[1]
    if options.chunk >= t:
        return of_chunk(x, targets)
    parts = jax.lax.map(lambda part: of_chunk(*part), chunks(options.chunk, (x, targets)))
    nll, log_z = (joined(part)[:, :t] for part in parts)
    return nll, log_z


def highest(x: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Inside `per_device`: the largest over the devices that share the vocabulary."""
    axes = mesh_axes("logits")
    return jax.lax.pmax(x, axes) if axes else x


def _losses_forward(options: _Options, weight: Array, x: Array, targets: Array) -> Any:
    losses: Any = _losses(options, weight, x, targets)
    return losses, (weight, x, targets, losses[1])


def _losses_backward(options: _Options, kept: Any, cotangents: Any) -> tuple[Array, Array, None]:
    tokens = ("batch", None)
    in_axes, out_axes = (options.axes, *[tokens] * 5), (options.axes, tokens)
    dweight, dx = per_device(partial(_gradients_of_device, options), in_axes, out_axes)(*kept, *cotangents)
    return dweight, dx, None


def _gradients_of_device(
    options: _Options, weight: Array, x: Array, targets: Array, log_z: Array, dnll: Array, dlog_z: Array
) -> tuple[Array, Array]:
    whole = gather_weight(weight, 0, "embed", x.dtype.name)
    words = options.words(whole)

    def of_chunk(dweight: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        x, targets, log_z, dnll, dlog_z = part
        y = options.capped(options.logits(x, whole))
        probability = jnp.exp(y - log_z[..., None])
        dy = (dnll + dlog_z)[..., None] * probability - jnp.where(words == targets[..., None], dnll[..., None], 0.0)
        if options.soft_cap is not None:
            dy = dy * (1 - jnp.square(y / options.soft_cap))
        dy = dy.astype(x.dtype)
        back, grow = ("btw,wd->btd", "btw,btd->wd") if options.tied else ("btw,dw->btd", "btw,btd->dw")
        dx = jnp.einsum(back, dy, whole, preferred_element_type=jnp.float32)
        return dweight + jnp.einsum(grow, dy, x, preferred_element_type=jnp.float32), dx

    zeros = jnp.zeros(whole.shape, jnp.float32)
    parts = (x, targets, log_z, dnll, dlog_z)
    t = x.shape[1]
    if options.chunk >= t:
        dweight, dx = of_chunk(zeros, parts)
    else:
        dweight, dx = jax.lax.scan(of_chunk, zeros, chunks(options.chunk, parts))
        dx = joined(dx)[:, :t]
    dx = total(dx.astype(x.dtype), "logits")
    return add_up_gradient(dweight, options.summed_in or x.dtype.name).astype(weight.dtype), dx


_losses.defvjp(_losses_forward, _losses_backward)


def chunks(size: int, parts: tuple[Array, ...]) -> tuple[Array, ...]:
    """[b, t, ...] as [n, b, size, ...]; zeros fill up the last."""

    def cut(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size), *[(0, 0)] * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

    return tuple(map(cut, parts))


def joined(x: Float[Array, "n b c *rest"]) -> Float[Array, "b t *rest"]:
    """The inverse of `chunks`, but for what filled up the last."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
