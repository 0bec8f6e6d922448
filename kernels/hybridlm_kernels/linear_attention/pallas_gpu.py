"""Gated linear attention and the gated delta rule on Hopper GPUs, forward and adjoint (Pallas' Mosaic GPU backend).

Letters: b batch, t time, h query-key heads, r value heads per query head, k key dim, v value dim, n chunks.

One kernel that does all of a chunk does not fit a multiprocessor's registers. As in flash-linear-attention (Yang and
Zhang, 2024) the work is divided by what depends on the state. Forward: `gpu_prepare` makes every chunk's scores and
inverse in parallel, `gpu_states.forward` walks over the chunks. Adjoint: `gpu_prepare` again, `gpu_states.backward`
walks back, `gpu_gradients` has all chunks in parallel. With one decay per channel `gpu_channels` and
`gpu_channel_gradients` stand for the parallel ones. Kept between the two passes are the states that enter the chunks,
in bfloat16 as the tensor cores read them.
"""

import jax
import jax.numpy as jnp
from jax import Array

from hybridlm_kernels.linear_attention import gpu_channel_gradients, gpu_channels, gpu_gradients, gpu_states
from hybridlm_kernels.linear_attention.gpu_blocks import BLOCK, PIECES
from hybridlm_kernels.linear_attention.gpu_prepare import Chunks, gates, prepare

DIMS = (64, 128)
SHARED_BYTES = 227 * 1024  # of one multiprocessor's, for one block of threads

Operand = Array | jax.ShapeDtypeStruct


def supports(q: Operand, k: Operand, v: Operand, *gates: Operand, compute_capability: float | None) -> str | None:
    """Why operands of these shapes [b, t, heads, ...] cannot be served on a device of this capability, or None."""
    if compute_capability is None or not 9.0 <= compute_capability < 10.0:
        return "needs a Hopper GPU (compute capability 9.0): its warpgroup matrix products"
    for operand in (q, k, v):
        if operand.dtype != jnp.bfloat16:
            return f"{operand.dtype.name} operands: serves bfloat16"
    for name, dim in (("key", q.shape[-1]), ("value", v.shape[-1])):
        if dim not in DIMS:
            return f"{name} dim {dim}: must be {' or '.join(map(str, DIMS))}"
    return None


def refuses(
    q: Operand, k: Operand, v: Operand, *gates: Operand, erases: bool, chunk: int | None, precision: str
) -> str | None:
    """Why the kernels cannot serve this chunk size, None being their own, at this precision; None where they can."""
    if chunk not in (None, BLOCK):
        return f"chunk_size={chunk}: must be {BLOCK}"
    needs = gpu_channel_gradients.shared_bytes if gates[-1].ndim == 4 else gpu_gradients.shared_bytes
    needed = needs(k.shape[-1], v.shape[-1], PIECES[precision], erases=erases)
    if needed > SHARED_BYTES:
        return (
            f"precision={precision!r}: needs {needed >> 10} KiB of shared memory, of {SHARED_BYTES >> 10}, with key"
            f" dim {k.shape[-1]} and value dim {v.shape[-1]}; must be default"
        )
    return None


def default_chunk(q: Operand, k: Operand, v: Operand, *gates: Operand) -> int:
    return BLOCK


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
) -> tuple[Array, Array, Array | None]:
    """o [b, h r, t, v], the last state [b, h r, k, v] float32 and, to `save`, the states that `adjoint` needs."""
    assert chunk == BLOCK
    queries, keys, values, state = (merged(x) for x in (q, k, v, s0))
    options = {"scale": scale, "num_pieces": PIECES[precision]}
    chunks = chunks_of(queries, keys, beta, g, **options)
    o, last, states = gpu_states.forward(chunks, values, state, save=save, **options)
    return o.reshape(v.shape), last.reshape(s0.shape), states


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
    """dq, dk, dv in their operands' dtypes, dbeta (None without beta), dg and ds0 in float32."""
    assert chunk == BLOCK
    queries, keys, values, given, d_state = (merged(x) for x in (q, k, v, do, ds_last))
    options = {"scale": scale, "num_pieces": PIECES[precision]}
    chunks = chunks_of(queries, keys, beta, g, **options)
    dr, ds0, dstates = gpu_states.backward(chunks, given, d_state, **options)
    if g.ndim == 4:
        dq, dk, dg, dbeta = gpu_channel_gradients.gradients(
            chunks, queries, keys, values, merged(g), states, given, dr, dstates, **options
        )
    else:
        dq, dk, sums = gpu_gradients.gradients(chunks, values, states, given, dr, dstates, **options)
        dg, dbeta = gpu_gradients.gate_gradients(sums, chunks.numbers)
    dr = dr.astype(jnp.float32).sum(0).reshape(v.shape)
    return (
        of_group(dq, q),
        of_group(dk, k),
        (dr if beta is None else beta.astype(jnp.float32)[..., None] * dr).astype(v.dtype),
        None if beta is None else dbeta.reshape(beta.shape),
        dg.reshape(g.shape),
        ds0.reshape(ds_last.shape),
    )


def chunks_of(q: Array, k: Array, beta: Array | None, g: Array, *, scale: float, num_pieces: int) -> Chunks:
    options = {"scale": scale, "num_pieces": num_pieces, "erases": beta is not None}
    if g.ndim == 3:
        return prepare(q, k, gates(beta, g), **options)
    return gpu_channels.prepare(q, k, merged(g).astype(jnp.float32), gpu_channels.channel_gates(beta, g), **options)


def merged(x: Array) -> Array:
    """[b, heads, ...] as [b heads, ...]: the copy engine takes few dimensions."""
    return x.reshape(-1, *x.shape[2:])


def of_group(gradient: Array, operand: Array) -> Array:
    """[b h r, t, k] summed over the r value heads of each query-key head, [b, h, t, k]."""
    b, h, t, dim = operand.shape
    parts = gradient.reshape(b, h, -1, t, dim)
    return parts.astype(jnp.float32).sum(2).astype(operand.dtype)
