"""Short causal depthwise convolution over time. Letters: b batch, t time, d channels, w taps, s = w - 1 held inputs."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from hybridlm_kernels.dispatch import check_operand, check_sequence, choose, local
from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.segments import check_segment_ids, starts

Residuals = tuple[Array, Array, Array | None, Array | None, Array | None]  # x, w, bias, state, document
ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda y: y,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def short_conv(
    x: Float[Array, "b t d"],
    w: Float[Array, "w d"],
    *,
    bias: Float[Array, " d"] | None = None,
    state: Float[Array, "b s d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    activation: str | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
    """y_t = activation(bias + sum_j w[W-1-j] x_{t-j}), every channel on its own; returns y and the state to go on with.

    w[W-1] weighs the current token, w[0] the oldest. `activation` is None, "silu", "gelu" (its tanh form) or "relu".
    Sums are float32 (float64 if an operand is), y has the dtype of `x`.

    `state` [b, W-1, d] holds the W-1 inputs before the first token, oldest first; zeros (or None) for a fresh start.
    The returned state, float32 or wider, holds the last W-1 inputs of the document of the last real token, zeros where
    that document is shorter; a row of padding alone returns the state that it got.

    `segment_ids` separate packed documents (0 = padding): no tap reaches into another document or into padding, and
    only the row's first document sees `state`. Padding may stand before, between and after documents, not inside one;
    y at padding is activation(bias), for the caller to mask. Differentiable in every floating operand.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    check_sequence("x", x)
    b, t, d = x.shape
    check_operand("x", x, (b, t, d), "[batch, time, channels]")
    if w.ndim != 2 or w.shape[0] == 0:
        raise ValueError(f"w: shape {w.shape} must be [taps, channels] with at least one tap")
    check_operand("w", w, (w.shape[0], d), "[taps, channels]")
    if bias is not None:
        bias = jnp.asarray(bias)
        check_operand("bias", bias, (d,), "[channels]")
    held = w.shape[0] - 1
    if state is not None:
        state = jnp.asarray(state)
        check_operand("state", state, (b, held, d), "[batch, taps - 1, channels]")
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        check_segment_ids(segment_ids, (b, t))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: must be None, silu, gelu or relu")
    run = _reference if choose("short_conv", x, w, impl=impl) == "reference" else _chunked
    operands = [(x, "btd"), (w, "wd"), (bias, "d"), (state, "bsd"), (segment_ids, "bt")]
    y, state = local(partial(run, activation=activation), operands, ["btd", "bsd"])
    return y, state


def _sum_dtype(*arrays: Array | None) -> jnp.dtype:
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays if array is not None))


def _initial(state: Array | None, x: Array, w: Array, dtype: jnp.dtype) -> Array:
    if state is not None:
        return state.astype(dtype)
    return jnp.zeros((x.shape[0], w.shape[0] - 1, x.shape[2]), dtype)


@partial(jax.jit, static_argnames="activation")
def _reference(
    x: Array, w: Array, bias: Array | None, state: Array | None, segment_ids: Array | None, *, activation: str | None
) -> tuple[Array, Array]:
    """Token by token, with the gradient of JAX's own automatic differentiation: the oracle of the other tiers."""
    dtype = _sum_dtype(x, w, bias, state)
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

    x, ids, state = align_varying(x, ids, _initial(state, x, w, dtype))
    time_major = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(ids, 1, 0))
    (state, _), y = lax.scan(step, (state, jnp.zeros_like(ids[:, 0])), time_major)
    return jnp.moveaxis(y, 0, 1), state


@partial(jax.jit, static_argnames="activation")
def _chunked(
    x: Array, w: Array, bias: Array | None, state: Array | None, segment_ids: Array | None, *, activation: str | None
) -> tuple[Array, Array]:
    """All tokens at once: one shifted, masked multiply and add per tap."""
    x, w, bias, state, segment_ids = align_varying(x, w, bias, state, segment_ids)
    held = _initial(state, x, w, _sum_dtype(x, w, bias, state))
    if x.shape[1] == 1:
        return _one_token(x, w, bias, held, segment_ids, activation)
    document = None if segment_ids is None else _document_index(segment_ids)
    y = _convolve(x, w, bias, state, document, activation)
    if document is None:
        num_held = held.shape[1]
        recent = x[:, max(0, x.shape[1] - num_held) :].astype(held.dtype)
        return y, jnp.concatenate([held[:, recent.shape[1] :], recent], axis=1)
    return y, _last_inputs(x, held, document)


def _one_token(
    x: Array, w: Array, bias: Array | None, held: Array, segment_ids: Array | None, activation: str | None
) -> tuple[Array, Array]:
    """The step of decoding: the window is the state and this token."""
    window = jnp.concatenate([held, x.astype(held.dtype)], axis=1)  # b w d
    y = jnp.einsum("bwd,wd->bd", window, w.astype(held.dtype), precision="highest")
    new = window[:, 1:]
    if segment_ids is not None:
        real = segment_ids != 0
        y, new = jnp.where(real, y, 0), jnp.where(real[:, :, None], new, held)
    y = y if bias is None else y + bias.astype(held.dtype)
    return ACTIVATIONS[activation](y)[:, None].astype(x.dtype), new


def _document_index(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """0 for the row's first document, 1 for the second and so on; -1 at padding."""
    return jnp.where(segment_ids != 0, jnp.cumsum(starts(segment_ids), axis=1), -1)


def _taps(x: Array, w: Array, document: Array | None, dtype: jnp.dtype) -> Array:
    """sum_j w[W-1-j] x_{t-j} over the tokens t-j of the same document."""
    total = jnp.zeros_like(x, dtype=dtype)
    for j in range(min(w.shape[0], x.shape[1])):
        term = w[-1 - j].astype(dtype) * _moved(x, j).astype(dtype)
        total = total + (term if document is None else jnp.where(_reaches(document, j), term, 0))
    return total


def _taps_adjoint(dy: Array, w: Array, document: Array | None) -> Array:
    """The gradient of `_taps` in x: every token collects from the W tokens that read it."""
    total = jnp.zeros_like(dy)
    for j in range(min(w.shape[0], dy.shape[1])):
        term = dy if document is None else jnp.where(_reaches(document, j), dy, 0)
        total = total + w[-1 - j].astype(dy.dtype) * _moved(term, -j)
    return total


def _weight_gradient(dy: Array, x: Array, document: Array | None, num_taps: int) -> Array:
    """The gradient of `_taps` in w, [w, d]: w[W-1-j] gets sum_{b,t} dy_t x_{t-j}."""
    reach = min(num_taps, x.shape[1])
    masks = None if document is None else [_reaches(document, j) for j in range(reach)]
    sums = lax.platform_dependent(
        dy, x, masks, cpu=partial(sums_in_one_pass, reach=reach), default=partial(sums_by_tap, reach=reach)
    )
    return jnp.stack([jnp.zeros_like(sums[0])] * (num_taps - reach) + sums[::-1])


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
        allowed = [t >= j for j in range(reach)] if masks is None else [_token(mask, t) for mask in masks]
        return [total + jnp.where(ok, term, 0) for total, ok, term in zip(sums, allowed, terms, strict=True)]

    sums = lax.fori_loop(0, x.shape[1], step, [jnp.zeros_like(dy[:, 0]) for _ in range(reach)])
    return [total.sum(0) for total in sums]


def _token(array: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False)


def _reaches(document: Array, j: int) -> Array:
    """Whether each token has a token of its own document j before it, [b, t, 1]."""
    return ((document == _moved(document, j, -1)) & (document >= 0))[:, :, None]


def _moved(array: Array, j: int, fill: int = 0) -> Array:
    """`array` moved j tokens later, or -j earlier."""
    t = array.shape[1]
    widths = [(0, 0), (max(j, 0), max(-j, 0))] + [(0, 0)] * (array.ndim - 2)
    moved = jnp.pad(array, widths, constant_values=fill)
    return moved[:, :t] if j >= 0 else moved[:, -t:]


def _preactivation(
    x: Array, w: Array, bias: Array | None, state: Array | None, document: Array | None, dtype: jnp.dtype
) -> Array:
    y = _taps(x, w, document, dtype)
    y = y if state is None else y + _from_state(w, state, document, y)
    return y if bias is None else y + bias.astype(dtype)


def _from_state(w: Array, state: Array, document: Array | None, like: Array) -> Array:
    """What the state adds to the first W-1 real tokens of the row's first document, shaped as `like` [b, t, d]."""
    t, held = like.shape[1], state.shape[1]
    ahead = jnp.pad(state.astype(like.dtype), ((0, 0), (0, held), (0, 0)))
    after = _taps(ahead, w, None, like.dtype)[:, held:]  # b s d
    if document is None:
        return jnp.zeros_like(like).at[:, :held].add(after[:, :t])
    row = jnp.arange(like.shape[0])[:, None]
    time = jnp.argmax(document >= 0, axis=1)[:, None] + jnp.arange(held)
    belongs = (time < t) & (document[row, jnp.minimum(time, t - 1)] == 0)
    return jnp.zeros_like(like).at[row, time].add(jnp.where(belongs[:, :, None], after, 0), mode="drop")


def _plain_convolve(
    x: Array, w: Array, bias: Array | None, state: Array | None, document: Array | None, activation: str | None
) -> Array:
    y = _preactivation(x, w, bias, state, document, _sum_dtype(x, w, bias, state))
    return ACTIVATIONS[activation](y).astype(x.dtype)


def _convolve_fwd(
    x: Array, w: Array, bias: Array | None, state: Array | None, document: Array | None, activation: str | None
) -> tuple[Array, Residuals]:
    return _convolve(x, w, bias, state, document, activation), (x, w, bias, state, document)


def _convolve_bwd(
    activation: str | None, residuals: Residuals, dy: Array
) -> tuple[Array, Array, Array | None, Array | None, None]:
    x, w, bias, state, document = residuals
    dtype = _sum_dtype(x, w, bias, state)
    before = _preactivation(x, w, bias, state, document, dtype)
    (dy,) = jax.vjp(ACTIVATIONS[activation], before)[1](dy.astype(dtype))
    dy = lax.optimization_barrier(dy)  # else every sum below recomputes the convolution and its activation
    dx = _taps_adjoint(dy, w, document).astype(x.dtype)
    dw = _weight_gradient(dy, x, document, w.shape[0])
    dbias = None if bias is None else dy.sum((0, 1)).astype(bias.dtype)
    dstate = None
    if state is not None:
        dw_state, dstate = jax.vjp(lambda w, state: _from_state(w, state, document, dy), w, state)[1](dy)
        dw = dw + dw_state.astype(dw.dtype)
    return dx, dw.astype(w.dtype), dbias, dstate, None


# The inputs are the only residuals: automatic differentiation would keep one shifted copy of x per tap.
_convolve = jax.custom_vjp(_plain_convolve, nondiff_argnums=(5,))
_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _last_inputs(x: Array, held: Array, document: Array) -> Array:
    """The last W-1 inputs of the document of each row's last real token, or of the state before it."""
    t, num_held = x.shape[1], held.shape[1]
    if num_held == 0:
        return held
    latest = document.max(axis=1, keepdims=True)  # b 1
    length = ((document == latest) & (document >= 0)).sum(axis=1, keepdims=True)
    end = jnp.max(jnp.where(document >= 0, jnp.arange(t), -1), axis=1, keepdims=True)
    back = num_held - 1 - jnp.arange(num_held)  # tokens between the input and the last one
    row = jnp.arange(x.shape[0])[:, None]
    recent = x[row, jnp.maximum(end - back, 0)].astype(held.dtype)
    earlier = held[row, jnp.clip(jnp.arange(num_held) + length, 0, num_held - 1)]
    earlier = jnp.where((latest <= 0)[:, :, None], earlier, 0)
    return jnp.where((back < length)[:, :, None], recent, earlier)
