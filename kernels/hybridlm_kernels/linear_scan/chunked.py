"""linear_scan in plain JAX: one loop over time on CPU, chunks that advance together elsewhere.

Letters: b batch, t time, d channels, n chunks, c chunk.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.segments import CONTINUE, PADDING, RESET

Tokens = Callable[[Array], tuple[Array, Array]]  # time within the chunk -> (decay, input), each [b, n, d]


@partial(jax.jit, static_argnames="reverse")
def forward(a: Array, x: Array, h0: Array, kinds: Array | None, *, reverse: bool) -> tuple[Array, Array]:
    """h [b, t, d] and h_last [b, d]; `kinds` [b, t] as in segments.py."""
    a, x, h0, kinds = align_varying(a, x, h0, kinds)
    h, h_last = _per_platform(scan_in_chunks, x.shape[1], reverse, a, x, h0, _column(kinds))
    return h, h_last


@partial(jax.jit, static_argnames=("reverse", "x_dtype"))
def adjoint(
    a: Array,
    h: Array,
    h0: Array,
    dh: Array,
    dh_last: Array,
    kinds: Array | None,
    *,
    reverse: bool,
    x_dtype: jnp.dtype,
) -> tuple[Array, Array, Array]:
    """The cotangents of a, x and h0 from those of h and h_last."""
    a, h, h0, dh, dh_last, kinds = align_varying(a, h, h0, dh, dh_last, kinds)
    in_chunks = partial(adjoint_in_chunks, x_dtype=x_dtype)
    da, dx, dh0 = _per_platform(in_chunks, h.shape[1], reverse, a, h, h0, dh, dh_last, _column(kinds))
    return da, dx, dh0


@partial(jax.jit, static_argnames=("reverse", "premultiplied"))
def summary(a: Array, x: Array, kinds: Array | None, *, reverse: bool, premultiplied: bool) -> tuple[Array, Array]:
    """What all of time does to a state s: s -> decay s + added, both [b, d].

    `premultiplied` is the recurrence of the adjoint, s <- a_t (s + x_t), in which x counts at padding too.
    """
    a, x, kinds = align_varying(_wide(a), _wide(x), _column(kinds))
    dtype = jnp.result_type(a.dtype, x.dtype, jnp.float32)

    def step(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, value = _kept(_at(a, t).astype(dtype), _kind_at(kinds, t)), _at(x, t).astype(dtype)
        value = decay * value if premultiplied else _real(value, _kind_at(kinds, t))
        return decay * carry[0], decay * carry[1] + value

    zeros = jnp.zeros_like(x[:, 0], dtype=dtype)
    decay, added = _sweep(x.shape[1], reverse, step, (jnp.ones_like(zeros), zeros))
    return decay, added


def one_token(a: Array, x: Array, h0: Array, kinds: Array | None) -> tuple[Array, Array]:
    """`forward` of a single token, as in decoding, without a loop; differentiable."""
    kind = _kind_at(_column(kinds), 0)
    h_last = _kept(a[:, 0].astype(h0.dtype), kind) * h0 + _real(x[:, 0].astype(h0.dtype), kind)
    return h_last[:, None].astype(jnp.result_type(a.dtype, x.dtype)), h_last


def _wide(array: Array) -> Array:
    """At least float32: of a narrower array XLA converts all at every token that a loop reads or writes."""
    return array.astype(_wide_dtype(array.dtype))


def _wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.result_type(dtype, jnp.float32)


def _column(kinds: Array | None) -> Array | None:
    return None if kinds is None else kinds[:, :, None]


def _per_platform(
    function: Callable[..., tuple[Array, ...]], t: int, reverse: bool, *arrays: Array | None
) -> tuple[Array, ...]:
    """`function` with one chunk on CPU, with parallel chunks where a loop over all of time is too long a chain.

    On CPU a token is enough work for a loop step, and one chunk reads every operand once instead of twice. The choice
    is made when the program is lowered, so that compiling for an absent TPU or GPU takes theirs.
    """
    whole, parallel = (partial(function, chunk=chunk, reverse=reverse) for chunk in (t, chunk_length(t)))
    if chunk_length(t) == t:
        return whole(*arrays)
    return lax.platform_dependent(*arrays, cpu=whole, default=parallel)


def chunk_length(t: int) -> int:
    """Tokens per chunk that keep the chain of 2 c + t / c dependent steps short, dividing `t` where it can."""
    best = max(1, round(math.sqrt(t / 2)))
    divisors = [c for c in range(best, 2 * best) if t % c == 0]
    return t if t <= 32 else (divisors or [best])[0]


def scan_in_chunks(
    a: Array, x: Array, h0: Array, kinds: Array | None, *, chunk: int, reverse: bool
) -> tuple[Array, Array]:
    """h and h_last, all chunks of `chunk` tokens advancing together; `kinds` [b, t, 1] as in segments.py."""
    t, dtype = x.shape[1], jnp.result_type(a.dtype, x.dtype)
    a, x = _split(_wide(a), chunk, reverse, 1), _split(_wide(x), chunk, reverse, 0)
    kinds = None if kinds is None else _split(kinds, chunk, reverse, PADDING)

    def token(j: Array) -> tuple[Array, Array]:
        kind = _kind_at(kinds, j)
        return _kept(_at(a, j).astype(h0.dtype), kind), _real(_at(x, j).astype(h0.dtype), kind)

    def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, h = carry
        decay, value = token(j)
        state = decay * state + value
        return state, _put(h, state, j)

    state = _incoming(token, x, h0, reverse)
    state, h = _sweep(chunk, reverse, step, (state, jnp.zeros_like(x, dtype=jnp.result_type(a.dtype, x.dtype))))
    return _join(h, t, reverse).astype(dtype), _final(state, reverse)


def adjoint_in_chunks(
    a: Array,
    h: Array,
    h0: Array,
    dh: Array,
    dh_last: Array,
    kinds: Array | None,
    *,
    chunk: int,
    reverse: bool,
    x_dtype: jnp.dtype,
) -> tuple[Array, Array, Array]:
    """The transposed recurrence u_t = dh_t + a_{t+1} u_{t+1}, dx_t = u_t, da_t = u_t h_{t-1}, against time."""
    t, a_dtype = h.shape[1], a.dtype
    a, h, dh = (_split(_wide(v), chunk, reverse, fill) for v, fill in ((a, 1), (h, 0), (dh, 0)))
    kinds = None if kinds is None else _split(kinds, chunk, reverse, PADDING)
    first, earlier = (chunk - 1, 1) if reverse else (0, -1)
    before = _before_chunks(h, h0, reverse)

    def token(j: Array) -> tuple[Array, Array]:
        decay = _kept(_at(a, j).astype(h0.dtype), _kind_at(kinds, j))
        return decay, decay * _at(dh, j).astype(h0.dtype)

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        u, da, dx = carry
        kind = _kind_at(kinds, j)
        u = u + _at(dh, j).astype(h0.dtype)
        previous = jnp.where(j == first, before, _at(h, jnp.clip(j + earlier, 0, chunk - 1)).astype(h0.dtype))
        slope = u * previous if kind is None else jnp.where(kind == CONTINUE, u * previous, 0)
        return _kept(_at(a, j).astype(h0.dtype), kind) * u, _put(da, slope, j), _put(dx, _real(u, kind), j)

    u = _incoming(token, dh, dh_last, not reverse)
    u, da, dx = _sweep(chunk, not reverse, step, (u, jnp.zeros_like(a), jnp.zeros_like(h, dtype=_wide_dtype(x_dtype))))
    return _join(da, t, reverse).astype(a_dtype), _join(dx, t, reverse).astype(x_dtype), _final(u, not reverse)


def _incoming(token: Tokens, x: Array, state: Array, reverse: bool) -> Array:
    """The state that enters each chunk of x, from the chunks' total decays and what they add to a zero state."""
    if x.ndim == 3:
        return state
    b, n, chunk, d = x.shape

    def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, value = token(j)
        return decay * carry[0], decay * carry[1] + value

    zeros = jnp.zeros_like(jnp.broadcast_to(state[:, None], (b, n, d)))
    total, added = _sweep(chunk, reverse, step, (jnp.ones_like(zeros), zeros))

    def pass_on(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, entering = carry
        return _at(total, k) * state + _at(added, k), _put(entering, state, k)

    return _sweep(n, reverse, pass_on, (state, zeros))[1]


def _sweep(length: int, reverse: bool, step: Callable, carry: tuple[Array, ...]) -> tuple[Array, ...]:
    """`step(j, carry)` for j from 0 up, or down to 0."""
    return lax.fori_loop(0, length, lambda i, c: step(length - 1 - i if reverse else i, c), carry)


def _kept(decay: Array, kind: Array | None) -> Array:
    """The decay of a token: 0 where a document starts, 1 at padding."""
    return decay if kind is None else jnp.where(kind == RESET, 0, jnp.where(kind == PADDING, 1, decay))


def _real(value: Array, kind: Array | None) -> Array:
    return value if kind is None else jnp.where(kind == PADDING, 0, value)


def _at(array: Array, j: Array | int) -> Array:
    """Token j, of every chunk: [b, n, c, d] -> [b, n, d]."""
    return lax.dynamic_index_in_dim(array, j, axis=array.ndim - 2, keepdims=False)


def _kind_at(kinds: Array | None, j: Array | int) -> Array | None:
    return None if kinds is None else _at(kinds, j)


def _put(array: Array, value: Array, j: Array) -> Array:
    """`array` with token j of every chunk replaced; only the real part where the array is real."""
    value = value if jnp.iscomplexobj(array) else jnp.real(value)
    return lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), j, axis=array.ndim - 2)


def _split(array: Array, chunk: int, reverse: bool, fill: int) -> Array:
    """[b, t, d] as chunks [b, n, c, d], filled up beyond the token that the scan reaches last; one chunk stays as is.

    XLA on CPU runs a loop over [b, t, d] four times faster than the same loop over [b, 1, t, d].
    """
    if array.shape[1] == chunk:
        return array
    b, t, d = array.shape
    if missing := -t % chunk:
        array = jnp.pad(array, ((0, 0), (missing, 0) if reverse else (0, missing), (0, 0)), constant_values=fill)
    return array.reshape(b, -1, chunk, d)


def _join(array: Array, t: int, reverse: bool) -> Array:
    """The inverse of `_split`."""
    flat = array.reshape(array.shape[0], -1, array.shape[-1])
    return flat[:, flat.shape[1] - t :] if reverse else flat[:, :t]


def _final(state: Array, reverse: bool) -> Array:
    """What the chunk that the scan reaches last hands on."""
    return state if state.ndim == 2 else state[:, 0 if reverse else -1]


def _before_chunks(h: Array, h0: Array, reverse: bool) -> Array:
    """The state before the first token of every chunk."""
    if h.ndim == 3:
        return h0
    if reverse:
        return jnp.concatenate([h[:, 1:, 0].astype(h0.dtype), h0[:, None]], axis=1)
    return jnp.concatenate([h0[:, None], h[:, :-1, -1].astype(h0.dtype)], axis=1)
