"""short_conv token by token, differentiated by JAX itself: what every other implementation is tested against."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.short_conv.activations import ACTIVATIONS


@partial(jax.jit, static_argnames="activation")
def whole(
    x: Array, w: Array, bias: Array | None, state: Array, segment_ids: Array | None, *, activation: str | None
) -> tuple[Array, Array]:
    """y and the new state; sums have the dtype of `state`."""
    dtype = state.dtype
    w = w.astype(dtype)
    offset = jnp.zeros(w.shape[1], dtype) if bias is None else bias.astype(dtype)
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def step(carry: tuple[Array, Array], token: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        before, last_id = carry
        x_t, id_t = token
        real = (id_t != 0)[:, None, None]
        fresh = (id_t != 0) & (last_id != 0) & (id_t != last_id)
        window = jnp.concatenate([jnp.where(fresh[:, None, None], 0, before), x_t.astype(dtype)[:, None]], axis=1)
        y_t = ACTIVATIONS[activation](offset + jnp.where(real, window * w, 0).sum(axis=1))
        return (jnp.where(real, window[:, 1:], before), jnp.where(id_t != 0, id_t, last_id)), y_t.astype(x.dtype)

    x, ids, state = align_varying(x, ids, state)
    time_major = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(ids, 1, 0))
    (state, _), y = lax.scan(step, (state, jnp.zeros_like(ids[:, 0])), time_major)
    return jnp.moveaxis(y, 0, 1), state
