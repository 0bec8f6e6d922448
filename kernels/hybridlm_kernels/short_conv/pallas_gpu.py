"""Short causal convolution with its activation on Hopper GPUs. Letters: b batch, t time, d channels, n chunks.

The forward pass reads x once and writes y once, the last W - 1 inputs in registers. The adjoint reads x and dy once and
writes dx once: it walks back in time, recomputes the preactivation, and keeps what later tokens add to the gradients of
the W - 1 inputs before them. Time is split into chunks freely, since a chunk depends on W - 1 tokens of its neighbour.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hybridlm_kernels.gpu_scan import Plan, Rows, Stream, Token, plan, reciprocal, scan, unsupported

MAX_TAPS = 8  # of each, a warpgroup keeps the weight, its gradient, an input and an input's gradient in registers
GELU_SCALE, GELU_CUBIC = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the cubic term of gelu's tanh form


def sigmoid(x: Array) -> Array:
    return reciprocal(1.0 + jnp.exp(jnp.minimum(-x, 80.0)))  # an infinite denominator would become NaN


def _silu(p: Array) -> tuple[Array, Array]:
    s = sigmoid(p)
    return p * s, s * (1.0 + p * (1.0 - s))


def _gelu(p: Array) -> tuple[Array, Array]:
    """The tanh form: (1 + tanh(u)) / 2 is a sigmoid of 2 u."""
    s = sigmoid(2.0 * GELU_SCALE * (p + GELU_CUBIC * p * p * p))
    return p * s, s + p * s * (1.0 - s) * 2.0 * GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * p * p)


ACTIVATIONS: dict[str | None, Callable[[Array], tuple[Array, Array]]] = {  # value and derivative
    None: lambda p: (p, jnp.ones_like(p)),
    "silu": _silu,
    "gelu": _gelu,
    "relu": lambda p: (jnp.maximum(p, 0.0), jnp.where(p > 0.0, 1.0, jnp.zeros_like(p))),
}


def supports(
    x: Array | jax.ShapeDtypeStruct, w: Array | jax.ShapeDtypeStruct, *, compute_capability: float | None
) -> str | None:
    """Why x [b, t, d] and w [W, d] cannot be served on a device of this compute capability, or None."""
    if w.shape[0] > MAX_TAPS:
        return f"serves up to {MAX_TAPS} taps, not {w.shape[0]} taps"
    if w.dtype.name not in ("bfloat16", "float32"):
        return f"serves bfloat16 and float32 weights, not {w.dtype.name}"
    return unsupported([x], compute_capability)


def forward(
    x: Array, w: Array, bias: Array | None, halo: Array, reach: Array | None, *, activation: str | None
) -> Array:
    """y [b, t, d] in the dtype of x."""
    division = plan(x.shape, 2 * x.dtype.itemsize, splits_cost=False)
    first = np.arange(division.num_chunks) * division.chunk_blocks * division.block_time
    before = rows_at(x, halo, first[:, None] - np.arange(w.shape[0] - 1, 0, -1))  # b n s d

    def token(constants: Rows) -> Token:
        *weights, offset = constants

        def step(carries: Rows, seen: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            inputs = (*carries, rows[0].astype(jnp.float32))
            return inputs[1:], (ACTIVATIONS[activation](preactivation(weights, offset, inputs, seen))[0],)

        return step

    starts = [before[:, :, j] for j in range(w.shape[0] - 1)]
    (y,), _ = scan(
        "short_conv_forward",
        token,
        [Stream(x)],
        reach,
        starts,
        constants_of(w, bias),
        [x.dtype],
        division,
        reverse=False,
    )
    return y


def adjoint(
    x: Array, w: Array, bias: Array | None, halo: Array, reach: Array | None, dy: Array, *, activation: str | None
) -> tuple[Array, Array, Array | None, Array]:
    """dx [b, t, d], and in float32 dw [W, d], dbias [d] and dhalo [b, W - 1, d]."""
    division = plan(x.shape, 2 * x.dtype.itemsize + dy.dtype.itemsize, splits_cost=False)
    held = w.shape[0] - 1

    def token(constants: Rows) -> Token:
        *weights, offset = constants

        def step(carries: Rows, seen: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            # inputs x_{t-W+2}..x_t, the gradients that later tokens give x_{t-W+2}..x_t, dw, dbias
            inputs, later = (rows[0].astype(jnp.float32), *carries[:held]), (None, *carries[held : 2 * held])
            dw, dbias = carries[2 * held : -1], carries[-1]
            g = rows[1].astype(jnp.float32) * ACTIVATIONS[activation](preactivation(weights, offset, inputs, seen))[1]
            dw = [total + masked(g * inputs[j], seen, held - j) for j, total in enumerate(dw)]
            dx = [masked(weight * g, seen, held - j) for j, weight in enumerate(weights)]
            dx = [slope if extra is None else slope + extra for slope, extra in zip(dx, later, strict=True)]
            return (*inputs[:-1], *dx[:-1], *dw, dbias + g), (dx[-1],)

        return step

    starts = _entering_adjoint(token, x, w, bias, halo, reach, dy, division)
    streams = [Stream(x, -held, halo) if held else Stream(x), Stream(dy)]
    (dx,), last = scan(
        "short_conv_adjoint", token, streams, reach, starts, constants_of(w, bias), [x.dtype], division, reverse=True
    )
    dhalo = [gradient[:, -1] for gradient in last[held : 2 * held]]  # the first chunk of time comes last
    dw, dbias = jnp.stack([total.sum((0, 1)) for total in last[2 * held : -1]]), last[-1].sum((0, 1))
    return dx, dw, None if bias is None else dbias, jnp.stack(dhalo, 1) if held else jnp.zeros_like(halo)


def masked(value: Array, seen: Array | None, distance: int) -> Array:
    """`value` where the token sees the input `distance` tokens before it."""
    return value if seen is None else jnp.where(seen >= distance, value, 0.0)


def preactivation(weights: Rows | list[Array], offset: Array, inputs: Rows, seen: Array | None) -> Array:
    total = offset
    for j, (weight, value) in enumerate(zip(weights, inputs, strict=True)):
        total = total + weight * masked(value, seen, len(inputs) - 1 - j)
    return total


def constants_of(w: Array, bias: Array | None) -> list[Array]:
    """The taps, oldest first, and the bias, each [d] float32."""
    offset = jnp.zeros(w.shape[1], jnp.float32) if bias is None else bias.astype(jnp.float32)
    return [*w.astype(jnp.float32), offset]


def rows_at(x: Array, halo: Array, times: np.ndarray) -> Array:
    """The inputs [b, n, s, d] float32 at `times` [n, s]; from `halo` before token 0, zero after the last one."""
    t, held = x.shape[1], halo.shape[1]
    rows = x[:, np.clip(times, 0, t - 1)].astype(jnp.float32)
    rows = jnp.where((times < t)[:, :, None], rows, 0.0)
    if not held:
        return rows
    return jnp.where((times < 0)[:, :, None], halo[:, np.clip(times + held, 0, held - 1)], rows)


def _entering_adjoint(
    token: Callable[[Rows], Token],
    x: Array,
    w: Array,
    bias: Array | None,
    halo: Array,
    reach: Array | None,
    dy: Array,
    division: Plan,
) -> list[Array]:
    """The adjoint's carries before its first token of each chunk, the last chunk of time first, each [b, n, d].

    They come of the W - 1 tokens after the chunk, which are advanced here as in the kernel but for all chunks at once;
    their part of dw and dbias is left to the chunk that they belong to.
    """
    num_taps, held = w.shape[0], w.shape[0] - 1
    blocks_left = division.num_blocks - np.arange(division.num_chunks) * division.chunk_blocks
    ends = np.minimum(blocks_left * division.block_time, division.t)
    zero = jnp.zeros((division.b, division.num_chunks, division.d), jnp.float32)
    if not held:
        return [zero] * (num_taps + 1)
    inputs = rows_at(x, halo, ends[:, None] + np.arange(-held, held))  # b n s d
    slopes = rows_at(dy, jnp.zeros_like(halo), ends[:, None] + np.arange(held))
    carries = (*(inputs[:, :, held + j] for j in range(held)), *[zero] * (held + num_taps + 1))
    step = token(tuple(constants_of(w, bias)))
    for j in range(held)[::-1]:
        seen = None if reach is None else reach[:, np.minimum(ends + j, division.t - 1)][:, :, None]
        carries, _ = step(carries, seen, (inputs[:, :, j], slopes[:, :, j]))
    return [*carries[: 2 * held], *[zero] * (num_taps + 1)]
