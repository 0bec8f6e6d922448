"""The adjoint of linear attention with one decay per head, as a Pallas kernel for TPU.

The chunks from the last to the first, the cotangent of the state in VMEM. What the forward kernel computed in a chunk
is computed again from the inputs and the state at its start.
Letters: b batch, t time, h query-key heads, r value heads per query-key head, k key dim, v value dim, n chunks,
c chunk.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridlm_kernels.jax_compat import out_struct
from hybridlm_kernels.linear_attention import tpu_blocks
from hybridlm_kernels.linear_attention.tpu_blocks import dot, iota, lower
from hybridlm_kernels.linear_attention.tpu_per_head import (
    Layout,
    erasures,
    gates,
    heads_per_step,
    lanes,
    over_lanes,
    transpose,
    vmem_per_head,
    weights,
    writes,
)


@partial(jax.jit, static_argnames=("scale", "chunk", "precision", "interpret"))
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
    """Cotangents of q, k, v, beta (None without it), g and s0, from `forward`'s saved states."""
    b, h, t, key = q.shape
    hv, value = v.shape[1], v.shape[3]
    each = vmem_per_head(hv // h, chunk, [q] * 4, [v] * 3, states.dtype, matrices=14)
    heads = heads_per_step(q, v, each)
    layout = Layout(b, h, hv // h, t, chunk, heads, backward=True)
    like = [x for x in (q, k, v, beta, g, states, do, ds_last) if x is not None]
    keys, values, state = layout.tokens(h, key), layout.tokens(hv, value), layout.state(key, value)
    gate = layout.gates()
    dq, dk, dv, dbeta, dg, ds0 = pl.pallas_call(
        partial(_adjoint_kernel, r=hv // h, scale=scale, precision=precision),
        grid=layout.grid,
        in_specs=[
            keys,
            keys,
            values,
            None if beta is None else gate,
            gate,
            layout.states(key, value),
            values,
            state,
        ],
        out_specs=[keys, keys, values, None if beta is None else gate, gate, state],
        out_shape=[
            out_struct(q.shape, q.dtype, *like),
            out_struct(k.shape, k.dtype, *like),
            out_struct(v.shape, v.dtype, *like),
            None if beta is None else layout.gates_like(*like),
            layout.gates_like(*like),
            out_struct(ds_last.shape, jnp.float32, *like),
        ],
        scratch_shapes=[pltpu.VMEM((heads * hv // h, key, value), jnp.float32)],
        compiler_params=tpu_blocks.params(heads * each),
        interpret=interpret,
        name=("gated_linear_attention" if beta is None else "gated_delta_rule") + "_adjoint",
    )(q, k, v, None if beta is None else layout.lay_out(beta), layout.lay_out(g), states, do, ds_last)
    return dq, dk, dv, None if beta is None else layout.restore(dbeta), layout.restore(dg), ds0


def _adjoint_kernel(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    g: Any,
    states: Any,
    do: Any,
    ds_last: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    dbeta: Any,
    dg: Any,
    ds0: Any,
    ds: Any,
    *,
    r: int,
    scale: float,
    precision: str,
) -> None:
    heads, values = range(q.shape[0]), range(v.shape[0])
    (_, c, key), value = q.shape, v.shape[2]
    erases = beta is not None

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        ds[...] = ds_last[...]

    def before(j: int, dim: int) -> Array:
        return lanes(gate.before[j], dim)

    gate = gates(len(values), g[...], beta[...] if erases else None, precision)
    written = writes(gate)
    columns = transpose(written)
    write = [over_lanes(columns, j) for j in values]
    weight = weights(gate, scale)
    k_k = [dot(k[i], k[i], precision, "nt") for i in heads] if erases else []
    solvers = tpu_blocks.solvers(erasures(k_k, gate), precision) if erases else []
    new = [v[j] for j in values]
    if erases:
        held = [dot(k[j // r], states[j], precision) for j in values]
        rest = [v[j].astype(jnp.float32) - before(j, value) * held[j] for j in values]
        new = tpu_blocks.solve(solvers, rest, precision)

    # What was written reaches the outputs of this chunk and the state after it.
    q_k = [dot(q[i], k[i], precision, "nt") for i in heads]
    later = [lanes(write[j], value) * dot(k[j // r], ds[j], precision) for j in values]
    dvalue = [dot(q_k[j // r] * weight[j], do[j], precision, "tn") + later[j] for j in values]
    if erases:
        dvalue = tpu_blocks.solve_transposed(solvers, dvalue, precision)
    for j in values:
        dv[j] = dvalue[j].astype(dv.dtype)

    # Through the states. What the old state's erasure takes is -before k^T S.
    dstored = [dot(new[j], ds[j], precision, "nt") for j in values]
    upstream = [do[j] for j in values]
    if erases:
        upstream = [_stack(do[j], dvalue[j], precision) for j in values]
    through_state = [dot(x, states[j], precision, "nt") for j, x in zip(values, upstream, strict=True)]
    dread = [scale * before(j, key) * x[:c] for j, x in zip(values, through_state, strict=True)]
    derased = [-before(j, key) * x[c:] for j, x in zip(values, through_state, strict=True)] if erases else []
    whole = [gate.whole[j] * _total(states[j].astype(jnp.float32) * ds[j]) for j in values]
    for j in values:
        scaled = scale * before(j, value) * do[j].astype(jnp.float32)
        added = dot(q[j // r], scaled, precision, "tn")
        if erases:
            added -= dot(k[j // r], before(j, value) * dvalue[j], precision, "tn")
        ds[j] = gate.whole[j] * ds[j] + added

    # Through the scores, and through beta, which multiplies their columns.
    below = lower(c, strict=True)
    dscores = [dot(x, new[j], precision, "nt") for j, x in zip(values, upstream, strict=True)]
    dq_k = [x[:c] * (scale * gate.between[j]) for j, x in zip(values, dscores, strict=True)]
    moved = [dq_k[j] * q_k[j // r] for j in values]
    dk_k: list[Array] = []
    through_beta: list[Array] = []
    if erases:
        dk_k = [x[c:] * jnp.where(below, -gate.between[j], 0.0) for j, x in zip(values, dscores, strict=True)]
        moved = [moved[j] + dk_k[j] * k_k[j // r] for j in values]
        through_beta = [jnp.sum(x, axis=0, keepdims=True) for x in moved]
        dq_k, dk_k, moved = ([x * row for x, row in zip(y, gate.beta, strict=True)] for y in (dq_k, dk_k, moved))

    for i in heads:
        group = range(i * r, i * r + r)
        scores = _sum(dq_k[j] for j in group)
        dq[i] = (dot(scores, k[i], precision) + _sum(dread[j] for j in group)).astype(dq.dtype)
        total = dot(scores, q[i], precision, "tn") + _sum(lanes(write[j], key) * dstored[j] for j in group)
        if erases:
            scores = _sum(dk_k[j] for j in group)
            total += dot(scores + scores.T, k[i], precision) + _sum(derased[j] for j in group)
        dk[i] = total.astype(dk.dtype)

    stored = [_row_sums(k[j // r].astype(jnp.float32) * dstored[j], precision) for j in values]
    read = [q[j // r].astype(jnp.float32) * dread[j] for j in values]
    if erases:
        read = [read[j] + k[j // r].astype(jnp.float32) * derased[j] for j in values]
        dbeta[...] = _rows([through_beta[j] + gate.after[j] * stored[j] for j in values], dbeta.shape[0])
    before_cotangents = _rows([_row_sums(x, precision) for x in read], dg.shape[0])
    after_cotangents = _rows([written[j] * stored[j] for j in values], dg.shape[0])
    dg[...] = _decay_cotangents(moved, before_cotangents, after_cotangents, whole, precision)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        ds0[...] = ds[...]


def _decay_cotangents(
    moved: Sequence[Array], before: Array, after: Array, whole: Sequence[Array], precision: str
) -> Array:
    """Rows dg, from the cotangents of the sums over j < l <= i (`moved`, [c, c]), l <= i, l > j and all l.

    Every sum is taken over the tokens that it is about. Differences of longer sums would lose their digits.
    """
    c = before.shape[1]
    until = lower(c)
    upper = (iota((c, c), 0) < iota((c, c), 1)).astype(jnp.bfloat16)
    columns = [dot(x, upper, precision) for x in moved]  # over j < l: [i, l]
    columns = [jnp.sum(jnp.where(until, x, 0.0), axis=0, keepdims=True) for x in columns]  # over i >= l
    total = _rows([x + y for x, y in zip(columns, whole, strict=True)], before.shape[0])
    return total + dot(before, until.astype(jnp.bfloat16), "highest") + dot(after, upper, "highest")


def _stack(x: Array, y: Array, precision: str) -> Array:
    """x above y, as what a product makes of them."""
    dtype = jnp.bfloat16 if precision == "default" else jnp.float32
    return jnp.concatenate([x.astype(dtype), y.astype(dtype)])


def _row_sums(x: Array, precision: str) -> Array:
    """The sums of x [c, k] over k, as a row [1, c]."""
    return dot(jnp.ones((tpu_blocks.SUBLANES, x.shape[1]), jnp.bfloat16), x, precision, "nt")[:1]


def _rows(each: Sequence[Array], rows: int) -> Array:
    """Rows [1, c] as the first of a matrix [rows, c]."""
    row = iota((rows, each[0].shape[1]), 0)
    matrix = jnp.zeros(row.shape, jnp.float32)
    for j, x in enumerate(each):
        matrix = jnp.where(row == j, x, matrix)
    return matrix


def _total(x: Array) -> Array:
    return jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=1, keepdims=True)


def _sum(arrays: Iterable[Array]) -> Array:
    first, *rest = arrays
    return sum(rest, first)
