"""linear_scan token by token, differentiated by JAX itself: what every other implementation is tested against."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.segments import PADDING, RESET


@partial(jax.jit, static_argnames="reverse")
def forward(a: Array, x: Array, h0: Array, kinds: Array | None, *, reverse: bool) -> tuple[Array, Array]:
    """h [b, t, d] and h_last [b, d]; `kinds` [b, t] as in segments.py."""
    kinds = jnp.zeros(x.shape[:2], jnp.int8) if kinds is None else kinds

    def step(h: Array, token: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        a_t, x_t, kind = token
        before = jnp.where((kind == RESET)[:, None], 0, h)
        h = jnp.where((kind == PADDING)[:, None], h, a_t.astype(h.dtype) * before + x_t.astype(h.dtype))
        return h, h

    a, x, kinds, h0 = align_varying(a, x, kinds, h0)
    time_major = (jnp.moveaxis(a, 1, 0), jnp.moveaxis(x, 1, 0), jnp.moveaxis(kinds, 1, 0))
    h_last, h = lax.scan(step, h0, time_major, reverse=reverse)
    return jnp.moveaxis(h, 0, 1).astype(jnp.result_type(a.dtype, x.dtype)), h_last
