"""short_conv in plain JAX: one shifted, masked multiply and add per tap.

Letters: b batch, t time, d channels, w taps, s = w - 1 earlier inputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.short_conv.activations import ACTIVATIONS


@partial(jax.jit, static_argnames="activation")
def forward(
    x: Array, w: Array, bias: Array | None, halo: Array | None, reach: Array | None, *, activation: str | None
) -> Array:
    """y [b, t, d]; `halo` [b, w-1, d] are the inputs before x, `reach` [b, t] how many of them each token may see."""
    y = _preactivation(x, w, bias, halo, reach, _sum_dtype(x, w, bias, halo))
    return ACTIVATIONS[activation](y).astype(x.dtype)


@partial(jax.jit, static_argnames="activation")
def adjoint(
    x: Array,
    w: Array,
    bias: Array | None,
    halo: Array | None,
    reach: Array | None,
    dy: Array,
    *,
    activation: str | None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """The cotangents of x, w, bias and halo."""
    dtype = _sum_dtype(x, w, bias, halo)
    before = _preactivation(x, w, bias, halo, reach, dtype)
    (dy,) = jax.vjp(ACTIVATIONS[activation], before)[1](dy.astype(dtype))
    dy = lax.optimization_barrier(dy)  # else every sum below recomputes the convolution and its activation
    dx = _taps_adjoint(dy, w, reach).astype(x.dtype)
    dw = _weight_gradient(dy, x, reach, w.shape[0])
    dbias = None if bias is None else dy.sum((0, 1))
    if halo is None:
        return dx, dw, dbias, None
    dw_halo, dhalo = jax.vjp(lambda w, halo: _from_halo(w, halo, reach, dy), w, halo)[1](dy)
    return dx, dw + dw_halo.astype(dw.dtype), dbias, dhalo


def one_token(
    x: Array, w: Array, bias: Array | None, held: Array, segment_ids: Array | None, activation: str | None
) -> tuple[Array, Array]:
    """The step of decoding: the window is the state and this token. Returns y and the new state; differentiable."""
    window = jnp.concatenate([held, x.astype(held.dtype)], axis=1)  # b w d
    y = jnp.einsum("bwd,wd->bd", window, w.astype(held.dtype), precision="highest")
    new = window[:, 1:]
    if segment_ids is not None:
        real = segment_ids != 0
        y, new = jnp.where(real, y, 0), jnp.where(real[:, :, None], new, held)
    y = y if bias is None else y + bias.astype(held.dtype)
    return ACTIVATIONS[activation](y)[:, None].astype(x.dtype), new


def _sum_dtype(*arrays: Array | None) -> jnp.dtype:
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays if array is not None))


def _preactivation(
    x: Array, w: Array, bias: Array | None, halo: Array | None, reach: Array | None, dtype: jnp.dtype
) -> Array:
    y = jnp.zeros_like(x, dtype=dtype)
    for j in range(min(w.shape[0], x.shape[1])):
        term = w[-1 - j].astype(dtype) * _moved(x, j).astype(dtype)
        y = y + (term if reach is None else jnp.where(_reaches(reach, j), term, 0))
    y = y if halo is None else y + _from_halo(w, halo, reach, y)
    return y if bias is None else y + bias.astype(dtype)


def _from_halo(w: Array, halo: Array, reach: Array | None, like: Array) -> Array:
    """What the inputs before x add to the first w-1 tokens, shaped as `like` [b, t, d]."""
    t, held = like.shape[1], halo.shape[1]
    first = jnp.zeros_like(like[:, : min(t, held)])
    for j in range(1, held + 1):
        term = w[-1 - j].astype(like.dtype) * halo[:, held - j :].astype(like.dtype)  # tokens 0 to j - 1
        term = term[:, : first.shape[1]]
        if reach is not None:
            term = jnp.where(_reaches(reach[:, : term.shape[1]], j), term, 0)
        first = first.at[:, : term.shape[1]].add(term)
    return jnp.zeros_like(like).at[:, : first.shape[1]].set(first)


def _taps_adjoint(dy: Array, w: Array, reach: Array | None) -> Array:
    """The gradient of the taps in x: every token collects from the w tokens that read it."""
    total = jnp.zeros_like(dy)
    for j in range(min(w.shape[0], dy.shape[1])):
        term = dy if reach is None else jnp.where(_reaches(reach, j), dy, 0)
        total = total + w[-1 - j].astype(dy.dtype) * _moved(term, -j)
    return total


def _weight_gradient(dy: Array, x: Array, reach: Array | None, num_taps: int) -> Array:
    """The gradient of the taps in w, [w, d]: w[W-1-j] gets sum_{b,t} dy_t x_{t-j}."""
    num = min(num_taps, x.shape[1])
    masks = None if reach is None else [_reaches(reach, j) for j in range(num)]
    sums = lax.platform_dependent(
        dy, x, masks, cpu=partial(sums_in_one_pass, reach=num), default=partial(sums_by_tap, reach=num)
    )
    return jnp.stack([jnp.zeros_like(sums[0])] * (num_taps - num) + sums[::-1])


def sums_by_tap(dy: Array, x: Array, masks: list[Array] | None, *, reach: int) -> list[Array]:
    """sum_{b,t} dy_t x_{t-j} for j < reach, where the j-th mask allows, as one reduction per tap."""
    terms = [dy * _moved(x, j).astype(dy.dtype) for j in range(reach)]
    if masks is not None:
        terms = [jnp.where(mask, term, 0) for mask, term in zip(masks, terms, strict=True)]
    return [term.sum((0, 1)) for term in terms]


def sums_in_one_pass(dy: Array, x: Array, masks: list[Array] | None, *, reach: int) -> list[Array]:
    """`sums_by_tap` as a loop over time, five times faster than reductions of shifted products with XLA on CPU."""

    def step(t: Array, sums: list[Array]) -> list[Array]:
        terms = [_token(dy, t) * _token(x, jnp.maximum(t - j, 0)).astype(dy.dtype) for j in range(reach)]
        allowed = [t >= j for j in range(reach)]
        if masks is not None:
            allowed = [inside & _token(mask, t) for inside, mask in zip(allowed, masks, strict=True)]
        return [total + jnp.where(ok, term, 0) for total, ok, term in zip(sums, allowed, terms, strict=True)]

    sums = lax.fori_loop(0, x.shape[1], step, [jnp.zeros_like(dy[:, 0]) for _ in range(reach)])
    return [total.sum(0) for total in sums]


def _token(array: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False)


def _reaches(reach: Array, j: int) -> Array:
    """Whether each token may see the input j before it, [b, t, 1]."""
    return (reach >= j)[:, :, None]


def _moved(array: Array, j: int) -> Array:
    """`array` moved j tokens later, or -j earlier, zeros coming in."""
    t = array.shape[1]
    moved = jnp.pad(array, [(0, 0), (max(j, 0), max(-j, 0))] + [(0, 0)] * (array.ndim - 2))
    return moved[:, :t] if j >= 0 else moved[:, -t:]
