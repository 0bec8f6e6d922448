"""Next-token losses, without ever holding the logits of a whole large-vocabulary batch.

Letters: b batch, t time, d model width, v vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS_PER_CHUNK = 2**22
"""Logits of one row kept at a time: at 256,000 words 16 tokens, 16 MiB a row."""


def token_losses(
    logits: Callable[[Array], Array], x: Float[Array, "b t d"], targets: Int[Array, "b t"], vocab_size: int
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """-log p(target) in nats and log Z of every token, float32; chunks of time are recomputed in the backward pass.

    `logits` is the model's head, x -> [b t v] float32. The vocabulary may be sharded: nothing gathers it.
    """

    def losses(x: Float[Array, "b t d"], targets: Int[Array, "b t"]) -> tuple[Array, Array]:
        y = logits(x)
        log_z = jax.nn.logsumexp(y, axis=-1)
        # A masked sum, not a gather: each device sums over its part of the vocabulary.
        is_target = jax.lax.broadcasted_iota(jnp.int32, y.shape, 2) == targets[..., None]
        return log_z - jnp.sum(jnp.where(is_target, y, 0.0), axis=-1), log_z

    b, t, _ = x.shape
    chunk = max(1, LOGITS_PER_CHUNK // vocab_size)
    if chunk >= t:
        return losses(x, targets)
    padding = -t % chunk
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))

    def one_chunk(first: Array) -> tuple[Array, Array]:
        def cut(a: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(a, first, chunk, axis=1)

        return jax.checkpoint(losses)(cut(x), cut(targets))

    parts = jax.lax.map(one_chunk, jnp.arange(0, t + padding, chunk))  # n b c
    nll, log_z = (jnp.moveaxis(part, 0, 1).reshape(b, t + padding)[:, :t] for part in parts)
    return nll, log_z
