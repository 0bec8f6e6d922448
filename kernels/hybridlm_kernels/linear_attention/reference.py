"""One token after another: the definition of both operations, and what decoding runs.

Letters: b batch, t time, h query-key heads, r value heads per query-key head, k key dim, v value dim.
"""

import jax.numpy as jnp
from jax import Array, lax


def forward(
    q: Array, k: Array, v: Array, beta: Array | None, g: Array, s0: Array, *, scale: float
) -> tuple[Array, Array]:
    """o [b, h r, t, v] and the last state [b, h r, k, v]; operands and their axes as in `chunked.forward`."""
    per_token = [q, k, v, g] if beta is None else [q, k, v, g, beta]

    def one(s: Array, xs: list[Array]) -> tuple[Array, Array]:
        q, k, v, g, *beta = xs
        return step(s, q, k, v, beta[0] if beta else None, g, scale=scale)

    s_last, o = lax.scan(one, s0, [jnp.moveaxis(x, 2, 0) for x in per_token])
    return jnp.moveaxis(o, 0, 2).astype(v.dtype), s_last


def step(s: Array, q: Array, k: Array, v: Array, beta: Array | None, g: Array, *, scale: float) -> tuple[Array, Array]:
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
    erasing = None if beta is None else beta[:, :, 0]
    s, o = step(s0, q[:, :, 0], k[:, :, 0], v[:, :, 0], erasing, g[:, :, 0], scale=scale)
    return o[:, :, None].astype(v.dtype), s
