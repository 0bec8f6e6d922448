"""The diagonal linear recurrence on Hopper GPUs. Letters: b batch, t time, d channels, n chunks of time.

The forward pass reads a and x once and writes h once; its adjoint reads a, h and dh once and writes da and dx once.
Where b and d alone leave most of the GPU idle, time is split: a first pass reads the operands and writes the total
decay of each chunk and what it adds to a zero state, and every chunk of the second pass starts from those before it.
"""

import jax
import jax.numpy as jnp
from jax import Array

from hybridlm_kernels.gpu_scan import Plan, Rows, Stream, Token, fold, plan, scan, unsupported
from hybridlm_kernels.planes import Planes, planes_of, plus, times, whole
from hybridlm_kernels.segments import CONTINUE, PADDING


def supports(
    a: Array | jax.ShapeDtypeStruct, x: Array | jax.ShapeDtypeStruct, *, compute_capability: float | None
) -> str | None:
    """Why the operands [b, t, d] cannot be served on a device of this compute capability, or None."""
    parts = [
        jax.ShapeDtypeStruct(v.shape, jnp.float32)
        if v.dtype == jnp.complex64
        else jax.ShapeDtypeStruct(v.shape, v.dtype)
        for v in (a, x)
    ]
    return unsupported(parts, compute_capability)


def kept(decay: Planes, kind: Array | None) -> Planes:
    """The decay of a token: 0 where a document starts, 1 at padding."""
    decay = tuple(plane.astype(jnp.float32) for plane in decay)
    if kind is None:
        return decay
    at_padding = (1.0, 0.0)
    return tuple(
        jnp.where(kind == CONTINUE, plane, jnp.where(kind == PADDING, one, 0.0))
        for plane, one in zip(decay, at_padding, strict=False)
    )


def real(value: Planes, kind: Array | None) -> Planes:
    """The input of a token: 0 at padding."""
    value = tuple(plane.astype(jnp.float32) for plane in value)
    return value if kind is None else tuple(jnp.where(kind == PADDING, 0.0, plane) for plane in value)


def forward(a: Array, x: Array, h0: Array, kinds: Array | None, *, reverse: bool) -> tuple[Array, Array]:
    """h [b, t, d] in the promoted dtype of a and x, and the last state [b, d] float32 (complex64)."""
    dtype = jnp.result_type(a.dtype, x.dtype)
    ap, xp, hp = planes_of(a), planes_of(x), planes_of(h0)
    outputs = [_part(dtype)] * len(hp)
    division = plan(x.shape, _width([*ap, *xp], outputs))

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            decay, value = kept(rows[: len(ap)], kind), real(rows[len(ap) :], kind)
            h = plus(times(decay, carries), value)
            return h, h

        return step

    starts, chunks = _starts(a, x, h0, kinds, division, reverse, premultiplied=False)
    streams = [Stream(plane) for plane in (*ap, *xp)]
    h, last = scan(
        "linear_scan_forward", token, streams, kinds, starts, [], outputs, division, reverse=reverse, summary=chunks
    )
    return whole(tuple(h)), whole(tuple(last))[:, -1]


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
    ap, hp, dp, sp = planes_of(a), planes_of(h), planes_of(dh), planes_of(h0)
    num_dx = 2 if jnp.issubdtype(x_dtype, jnp.complexfloating) else 1
    outputs = [_part(a.dtype)] * len(ap) + [_part(x_dtype)] * num_dx
    division = plan(a.shape, _width([*ap, *hp, *dp], outputs))

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            decay, before, dh_t = rows[: len(ap)], rows[len(ap) : len(ap) + len(hp)], rows[len(ap) + len(hp) :]
            u = plus(tuple(plane.astype(jnp.float32) for plane in dh_t), carries)
            slope = times(u, tuple(plane.astype(jnp.float32) for plane in before), len(ap))
            if kind is not None:
                slope = tuple(jnp.where(kind == CONTINUE, plane, 0.0) for plane in slope)
            return times(kept(decay, kind), u), slope + real(u, kind)[:num_dx]

        return step

    starts, chunks = _starts(a, dh, dh_last, kinds, division, not reverse, premultiplied=True)
    earlier = 1 if reverse else -1
    streams = [Stream(plane) for plane in ap]
    streams += [Stream(plane, earlier, state[:, None]) for plane, state in zip(hp, sp, strict=True)]
    streams += [Stream(plane) for plane in dp]
    results, last = scan(
        "linear_scan_adjoint", token, streams, kinds, starts, [], outputs, division, reverse=not reverse, summary=chunks
    )
    return whole(tuple(results[: len(ap)])), whole(tuple(results[len(ap) :])), whole(tuple(last))[:, -1]


def summary(a: Array, x: Array, kinds: Array | None, *, reverse: bool, premultiplied: bool) -> tuple[Array, Array]:
    """The product of all decays and the state after the last token from a zero state, each [b, d] float32 (complex64).

    `premultiplied` is the recurrence of the adjoint's carry, c -> a_t (x_t + c) in place of a_t c + x_t.
    """
    division = plan(x.shape, _width([*planes_of(a), *planes_of(x)], []), splits_cost=False)
    return fold(*_summaries(a, x, kinds, division, reverse, premultiplied=premultiplied))


def _summaries(
    a: Array, x: Array, kinds: Array | None, division: Plan, reverse: bool, *, premultiplied: bool
) -> tuple[Array, Array]:
    """`summary` of every chunk, each [b, n, d] in scan order."""
    ap, xp = planes_of(a), planes_of(x)
    num_added = max(len(ap), len(xp))

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            decay, state = kept(rows[: len(ap)], kind), carries[len(ap) :]
            value = tuple(plane.astype(jnp.float32) for plane in rows[len(ap) :])
            # At padding the adjoint's own input still counts: h there repeats the state.
            added = times(decay, plus(value, state)) if premultiplied else plus(times(decay, state), real(value, kind))
            return times(decay, carries[: len(ap)]) + added, ()

        return step

    # No decay yet, nothing added yet.
    starts = [jnp.full(division.d, 1.0 if i == 0 else 0.0, jnp.float32) for i in range(len(ap) + num_added)]
    streams = [Stream(plane) for plane in (*ap, *xp)]
    _, last = scan("linear_scan_summary", token, streams, kinds, starts, [], [], division, reverse=reverse)
    return whole(tuple(last[: len(ap)])), whole(tuple(last[len(ap) :]))


def _starts(
    a: Array, x: Array, state: Array, kinds: Array | None, division: Plan, reverse: bool, *, premultiplied: bool
) -> tuple[list[Array], tuple[Array, Array] | None]:
    """The states that `scan` begins with, and the chunks' summaries where it finds those of later chunks itself."""
    if division.num_chunks == 1:
        return list(planes_of(state)), None
    decay, added = _summaries(a, x, kinds, division, reverse, premultiplied=premultiplied)
    if not jnp.iscomplexobj(state):
        return [state], (decay, added)
    entering = []
    for i in range(division.num_chunks):
        entering.append(state)
        state = decay[:, i] * state + added[:, i]
    return list(planes_of(jnp.stack(entering, axis=1))), None


def _part(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of a complex number's parts; a real one's own."""
    return jnp.finfo(dtype).dtype


def _width(arrays: list[Array], outputs: list[jnp.dtype]) -> int:
    """Bytes of one token of one channel in shared memory."""
    return sum(array.dtype.itemsize for array in arrays) + sum(dtype.itemsize for dtype in outputs)
