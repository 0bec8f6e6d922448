"""Chunks of tokens in plain JAX: matmuls in a chunk, one state between chunks (Yang et al. 2024, arXiv:2406.06484).

Letters: b batch, t time, h query-key heads, r value heads per query-key head, n chunks, c chunk, k key dim,
v value dim, m blocks of a chunk, s tokens of a block, z groups of chunks.

Some chunks at a time are prepared together and their states passed on one after the other; only the state before each
such group is kept for the backward pass, which computes the group again. Decays are summed over exactly the tokens
between two others and never subtracted from one another: the result is right at any decay, and a decay of RESET forgets
the state exactly.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.linear_attention.inverse import inverse

CHUNKS = (16, 32, 64, 128)
GROUP = 8
"""Chunks prepared together: enough for parallel hardware, and the temporaries of no more at a time."""
BLOCK = 8
"""Tokens whose pairs are computed one by one where every channel has a decay of its own."""
PRECISIONS = {"default": lax.Precision.DEFAULT, "high": lax.Precision.HIGH, "highest": lax.Precision.HIGHEST}


def default_chunk(q: Array, k: Array, v: Array, *gates: Array) -> int:
    return 64


def forward(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array,
    s0: Array,
    *,
    scale: float,
    chunk: int,
    precision: str,
    save: bool,
) -> tuple[Array, Array, Array]:
    """o [b, h r, t, v], the last state and the states before each group of chunks, [z, b, h r, k, v].

    q, k [b, h, t, k]; v [b, h r, t, v]; beta [b, h r, t], or None for no erasing; g [b, h r, t] or [b, h r, t, k];
    s0 [b, h r, k, v], whose dtype is that of the computation. `t` is a multiple of `chunk`.
    """
    groups, s0_grouped = _split(q, k, v, beta, g, s0, chunk)
    block = partial(_group, scale=scale, precision=PRECISIONS[precision])

    def body(s: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        o, after = block(s, *xs)
        return after, (o, s)

    s_last, (o, states) = lax.scan(body, s0_grouped, groups)
    return _join(o, v.shape).astype(v.dtype), s_last.reshape(s0.shape), states


def adjoint(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array,
    states: Array,
    do: Array,
    ds_last: Array,
    *,
    scale: float,
    chunk: int,
    precision: str,
) -> tuple[Array, Array, Array, Array | None, Array, Array]:
    """The cotangents of q, k, v, beta, g and s0 from those of o and of the last state."""
    groups, ds = _split(q, k, v, beta, g, ds_last, chunk)
    do_groups = _in_groups(do.reshape(*v.shape[:1], *groups[2].shape[2:4], *v.shape[2:]), chunk)
    block = partial(_group, scale=scale, precision=PRECISIONS[precision])

    def body(ds: Array, xs: tuple[Array, tuple[Array, ...], Array]) -> tuple[Array, tuple[Array, ...]]:
        s, operands, do = xs
        _, pull = jax.vjp(block, s, *operands)
        ds, *gradients = pull((do.astype(s.dtype), ds))
        return ds, tuple(gradients)

    ds0, (dq, dk, dv, dg, *dbeta) = lax.scan(body, ds, (states, groups, do_groups), reverse=True)
    return (
        _join(dq, q.shape),
        _join(dk, k.shape),
        _join(dv, v.shape),
        _join(dbeta[0], beta.shape) if beta is not None else None,
        _join(dg, g.shape),
        ds0.reshape(ds_last.shape),
    )


def _split(
    q: Array, k: Array, v: Array, beta: Array | None, g: Array, s: Array, chunk: int
) -> tuple[tuple[Array, ...], Array]:
    """Operands as [z, b, h, r, n, c, ...], q and k with r = 1, and a state as [b, h, r, k, v]."""
    b, h = q.shape[:2]
    r = v.shape[1] // h
    shared = [x[:, :, None] for x in (q, k)]
    per_value_head = [x.reshape(b, h, r, *x.shape[2:]) for x in (v, g, beta) if x is not None]
    groups = tuple(_in_groups(x, chunk) for x in (*shared, *per_value_head))
    return groups, s.reshape(b, h, r, *s.shape[2:])


def _in_groups(x: Array, chunk: int) -> Array:
    """[b, h, r, t, ...] -> [z, b, h, r, n, c, ...]; what is added at the end is zero and changes no state."""
    n = x.shape[3] // chunk
    size = min(n, GROUP)
    z = math.ceil(n / size)
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, (z * size - n) * chunk)] + [(0, 0)] * (x.ndim - 4))
    return jnp.moveaxis(x.reshape(*x.shape[:3], z, size, chunk, *x.shape[4:]), 3, 0)


def _join(x: Array, shape: tuple[int, ...]) -> Array:
    """[z, b, h, r, n, c, ...] -> [b, h r, t, ...]"""
    x = jnp.moveaxis(x, 0, 3)
    x = x.reshape(shape[0], shape[1], -1, *shape[3:])
    return x[:, :, : shape[2]]


def _group(
    s: Array,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array | None = None,
    *,
    scale: float,
    precision: lax.Precision,
) -> tuple[Array, Array]:
    """o [b, h, r, n, c, v] and the state after n chunks, from the state before them."""
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=s.dtype)
    dtype = v.dtype
    q, k, v = (x.astype(s.dtype) for x in (q, k, v))
    rows = (q,) if beta is None else (q, k)
    if g.ndim == q.ndim:
        scores, prefix, suffix = _scores_per_channel(rows, k, g, dot)
        entering, leaving, total = jnp.exp(prefix), jnp.exp(suffix), jnp.exp(prefix[..., -1, :])
    else:
        scores, prefix, suffix = _scores_per_head(rows, k, g, dot)
        entering, leaving = jnp.exp(prefix)[..., None], jnp.exp(suffix)[..., None]
        total = jnp.exp(prefix[..., -1:])
    per_chunk = [scores[0], entering * q, leaving * k, total, v]
    if beta is not None:
        b = beta[..., None]
        erasing = jnp.tril(b * scores[1], -1)
        per_chunk += [erasing, inverse(erasing), b, b * entering * k]

    def one_chunk(s: Array, xs: list[Array]) -> tuple[Array, Array]:
        scores, q, k, total, u, *erasing = xs
        if erasing:
            within, solved, b, seen = erasing
            u = _written(within, solved, b, seen, u, s, dot)
        o = dot("bhrck,bhrkv->bhrcv", q, s) + dot("bhrij,bhrjv->bhriv", scores, u)
        return total[..., None] * s + dot("bhrck,bhrcv->bhrkv", k, u), o

    s, o = lax.scan(one_chunk, s, [jnp.moveaxis(x, 3, 0) for x in per_chunk])
    return (scale * jnp.moveaxis(o, 0, 3)).astype(jnp.promote_types(dtype, s.dtype)), s


def _written(erasing: Array, solved: Array, b: Array, seen: Array, v: Array, s: Array, dot: partial[Array]) -> Array:
    """u of (I + erasing) u = b v - seen s, given the inverse; b [..., c, 1]."""
    exactly = partial(jnp.einsum, "bhrij,bhrjv->bhriv", precision=lax.Precision.HIGHEST)
    r = b * v - dot("bhrck,bhrkv->bhrcv", seen, s)
    u = exactly(solved, r)
    # One key again and again with beta 2 makes the inverse's errors add up: 1.8e-5 of the output, 4e-6 refined.
    return u + exactly(solved, r - u - exactly(erasing, u)) if dot.keywords["precision"] == lax.Precision.HIGHEST else u


def _scores_per_head(
    rows: Sequence[Array], k: Array, g: Array, dot: partial[Array]
) -> tuple[list[Array], Array, Array]:
    """x_i . k_j exp(sum of g over (j, i]) for j <= i and each x of `rows`; the sums over [0, i] and (j, end]."""
    prefix, suffix, between = _sums(g[..., None])
    gamma = jnp.exp(between[..., 0])
    return [dot("...ik,...jk->...ij", x, k) * gamma for x in rows], prefix[..., 0], suffix[..., 0]


def _scores_per_channel(
    rows: Sequence[Array], k: Array, g: Array, dot: partial[Array]
) -> tuple[list[Array], Array, Array]:
    """sum over channels of x_i k_j exp(sum of g over (j, i]), as above, for decays [..., c, k] of their own.

    Between blocks of tokens a matmul: what lies before the block of i decays to its start, which i then reads; neither
    exponent is ever positive. Within a block every pair by itself.
    """
    # Leading axes as one: XLA's CPU compiler makes programs that crash of sums over arrays with many (jax 0.10).
    *rows, k, flat = (jnp.broadcast_to(x, g.shape).reshape(-1, *g.shape[-2:]) for x in (*rows, k, g))
    c, m = g.shape[-2], g.shape[-2] // BLOCK

    def blocks(x: Array) -> Array:
        return x.reshape(-1, m, BLOCK, x.shape[-1])

    prefix, suffix, within = _sums(blocks(flat))
    before, after, between = _sums(prefix[:, :, -1])  # of whole blocks: * m k, * m k, * m m k
    # Sums over (j, start of block m]: what is left of j's block and the whole blocks until m.
    to_start = suffix[:, None] + jnp.roll(between, 1, 1)[:, :, :, None]  # * m m s k
    earlier = jnp.tril(jnp.ones((m, m), bool), -1)[:, :, None, None]
    decayed = blocks(k)[:, None] * jnp.exp(jnp.where(earlier, to_start, -jnp.inf))
    decayed = decayed.reshape(-1, m, c, k.shape[-1])
    scores = []
    for x in rows:
        pairs = jnp.sum(blocks(x)[:, :, :, None] * blocks(k)[:, :, None] * jnp.exp(within), axis=-1)  # * m s s
        crossing = dot("nmik,nmjk->nmij", blocks(x) * jnp.exp(prefix), decayed).reshape(-1, m, BLOCK, m, BLOCK)
        own = jnp.eye(m, dtype=g.dtype)[:, None, :, None] * pairs[:, :, :, None]
        scores.append((crossing + own).reshape(*g.shape[:-1], c))
    before = jnp.pad(before[:, :-1], [(0, 0), (1, 0), (0, 0)])
    return scores, (prefix + before[:, :, None]).reshape(g.shape), (suffix + after[:, :, None]).reshape(g.shape)


def _sums(g: Array) -> tuple[Array, Array, Array]:
    """Of [..., c, k]: the sums over [0, i], over (j, end], and [..., c, c, k] over (j, i], -inf where i < j.

    Products with zeros and ones, so that each is a sum over exactly its tokens.
    """
    c = g.shape[-2]
    lower = jnp.tril(jnp.ones((c, c), g.dtype))
    strict = jnp.tril(lower, -1)
    dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    between = dot("il,...ljk->...ijk", lower, g[..., :, None, :] * strict[..., None])
    between = jnp.where(lower[..., None] > 0, between, -jnp.inf)
    return dot("il,...lk->...ik", lower, g), dot("lj,...lk->...jk", strict, g), between
