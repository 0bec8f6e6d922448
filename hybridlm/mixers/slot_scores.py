"""Every row of a gated linear attention state read at once, where the op reads one combination of its rows.

The op reads S_t^T x_t, with a query x_t over the rows m of S [m, k], which decay; gated slot attention needs S_t q_t,
one score per row. Both come from a form that is linear in x and in q, L = sum_t x_t^T S_t q_t: the scores are the op's
gradient in its queries, with q as the cotangent of its outputs, and the gradients of the scores are the op's outputs
and gradients at x = the scores' cotangent. One custom gradient on top of the op serves all of its implementations.

Letters: b batch, t time, h heads, m slots, k key dim.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from hybridlm_kernels import gated_linear_attention
from jaxtyping import Array, Float

from hybridlm.mixers.base import Segments


def slot_scores(
    q: Float[Array, "b t h k"],
    write: Float[Array, "b t h m"],
    k: Float[Array, "b t h k"],
    log_decay: Float[Array, "b t h m"],
    s0: Float[Array, "b h m k"] | None,
    segments: Segments,
    impl: str,
) -> tuple[Float[Array, "b t h m"], Float[Array, "b h m k"]]:
    """S_t q_t for S_t = Diag(exp log_decay_t) S_{t-1} + write_t k_t^T, and the last S; `s0` None is zeros."""
    if s0 is None:
        s0 = jnp.zeros((q.shape[0], q.shape[2], write.shape[3], q.shape[3]), jnp.float32)
    return _scores(q, write, k, log_decay, s0, segments, impl)


def _read(x: Array, write: Array, k: Array, log_decay: Array, s0: Array, *, segments: Segments, impl: str) -> Any:
    ids, positions = segments
    options: Any = {"scale": 1.0, "segment_ids": ids, "positions": positions, "impl": impl}
    return gated_linear_attention(x, write, k, log_decay, s0=s0, **options)


def _forward(
    q: Array, write: Array, k: Array, log_decay: Array, s0: Array, segments: Segments, impl: str
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    read = partial(_read, segments=segments, impl=impl)
    # The gradient in the queries does not depend on the queries.
    (_, last), pull = jax.vjp(lambda x: read(x, write, k, log_decay, s0), jnp.zeros_like(write))
    (scores,) = pull((q, jnp.zeros_like(last)))
    return (scores, last), (q, write, k, log_decay, s0, segments)


def _backward(impl: str, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, *operands, segments = residuals
    d_scores, d_last = cotangents
    (dq, _), pull = jax.vjp(partial(_read, d_scores, segments=segments, impl=impl), *operands)
    return dq, *pull((q, d_last)), None


_scores = jax.custom_vjp(lambda *operands: _forward(*operands)[0], nondiff_argnums=(6,))
_scores.defvjp(_forward, _backward)
