"""Diagonal linear recurrence h_t = a_t h_{t-1} + x_t. Letters: b batch, t time, d channels, n chunks, c chunk.

The recurrence of RG-LRU (De et al. 2024, arXiv:2402.19427), LRU (Orvieto et al. 2023, arXiv:2303.06349) and their kin.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Inexact, Int

from hybridlm_kernels.dispatch import check_operand, check_sequence, choose, local
from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.segments import CONTINUE, PADDING, RESET, check_segment_ids, token_kinds

Residuals = tuple[Array, Array, Array, Array | None]  # a, h, h0 and the kinds of the tokens
Tokens = Callable[[Array], tuple[Array, Array]]  # time within the chunk -> (decay, input), each [b, n, d]


def linear_scan(
    a: Inexact[Array, "b t d"],
    x: Inexact[Array, "b t d"],
    *,
    h0: Inexact[Array, "b d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    impl: str = "auto",
) -> tuple[Inexact[Array, "b t d"], Inexact[Array, "b d"]]:
    """h_t = a_t h_{t-1} + x_t, every channel on its own; returns all states h and the last one.

    `a` and `x` are real or complex. The state is carried in float32 (complex64), or in double precision if an operand
    is; h has the promoted dtype of `a` and `x`, and the last state keeps the precision of the carry. `h0` is the state
    before the first token, zeros when None.

    `segment_ids` separate packed documents (0 = padding): the state is zeroed before a token of another document than
    the last real token, so only the row's first document sees `h0`. Padding leaves the state unchanged: h repeats it
    there, for the caller to mask, and the padding's own `a` and `x` count for nothing and get zero gradient. The last
    state is the state after the last real token.

    `reverse` mirrors time: h_t = a_t h_{t+1} + x_t, `h0` comes after the last token, and the last state is at t = 0.
    Differentiable in `a`, `x` and `h0`, also through the last state; reverse mode only.
    """
    a, x = jnp.asarray(a), jnp.asarray(x)
    check_sequence("x", x)
    check_operand("x", x, x.shape, "[batch, time, channels]", allow_complex=True)
    check_operand("a", a, x.shape, "[batch, time, channels]", allow_complex=True)
    b, t, d = x.shape
    carry_dtype = jnp.result_type(a.dtype, x.dtype, jnp.float32)
    if h0 is not None:
        h0 = jnp.asarray(h0)
        check_operand("h0", h0, (b, d), "[batch, channels]", allow_complex=True)
        carry_dtype = jnp.result_type(carry_dtype, h0.dtype)
        if jnp.iscomplexobj(h0) and not jnp.iscomplexobj(a) and not jnp.iscomplexobj(x):
            raise ValueError(f"h0: dtype {h0.dtype} is complex while a and x are real; make one of them complex")
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        check_segment_ids(segment_ids, (b, t))
    run = _reference if choose("linear_scan", x, a, impl=impl) == "reference" else _chunked
    run = partial(run, carry_dtype=carry_dtype, reverse=reverse)
    h, h_last = local(run, [(x, "btd"), (a, "btd"), (h0, "bd"), (segment_ids, "bt")], ["btd", "bd"])
    return h, h_last


def _initial(h0: Array | None, x: Array, carry_dtype: jnp.dtype) -> Array:
    return jnp.zeros_like(x[:, 0], dtype=carry_dtype) if h0 is None else h0.astype(carry_dtype)


@partial(jax.jit, static_argnames=("carry_dtype", "reverse"))
def _reference(
    x: Array, a: Array, h0: Array | None, segment_ids: Array | None, *, carry_dtype: jnp.dtype, reverse: bool
) -> tuple[Array, Array]:
    """Token by token, with the gradient of JAX's own automatic differentiation: the oracle of the other tiers."""
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def step(carry: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        h, last_id = carry
        a_t, x_t, id_t = token
        starts = (id_t != 0) & (last_id != 0) & (id_t != last_id)
        before = jnp.where(starts[:, None], 0, h)
        h = jnp.where((id_t != 0)[:, None], a_t.astype(carry_dtype) * before + x_t.astype(carry_dtype), h)
        return (h, jnp.where(id_t != 0, id_t, last_id)), h

    x, a, ids, h0 = align_varying(x, a, ids, _initial(h0, x, carry_dtype))
    time_major = (jnp.moveaxis(a, 1, 0), jnp.moveaxis(x, 1, 0), jnp.moveaxis(ids, 1, 0))
    (h_last, _), h = lax.scan(step, (h0, jnp.zeros_like(ids[:, 0])), time_major, reverse=reverse)
    return jnp.moveaxis(h, 0, 1).astype(jnp.result_type(a.dtype, x.dtype)), h_last


@partial(jax.jit, static_argnames=("carry_dtype", "reverse"))
def _chunked(
    x: Array, a: Array, h0: Array | None, segment_ids: Array | None, *, carry_dtype: jnp.dtype, reverse: bool
) -> tuple[Array, Array]:
    """Chunks advance together, token by token in place, and pass their states on; a single chunk on CPU."""
    kinds = None if segment_ids is None else token_kinds(segment_ids, reverse)[:, :, None]
    x, a, h0, kinds = align_varying(x, a, _initial(h0, x, carry_dtype), kinds)
    if x.shape[1] == 1:  # decoding: no loop
        kind = _kind_at(kinds, 0)
        h_last = _kept(a[:, 0].astype(carry_dtype), kind) * h0 + _real(x[:, 0].astype(carry_dtype), kind)
        return h_last[:, None].astype(jnp.result_type(a.dtype, x.dtype)), h_last
    return _scan(a, x, h0, kinds, reverse, x.dtype)


def _plain_scan(
    a: Array, x: Array, h0: Array, kinds: Array | None, reverse: bool, x_dtype: jnp.dtype
) -> tuple[Array, Array]:
    h, h_last = _per_platform(scan_in_chunks, x.shape[1], reverse, a, x, h0, kinds)
    return h, h_last


def _scan_fwd(
    a: Array, x: Array, h0: Array, kinds: Array | None, reverse: bool, x_dtype: jnp.dtype
) -> tuple[tuple[Array, Array], Residuals]:
    h, h_last = _scan(a, x, h0, kinds, reverse, x_dtype)
    return (h, h_last), (a, h, h0, kinds)


def _scan_bwd(
    reverse: bool, x_dtype: jnp.dtype, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    a, h, h0, kinds = residuals
    dh, dh_last = cotangents
    adjoint = partial(adjoint_in_chunks, x_dtype=x_dtype)
    da, dx, dh0 = _per_platform(adjoint, h.shape[1], reverse, a, h, h0, dh, dh_last, kinds)
    return da, dx, dh0, None


_scan = jax.custom_vjp(_plain_scan, nondiff_argnums=(4, 5))
_scan.defvjp(_scan_fwd, _scan_bwd)


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
    t = x.shape[1]
    a, x = _split(a, chunk, reverse, 1), _split(x, chunk, reverse, 0)
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
    return _join(h, t, reverse), _final(state, reverse)


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
    t = h.shape[1]
    a, h, dh = _split(a, chunk, reverse, 1), _split(h, chunk, reverse, 0), _split(dh, chunk, reverse, 0)
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
    u, da, dx = _sweep(chunk, not reverse, step, (u, jnp.zeros_like(a), jnp.zeros_like(h, dtype=x_dtype)))
    return _join(da, t, reverse), _join(dx, t, reverse), _final(u, not reverse)


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
