"""One token after another: the definition of both operations, and what decoding runs.

Letters: b batch, t time, h query-key heads, r value heads per query-key head, k key dim, v value dim.
"""

import jax.numpy as jnp
from jax import Array, lax


def forward(
    q: Array, k: Array, v: Array, beta: Array | None, g: Array, s0: Array, *, scale: float
) -> tuple[Array, Array]:
    """o [b, h r, t, v] and the last state [b, h r, k, v]; operands and their axes as in `chunked.forward`."""
    tokens = [jnp.moveaxis(x, 2, 0) for x in (q, k, v, g)]
    if beta is None:
        s_last, o = lax.scan(lambda s, xs: step(s, *xs, None, scale=scale), s0, tokens)
    else:
        tokens.append(jnp.moveaxis(beta, 2, 0))
        s_last, o = lax.scan(lambda s, xs: step(s, *xs, scale=scale), s0, tokens)
    return jnp.moveaxis(o, 0, 2).astype(v.dtype), s_last


def step(s: Array, q: Array, k: Array, v: Array, g: Array, beta: Array | None, *, scale: float) -> tuple[Array, Array]:
    """The state after one token, and its output [b, h r, v]; q, k [b, h, k], v [b, h r, v], g [b, h r (, k)]."""
    exact = lax.Precision.HIGHEST
    repeats = v.shape[1] // q.shape[1]
    q, k = (jnp.repeat(x.astype(s.dtype), repeats, axis=1) for x in (q, k))
    s = jnp.exp(g)[..., None] * s if g.ndim == 3 else jnp.exp(g)[..., None, None] * s
    written = v.astype(s.dtype)
    if beta is not None:
        written = beta[..., None] * (written - jnp.einsum("bhkv,bhk->bhv", s, k, precision=exact))
    s = s + k[..., :, None] * written[..., None, :]
    return s, scale * jnp.einsum("bhkv,bhk->bhv", s, q, precision=exact)


def one_token(
    q: Array, k: Array, v: Array, beta: Array | None, g: Array, s0: Array, *, scale: float
) -> tuple[Array, Array]:
    """`forward` at t = 1, without a loop."""
    first = [x if x is None else x[:, :, 0] for x in (q, k, v, g, beta)]
    s, o = step(s0, *first, scale=scale)
    return o[:, :, None].astype(v.dtype), s
