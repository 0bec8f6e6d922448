"""How far a student's next-token probabilities are from a teacher's, without ever holding all logits of either.

Letters: b batch, t time, d model width, e model width of the teacher, w words of one device.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridlm.layers import add_up_gradient, gather_weight, gradient_dtype
from hybridlm.losses import LOGITS_PER_CHUNK, Head, chunks, highest, joined
from hybridlm.sharding import constrain, fold_time, per_device, total, unfold_time

TOKENS = ("batch", None)
HEAD = ("embed", "logits")


@dataclass(frozen=True)
class Divergence:
    """D(p, q) in nats of a teacher's p and a student's q = softmax(logits / temperature).

    forward_kl is KL(p||q), reverse_kl KL(q||p), jsd beta KL(p||m) + (1 - beta) KL(q||m) with m = beta p + (1 - beta) q
    (Agarwal et al., 2023, arXiv:2306.13649, section 2).
    """

    kind: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float = 0.5
    temperature: float = 1.0

    def value(self, log_p: Float[Array, "b t w"], log_q: Float[Array, "b t w"]) -> Float[Array, "b t"]:
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        match self.kind:
            case "forward_kl":
                terms = p * (log_p - log_q)
            case "reverse_kl":
                terms = q * (log_q - log_p)
            case "jsd":
                log_m = self._log_mean(log_p, log_q)
                terms = self.beta * p * (log_p - log_m) + (1.0 - self.beta) * q * (log_q - log_m)
        return total(jnp.sum(terms, axis=-1), "logits")

    def slope(self, log_p: Float[Array, "b t w"], log_q: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        """d D / d logits of the student, after its soft cap."""
        q = jnp.exp(log_q)
        if self.kind == "forward_kl":
            return (q - jnp.exp(log_p)) / self.temperature
        # d D / d q_v up to a constant c; through the softmax it becomes q_v (c_v - sum_u q_u c_u).
        if self.kind == "reverse_kl":
            c = log_q - log_p
        else:
            c = (1.0 - self.beta) * (log_q - self._log_mean(log_p, log_q))
        return q * (c - total(jnp.sum(q * c, axis=-1), "logits")[..., None]) / self.temperature

    def _log_mean(self, log_p: Array, log_q: Array) -> Array:
        return jnp.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))


def token_divergences(
    divergence: Divergence,
    student: Head,
    x: Float[Array, "b t d"],
    teacher: Head,
    z: Float[Array, "b t e"],
) -> Float[Array, "b t"]:
    """D(p, q) of every token in nats, float32, from the features that the heads read: x the student's, z the teacher's.

    Logits are computed in chunks of time, and once more in the backward pass; nothing is differentiated in the
    teacher's operands. Both vocabularies have one size.
    """
    chunk = max(1, LOGITS_PER_CHUNK // (2 * student.vocab_size))
    caps = (student.soft_cap, teacher.soft_cap)
    options = _Options(divergence, *caps, chunk, gradient_dtype.value)
    values: Any = _divergences(options, columns(student), fold_time(x), columns(teacher), fold_time(z))
    return unfold_time(values)


def columns(head: Head) -> Float[Array, "d v"]:
    """The head's weight with a column for each word, laid out alike whether it is the embedding or not."""
    return constrain(head.weight.T, *HEAD) if head.tied else head.weight


@dataclass(frozen=True)
class _Options:
    divergence: Divergence
    soft_cap: float | None
    teacher_soft_cap: float | None
    chunk: int
    summed_in: str | None

    def log_probabilities(self, y: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        y = y / self.divergence.temperature
        top = highest(jnp.max(y, axis=-1))[..., None]
        return y - top - jnp.log(total(jnp.sum(jnp.exp(y - top), axis=-1), "logits"))[..., None]

    def of_chunk(self, x: Array, weight: Array, z: Array, teacher: Array) -> tuple[Array, Array, Array]:
        """log p, log q and the student's logits."""
        y = logits(x, weight, self.soft_cap)
        return self.log_probabilities(logits(z, teacher, self.teacher_soft_cap)), self.log_probabilities(y), y


def logits(x: Float[Array, "b t d"], weight: Float[Array, "d w"], soft_cap: float | None) -> Float[Array, "b t w"]:
    y = jnp.einsum("btd,dw->btw", x, weight, preferred_element_type=jnp.float32)
    return y if soft_cap is None else soft_cap * jnp.tanh(y / soft_cap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergences(options: _Options, weight: Array, x: Array, teacher: Array, z: Array) -> Array:
    run = per_device(partial(_divergences_of_device, options), (HEAD, TOKENS, HEAD, TOKENS), TOKENS)
    return run(weight, x, teacher, z)


def _divergences_of_device(options: _Options, weight: Array, x: Array, teacher: Array, z: Array) -> Array:
    weight = gather_weight(weight, 0, "embed", x.dtype.name)
    teacher = gather_weight(teacher, 0, "embed", z.dtype.name)

    def of_chunk(part: tuple[Array, Array]) -> Array:
        log_p, log_q, _ = options.of_chunk(part[0], weight, part[1], teacher)
        return options.divergence.value(log_p, log_q)

    if options.chunk >= x.shape[1]:
        return of_chunk((x, z))
    return joined(jax.lax.map(of_chunk, chunks(options.chunk, (x, z))))[:, : x.shape[1]]


def _divergences_forward(options: _Options, *operands: Array) -> Any:
    return _divergences(options, *operands), operands


def _divergences_backward(options: _Options, operands: Any, dvalues: Array) -> tuple[Array, Array, None, None]:
    in_axes = (HEAD, TOKENS, HEAD, TOKENS, TOKENS)
    run = per_device(partial(_gradients_of_device, options), in_axes, (HEAD, TOKENS))
    dweight, dx = run(*operands, dvalues)
    return dweight, dx, None, None


def _gradients_of_device(
    options: _Options, weight: Array, x: Array, teacher: Array, z: Array, dvalues: Array
) -> tuple[Array, Array]:
    whole = gather_weight(weight, 0, "embed", x.dtype.name)
    teacher = gather_weight(teacher, 0, "embed", z.dtype.name)

    def of_chunk(dweight: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        x, z, dvalues = part
        log_p, log_q, y = options.of_chunk(x, whole, z, teacher)
        dy = dvalues[..., None] * options.divergence.slope(log_p, log_q)
        if options.soft_cap is not None:
            dy = dy * (1 - jnp.square(y / options.soft_cap))
        dy = dy.astype(x.dtype)
        dx = jnp.einsum("btw,dw->btd", dy, whole, preferred_element_type=jnp.float32)
        return dweight + jnp.einsum("btw,btd->dw", dy, x, preferred_element_type=jnp.float32), dx

    zeros, parts = jnp.zeros(whole.shape, jnp.float32), (x, z, dvalues)
    if options.chunk >= x.shape[1]:
        dweight, dx = of_chunk(zeros, parts)
    else:
        dweight, dx = jax.lax.scan(of_chunk, zeros, chunks(options.chunk, parts))
        dx = joined(dx)[:, : x.shape[1]]
    dx = total(dx.astype(x.dtype), "logits")
    return add_up_gradient(dweight, options.summed_in or x.dtype.name).astype(weight.dtype), dx


_divergences.defvjp(_divergences_forward, _divergences_backward)
