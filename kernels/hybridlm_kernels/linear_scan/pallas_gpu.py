"""The diagonal linear recurrence on Hopper GPUs. Letters: b batch, t time, d channels, n chunks of time.

The forward pass reads a and x once and writes h once; its adjoint reads a, h and dh once and writes da and dx once.
Where b and d alone leave most of the GPU idle, time is split: a first pass reads the operands and writes the total
decay of each chunk and what it adds to a zero state, and every chunk of the second pass starts from those before it.
"""

import jax
import jax.numpy as jnp
from jax import Array

from hybridlm_kernels.gpu_scan import Plan, Rows, Stream, Token, fold, identity_and_zero, plan, scan, unsupported
from hybridlm_kernels.segments import CONTINUE, PADDING


def supports(
    a: Array | jax.ShapeDtypeStruct, x: Array | jax.ShapeDtypeStruct, *, compute_capability: float | None
) -> str | None:
    """Why the operands [b, t, d] cannot be served on a device of this compute capability, or None."""
    if jnp.issubdtype(a.dtype, jnp.complexfloating) or jnp.issubdtype(x.dtype, jnp.complexfloating):
        return "serves no complex operands"
    return unsupported([a, x], compute_capability)


def kept(decay: Array, kind: Array | None) -> Array:
    """The decay of a token: 0 where a document starts, 1 at padding."""
    decay = decay.astype(jnp.float32)
    return decay if kind is None else jnp.where(kind == CONTINUE, decay, jnp.where(kind == PADDING, 1.0, 0.0))


def real(value: Array, kind: Array | None) -> Array:
    value = value.astype(jnp.float32)
    return value if kind is None else jnp.where(kind == PADDING, 0.0, value)


def forward(a: Array, x: Array, h0: Array, kinds: Array | None, *, reverse: bool) -> tuple[Array, Array]:
    """h [b, t, d] in the promoted dtype of a and x, and the last state [b, d] float32."""
    dtype = jnp.result_type(a.dtype, x.dtype)
    division = plan(x.shape, a.dtype.itemsize + x.dtype.itemsize + dtype.itemsize)

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            a_t, x_t = rows
            h = kept(a_t, kind) * carries[0] + real(x_t, kind)
            return (h,), (h,)

        return step

    chunks = None if division.num_chunks == 1 else _summaries(a, x, kinds, division, reverse, premultiplied=False)
    streams = [Stream(a), Stream(x)]
    (h,), (last,) = scan(
        "linear_scan_forward", token, streams, kinds, [h0], [], [dtype], division, reverse=reverse, summary=chunks
    )
    return h, last[:, -1]


def adjoint(
    a: Array,
    h: Array,
    h0: Array,
    dh: Array,
    dh_last: Array,
    kinds: Array | None,
    *,
    reverse: bool,
    x_dtype: jax.typing.DTypeLike,
) -> tuple[Array, Array, Array]:
    """da, dx [b, t, d] and dh0 [b, d]: u_t = dh_t + a_{t+1} u_{t+1}, dx_t = u_t, da_t = u_t h_{t-1}."""
    width = 2 * a.dtype.itemsize + h.dtype.itemsize + dh.dtype.itemsize + jnp.dtype(x_dtype).itemsize
    division = plan(a.shape, width)

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            a_t, h_before, dh_t = rows
            u = dh_t.astype(jnp.float32) + carries[0]
            slope = u * h_before.astype(jnp.float32)
            da = slope if kind is None else jnp.where(kind == CONTINUE, slope, 0.0)
            return (kept(a_t, kind) * u,), (da, real(u, kind))

        return step

    chunks = None if division.num_chunks == 1 else _summaries(a, dh, kinds, division, not reverse, premultiplied=True)
    streams = [Stream(a), Stream(h, 1 if reverse else -1, h0[:, None]), Stream(dh)]
    (da, dx), (last,) = scan(
        "linear_scan_adjoint",
        token,
        streams,
        kinds,
        [dh_last],
        [],
        [a.dtype, x_dtype],
        division,
        reverse=not reverse,
        summary=chunks,
    )
    return da, dx, last[:, -1]


def summary(a: Array, x: Array, kinds: Array | None, *, reverse: bool, premultiplied: bool) -> tuple[Array, Array]:
    """The product of all decays and the state after the last token from a zero state, each [b, d] float32.

    `premultiplied` is the recurrence of the adjoint's carry, c -> a_t (x_t + c) in place of a_t c + x_t.
    """
    division = plan(x.shape, a.dtype.itemsize + x.dtype.itemsize, splits_cost=False)
    return fold(*_summaries(a, x, kinds, division, reverse, premultiplied=premultiplied))


def _summaries(
    a: Array, x: Array, kinds: Array | None, division: Plan, reverse: bool, *, premultiplied: bool
) -> tuple[Array, Array]:
    """`summary` of every chunk, each [b, n, d] in scan order."""

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            decay = kept(rows[0], kind)
            # At padding the adjoint's own input still counts: h there repeats the state.
            added = (
                decay * (rows[1].astype(jnp.float32) + carries[1])
                if premultiplied
                else (decay * carries[1] + real(rows[1], kind))
            )
            return (decay * carries[0], added), ()

        return step

    _, (decay, added) = scan(
        "linear_scan_summary",
        token,
        [Stream(a), Stream(x)],
        kinds,
        identity_and_zero(division),
        [],
        [],
        division,
        reverse=reverse,
    )
    return decay, added
