"""Linear attention as Pallas kernels for TPU: one kernel forward and one for the adjoint, per kind of decay.

With one decay per head (g [b, h r, t], tpu_per_head.py) or one per channel of the key (g [b, h r, t, k],
tpu_per_channel.py). Operands are head-major and t a multiple of the chunk.
Letters: b batch, t time, h query-key heads, r value heads per query-key head, k key dim, v value dim, n chunks,
c chunk.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from hybridlm_kernels.linear_attention import tpu_per_channel, tpu_per_head, tpu_per_head_adjoint

CHUNKS = (64, 128)
DIMS = (64, 128, 256)
DTYPES = ("bfloat16", "float32")
WIDEST = DIMS[-1]
"""Values of more channels are computed in parts of so many, which share a decay and have states of their own."""
MOST_PER_GROUP = 8
"""Value heads of one query-key head, which are in VMEM together; fewer where their states are large. Larger groups are
cut, with a copy of the queries and keys for each part."""


def supports(q: Any, k: Any, v: Any, *gates: Any) -> str | None:
    """Why the kernels cannot serve operands [b, t, h, k], [b, t, h r, v], ...; None where they can."""
    for operand in (q, k, v):
        if str(operand.dtype) not in DTYPES:
            return f"takes {', '.join(DTYPES)}, not {operand.dtype}"
    key, value = q.shape[3], v.shape[3]
    if key not in DIMS:
        return f"key dim {key}: must be {', '.join(map(str, DIMS[:-1]))} or {WIDEST}"
    if value not in DIMS and value % WIDEST:
        return f"value dim {value}: must be {', '.join(map(str, DIMS[:-1]))} or a multiple of {WIDEST}"
    return None


def refuses(q: Any, k: Any, v: Any, *gates: Any, erases: bool, chunk: int | None, precision: str) -> str | None:
    """Why the kernels cannot serve this chunk size, None being their own, at this precision; None where they can."""
    return None if chunk in (None, *CHUNKS) else f"chunk_size={chunk}: must be {CHUNKS[0]} or {CHUNKS[1]}"


def default_chunk(q: Any, k: Any, v: Any, *gates: Any) -> int:
    """The chunk size to use where none is asked for; operands as for `supports`."""
    return 128


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
    interpret: Any = False,
) -> tuple[Array, Array, Array | None]:
    """o, the last state, and where `save` what `adjoint` needs of the states."""
    run = tpu_per_head.forward if g.ndim == 3 else tpu_per_channel.forward
    fit = _Fit(q, v)
    merged = [
        _merge(x) for x in (fit.copied(q), fit.copied(k), fit.cut(v), fit.repeated(beta), fit.repeated(g), fit.cut(s0))
    ]
    o, s_last, states = run(*merged, scale=scale, chunk=chunk, precision=precision, save=save, interpret=interpret)
    return fit.joined(o, v), fit.joined(s_last, s0), states


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
    interpret: Any = False,
) -> tuple[Array, Array, Array, Array | None, Array, Array]:
    """Cotangents of q, k, v, beta (None without it), g and s0."""
    run = tpu_per_head_adjoint.adjoint if g.ndim == 3 else tpu_per_channel.adjoint
    fit = _Fit(q, v)
    merged = [_merge(x) for x in (fit.copied(q), fit.copied(k), fit.cut(v), fit.repeated(beta), fit.repeated(g))]
    upstream = [_merge(fit.cut(do)), _merge(fit.cut(ds_last))]
    found = run(*merged, states, *upstream, scale=scale, chunk=chunk, precision=precision, interpret=interpret)
    dq, dk, dv, dbeta, dg, ds0 = found
    return (
        fit.added(dq, q),
        fit.added(dk, k),
        fit.joined(dv, v),
        None if beta is None else fit.added(dbeta, beta),
        fit.added(dg, g),
        fit.joined(ds0, ds_last),
    )


class _Fit:
    """Operands cut so that the kernels serve them: values in `parts`, queries and keys in `copies`."""

    def __init__(self, q: Array, v: Array):
        width = min(v.shape[3], WIDEST)
        group = v.shape[1] // q.shape[1] * (v.shape[3] // width)
        most = max(1, MOST_PER_GROUP * 128 * 128 // max(q.shape[3] * width, 128 * 128))
        self.parts = v.shape[3] // width
        self.copies = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= most)

    def copied(self, x: Array) -> Array:
        return jnp.repeat(x, self.copies, axis=1) if self.copies > 1 else x

    def repeated(self, x: Array | None) -> Array | None:
        return jnp.repeat(x, self.parts, axis=1) if x is not None and self.parts > 1 else x

    def cut(self, x: Array) -> Array:
        """[b, h, *, v] -> [b, h parts, *, v / parts]"""
        if self.parts == 1:
            return x
        b, h, rows, v = x.shape
        return jnp.moveaxis(x.reshape(b, h, rows, self.parts, -1), 3, 2).reshape(b, -1, rows, v // self.parts)

    def joined(self, x: Array, like: Array) -> Array:
        """The inverse of `cut`."""
        b, h, rows, _ = like.shape
        return jnp.moveaxis(x.reshape(b, h, self.parts, rows, -1), 2, 3).reshape(like.shape)

    def added(self, x: Array, like: Array) -> Array:
        """The sum over copies of what `like` was copied to."""
        x = x.reshape(*like.shape[:2], -1, *like.shape[2:])
        return (x[:, :, 0] if x.shape[2] == 1 else jnp.sum(x.astype(jnp.float32), axis=2)).astype(like.dtype)


def _merge(x: Array | None) -> Array | None:
    """[1, b h, ...]: sequences are independent like heads are, and more heads in a step hide more of its latency."""
    return None if x is None else x.reshape(1, -1, *x.shape[2:])
