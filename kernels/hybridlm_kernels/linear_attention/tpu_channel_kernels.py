"""What a grid step of linear attention with a decay per key channel computes on TPU: a chunk of several heads.

States are held transposed, [v, k], so that decays lie along lanes. All of the maths is in float32 where it is not the
operand of a product; with precision "default" operands are rounded to bfloat16 once.
Letters: t time, h query-key heads, r value heads per query-key head, k key dim, v value dim, n tiles, c chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from hybridlm_kernels.linear_attention.tpu_blocks import LANES, dot, inverse, lower
from hybridlm_kernels.linear_attention.tpu_channel_scores import (
    Level,
    flat,
    rounded,
    scores,
    scores_adjoint,
    tiled,
    with_diagonal,
)


@dataclass(frozen=True)
class Chunk:
    """A chunk of one head, from q, k and g alone."""

    q: Array
    """scale q [n, 8, k]."""
    k: Array
    """[n, 8, k]."""
    attention: Array
    """scale q k^T with decays on and below the diagonal, or its transpose, as an operand [c, c]."""
    erase: Array
    """k k^T with decays below the diagonal, [c, c]; zeros without an erase term."""
    before: Array
    """Decays from the chunk's start, [n, 8, k]."""
    after: Array
    """Decays to the chunk's end, [n, 8, k]."""
    whole: Array
    """Decay over the chunk, [1, k]."""
    rows: list[Array]
    """What has scores with k: q, or q and k."""
    levels: list[Level]
    precision: str

    @property
    def q_before(self) -> Array:
        return rounded(flat(self.q * self.before), self.precision)

    @property
    def k_before(self) -> Array:
        return rounded(flat(self.k * self.before), self.precision)

    @property
    def k_after(self) -> Array:
        return rounded(flat(self.k * self.after), self.precision)


def chunk_of(q: Array, k: Array, g: Array, *, scale: float, precision: str, erases: bool, transposed: bool) -> Chunk:
    """From q, k, g [c, k]."""
    q, k = tiled(q) * scale, tiled(k)
    rows = [q, k] if erases else [q]
    found = scores(rows, k, tiled(g), precision, transposed=[transposed, False])
    attention = with_diagonal(found.matrices[0], jnp.sum(flat(q * k), axis=1, keepdims=True))
    decays = found.decays
    return Chunk(
        q=q,
        k=k,
        attention=rounded(attention, precision),
        erase=found.matrices[1] if erases else jnp.zeros_like(attention),
        before=decays.before,
        after=decays.after,
        whole=decays.whole,
        rows=rows,
        levels=found.levels,
        precision=precision,
    )


def columns(rows: Array, number: int) -> list[Array]:
    """The first rows of [a multiple of 8, c], each as [c, 1]."""
    missing = LANES - rows.shape[0]
    turned = jnp.concatenate([rows, jnp.zeros((missing, rows.shape[1]), rows.dtype)]).T
    return [turned[:, i : i + 1] for i in range(number)]


def forward_kernel(
    q: Any, k: Any, v: Any, beta: Any, g: Any, s0: Any, o: Any, s_last: Any, states: Any, s: Any,
    *, together: int, scale: float, precision: str,
) -> None:  # fmt: skip
    number, r = v.shape[0], v.shape[0] // q.shape[0]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for i in range(number):
            s[i] = s0[i].T

    if states is not None:
        states[...] = s[...].astype(states.dtype)
    gates = None if beta is None else columns(beta[...], number)
    fine = at_least_high(precision)
    make = partial(chunk_of, scale=scale, precision=precision, erases=beta is not None, transposed=False)
    for first in range(0, number, together):
        heads = range(first, first + together)
        x = {i: make(q[i // r], k[i // r], g[i]) for i in heads}
        old = {i: rounded(s[i], precision) for i in heads}
        if gates is None:
            carried = {i: dot(x[i].q_before, old[i], precision, "nt") for i in heads}
            u = {i: v[i] for i in heads}
        else:
            solve = solved(x, gates, precision)
            carried = {i: dot(x[i].q_before, old[i], precision, "nt") for i in heads}
            rest = {i: v[i].astype(jnp.float32) - dot(x[i].k_before, old[i], precision, "nt") for i in heads}
            u = {i: dot(solve[i], gates[i] * rest[i], fine) for i in heads}
        local = {i: dot(x[i].attention, u[i], precision) for i in heads}
        for i in heads:
            o[i] = (carried[i] + local[i]).astype(o.dtype)
        added = {i: dot(u[i], x[i].k_after, fine, "tn") for i in heads}
        for i in heads:
            s[i] = x[i].whole * s[i] + added[i]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        for i in range(number):
            s_last[i] = s[i].T


def at_least_high(precision: str) -> str:
    """For T and what it gives: where keys are alike its rows alternate in sign, and sums over tokens cancel.

    With one pass, 256 identical keys with beta 2 and no decay leave no correct digit; with three, two.
    """
    return "high" if precision == "default" else precision


def solved(chunks: dict[int, Chunk], gates: Sequence[Array], precision: str) -> dict[int, Array]:
    """T = (I + beta k k^T with decays, below the diagonal)^-1 of each head."""
    return dict(zip(chunks, inverse([gates[i] * x.erase for i, x in chunks.items()], precision), strict=True))


def adjoint_kernel(
    q: Any, k: Any, v: Any, beta: Any, g: Any, states: Any, do: Any, ds_last: Any,
    dq: Any, dk: Any, dv: Any, dbeta: Any, dg: Any, ds0: Any, ds: Any,
    *, together: int, scale: float, precision: str,
) -> None:  # fmt: skip
    """`ds` is the cotangent of the state after the chunk, [heads, v, k]."""
    number, r = v.shape[0], v.shape[0] // q.shape[0]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for i in range(number):
            ds[i] = ds_last[i].T

    gates = None if beta is None else columns(beta[...], number)
    fine = at_least_high(precision)
    make = partial(chunk_of, scale=scale, precision=precision, erases=beta is not None, transposed=True)
    d_gates, d_q, d_k = [], {}, {}
    for first in range(0, number, together):
        heads = range(first, first + together)
        x = {i: make(q[i // r], k[i // r], g[i]) for i in heads}
        s = {i: rounded(states[i], precision) for i in heads}
        d_s = {i: rounded(ds[i], precision) for i in heads}
        d_o = {i: do[i] for i in heads}
        solve, rest = {}, {}
        if gates is None:
            u = {i: v[i] for i in heads}
        else:
            solve = solved(x, gates, precision)
            rest = {i: v[i].astype(jnp.float32) - dot(x[i].k_before, s[i], precision, "nt") for i in heads}
            u = {i: dot(solve[i], gates[i] * rest[i], fine) for i in heads}
        d_u = {i: dot(x[i].attention, d_o[i], precision) for i in heads}
        d_u = {i: d_u[i] + dot(x[i].k_after, d_s[i], precision, "nt") for i in heads}
        d_before = {i: [x[i].before * tiled(dot(d_o[i], s[i], precision))] for i in heads}
        d_scores = {i: [both_ways(d_o[i], u[i], precision)] for i in heads}
        d_s_before = {i: dot(d_o[i], x[i].q_before, precision, "tn") for i in heads}
        if gates is None:
            d_v = d_u
        else:
            d_rest = {i: dot(solve[i], d_u[i], fine, "tn") for i in heads}
            residual = {i: rest[i] - dot(x[i].erase, u[i], fine) for i in heads}
            d_gates += [jnp.sum(d_rest[i] * residual[i], axis=1, keepdims=True) for i in heads]
            d_v = {i: gates[i] * d_rest[i] for i in heads}
            erased = {i: rounded(-d_v[i], precision) for i in heads}
            for i in heads:
                d_before[i].append(x[i].before * tiled(dot(erased[i], s[i], precision)))
                d_scores[i].append(both_ways(erased[i], u[i], precision))
                d_s_before[i] = d_s_before[i] + dot(erased[i], x[i].k_before, precision, "tn")
        for i in heads:
            dv[i] = d_v[i].astype(dv.dtype)
            d_after = x[i].after * tiled(dot(u[i], d_s[i], precision))
            d_whole = x[i].whole * jnp.sum(states[i].astype(jnp.float32) * ds[i], axis=0, keepdims=True)
            ds[i] = x[i].whole * ds[i] + d_s_before[i]
            d_rows, d_column, d_g = scores_adjoint(
                d_scores[i], x[i].rows, x[i].k, x[i].levels, d_before[i], d_after, precision
            )
            dg[i] = flat(d_g) + d_whole
            diagonal = jnp.sum(d_o[i].astype(jnp.float32) * u[i].astype(jnp.float32), axis=1, keepdims=True)
            diagonal = diagonal.reshape(*d_column.shape[:2], 1)
            add(d_q, i // r, scale * (d_rows[0] + diagonal * x[i].k))
            add(d_k, i // r, sum(d_rows[1:], d_column + diagonal * x[i].q))
            if i % r == r - 1:
                dq[i // r] = flat(d_q[i // r]).astype(dq.dtype)
                dk[i // r] = flat(d_k[i // r]).astype(dk.dtype)
    if gates is not None:
        unused = [jnp.zeros_like(d_gates[0])] * (LANES - number)
        dbeta[...] = jnp.concatenate([*d_gates, *unused], axis=1).T[: dbeta.shape[0]]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        for i in range(number):
            ds0[i] = ds[i].T


def both_ways(a: Array, b: Array, precision: str) -> Array:
    """a b^T below the diagonal and its transpose above it."""
    product = dot(a, b, precision, "nt")
    return jnp.where(lower(product.shape[0]), product, dot(b, a, precision, "nt"))


def add(sums: dict[int, Array], key: int, x: Array) -> None:
    sums[key] = sums[key] + x if key in sums else x
