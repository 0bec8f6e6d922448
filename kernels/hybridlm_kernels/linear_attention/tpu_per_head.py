"""Linear attention with one decay per head as a Pallas kernel for TPU: forward, and what the adjoint shares with it.

S_t = exp(g_t) S_{t-1}; with beta also S_t -= beta_t k_t (S_t^T k_t)^T; S_t += [beta_t] k_t v_t^T;
o_t = scale S_t^T q_t, in chunks (Yang et al. 2024, arXiv:2412.06464, section 3.3): a grid step takes a chunk of several
heads, and the states stay in VMEM from chunk to chunk. What a token writes is kept as beta_j x_j: beta then multiplies
columns of matrices [c, c], which is cheaper on a TPU than rows.
Letters: b batch, t time, h query-key heads, r value heads per query-key head, k key dim, v value dim, n chunks,
c chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridlm_kernels.jax_compat import out_struct
from hybridlm_kernels.linear_attention import tpu_blocks
from hybridlm_kernels.linear_attention.tpu_blocks import LANES, SUBLANES, dot, lower
from hybridlm_kernels.target import target_of

NOTHING_LEFT = -104.0  # exp of it is 0 in float32; sums over a chunk of what is not below it keep their digits
MOST_HEADS = 16  # value heads of a step: more of them hide more of the latency, and take VMEM
SMALL_VMEM = ("v2", "v3", "v4")  # have 16 MiB in all, others 64 or more
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")  # share the parallel part of a grid


@dataclass(frozen=True)
class Layout:
    """Which part of the operands a grid step takes: `heads` query-key heads, r times as many value heads, one chunk."""

    b: int
    h: int
    r: int
    t: int
    c: int
    heads: int
    backward: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.b, self.h // self.heads, self.t // self.c

    @property
    def gate_rows(self) -> int:
        """The value heads of a step, in whole tiles."""
        return pl.cdiv(self.heads * self.r, SUBLANES) * SUBLANES

    def _time(self, k: Array) -> Array:
        return self.t // self.c - 1 - k if self.backward else k

    def tokens(self, heads: int, dim: int) -> pl.BlockSpec:
        """Blocks of [b, heads, t, dim]; `heads` is h or h r."""
        each = heads // self.grid[1]
        return pl.BlockSpec((None, each, self.c, dim), lambda i, j, k: (i, j, self._time(k), 0))

    def state(self, k: int, v: int) -> pl.BlockSpec:
        """Blocks of [b, h r, k, v], the same for all of time."""
        block = (None, self.heads * self.r, k, v)
        return pl.BlockSpec(block, lambda i, j, k: (i, j, 0, 0), pipeline_mode=pl.Buffered(1))

    def states(self, k: int, v: int) -> pl.BlockSpec:
        """Blocks of [b, h r, n, k, v]."""
        return pl.BlockSpec((None, self.heads * self.r, None, k, v), lambda i, j, k: (i, j, self._time(k), 0, 0))

    def gates(self) -> pl.BlockSpec:
        """Blocks of `lay_out`'s result."""
        return pl.BlockSpec((None, None, None, self.gate_rows, self.c), lambda i, j, k: (i, j, self._time(k), 0, 0))

    def lay_out(self, gate: Array) -> Array:
        """Gates [b, h r, t] as [b, h / heads, n, rows, c]: a step's are the first rows of a matrix."""
        _, steps, n = self.grid
        gate = gate.reshape(self.b, steps, self.heads * self.r, n, self.c).swapaxes(2, 3)
        return jnp.pad(gate, ((0, 0),) * 3 + ((0, self.gate_rows - self.heads * self.r), (0, 0)))

    def gates_like(self, *like: Array) -> jax.ShapeDtypeStruct:
        return out_struct((*self.grid, self.gate_rows, self.c), jnp.float32, *like)

    def restore(self, gate: Array) -> Array:
        """The inverse of `lay_out`."""
        gate = gate[:, :, :, : self.heads * self.r].swapaxes(2, 3)
        return gate.reshape(self.b, self.h * self.r, self.t)


@dataclass(frozen=True)
class Gates:
    """Of a chunk, one entry per value head; all but beta are exp of a sum of g over tokens."""

    between: list[Array]
    """[c, c]: over the tokens after j up to i; 0 where i < j."""
    before: list[Array]
    """[c, 128], the same in all lanes: from the start of the chunk up to i."""
    after: list[Array]
    """[1, c]: after j to the end of the chunk."""
    whole: list[Array]
    """[1, 1]."""
    beta: list[Array]
    """[1, c]; empty without an erase term."""


def gates(number: int, g: Array, beta: Array | None, precision: str) -> Gates:
    """From the rows g and beta [at least `number`, c]."""
    c = g.shape[1]
    g = jnp.maximum(g, NOTHING_LEFT)
    until = lower(c).astype(jnp.bfloat16)
    # A difference of sums keeps their absolute error. Integers sum exactly, and fractions stay small. Unsplit it is
    # 5e-4 behind a hundred documents that were forgotten: less than what bfloat16 rounds off.
    parts = [g] if precision == "default" else [jnp.round(g), g - jnp.round(g)]
    sums = [dot(part, until, "highest", "nt") for part in parts]  # over l <= i
    after = jnp.exp(dot(g, lower(c, strict=True).astype(jnp.bfloat16), "highest"))  # over l > j
    columns = transpose(sums)
    between, before = [], []
    for head in range(number):
        each = [over_lanes(columns, i * g.shape[0] + head) for i in range(len(sums))]
        differences = [lanes(x, c) - part[head : head + 1] for x, part in zip(each, sums, strict=True)]
        between.append(jnp.exp(jnp.where(lower(c), sum(differences[1:], differences[0]), -jnp.inf)))
        before.append(jnp.exp(sum(each[1:], each[0])))
    heads = range(number)
    return Gates(
        between=between,
        before=before,
        after=[after[head : head + 1] for head in heads],
        whole=[before[head][c - 1 :, :1] for head in heads],
        beta=[] if beta is None else [beta[head : head + 1] for head in heads],
    )


def transpose(rows: Sequence[Array]) -> Array:
    """[c, 128] or a multiple, whose first columns are these rows [.., c]."""
    missing = -sum(x.shape[0] for x in rows) % LANES
    padding = [jnp.zeros((missing, rows[0].shape[1]), rows[0].dtype)] if missing else []
    return jnp.concatenate([*rows, *padding]).T


def over_lanes(columns: Array, at: int) -> Array:
    """One column in all of 128 lanes."""
    return jnp.broadcast_to(columns[:, at : at + 1], (columns.shape[0], LANES))


def lanes(x: Array, dim: int) -> Array:
    """What is the same in 128 lanes, in `dim` lanes."""
    return x[:, :dim] if dim <= LANES else jnp.concatenate([x] * (dim // LANES), axis=1)


def erasures(k_k: Sequence[Array], gate: Gates) -> list[Array]:
    """A per value head: (I + A) x = v - exp(sum of g up to i) k S, for the state S at the start of the chunk."""
    r = len(gate.between) // len(k_k)
    return [k_k[j // r] * (between * gate.beta[j]) for j, between in enumerate(gate.between)]


def weights(gate: Gates, scale: float) -> list[Array]:
    """What multiplies q k^T, per value head."""
    if not gate.beta:
        return [scale * between for between in gate.between]
    return [between * (scale * beta) for between, beta in zip(gate.between, gate.beta, strict=True)]


def writes(gate: Gates) -> list[Array]:
    """What multiplies k_j in the state after the chunk, [1, c] per value head."""
    return [after * beta for after, beta in zip(gate.after, gate.beta, strict=True)] if gate.beta else gate.after


@partial(jax.jit, static_argnames=("scale", "chunk", "precision", "save", "interpret"))
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
    """o, the last states, and the states at the start of every chunk [b, h r, n, k, v] where `save`.

    The saved states are bfloat16 where products round them to it anyway.
    """
    b, h, t, key = q.shape
    hv, value = v.shape[1], v.shape[3]
    saved = jnp.bfloat16 if precision == "default" else jnp.float32
    each = vmem_per_head(hv // h, chunk, [q, q], [v, v], saved, matrices=4)
    heads = heads_per_step(q, v, each)
    layout = Layout(b, h, hv // h, t, chunk, heads, backward=False)
    like = [x for x in (q, k, v, beta, g, s0) if x is not None]
    n = t // chunk
    return pl.pallas_call(
        partial(_forward_kernel, r=hv // h, scale=scale, precision=precision),
        grid=layout.grid,
        in_specs=[
            layout.tokens(h, key),
            layout.tokens(h, key),
            layout.tokens(hv, value),
            None if beta is None else layout.gates(),
            layout.gates(),
            layout.state(key, value),
        ],
        out_specs=[
            layout.tokens(hv, value),
            layout.state(key, value),
            layout.states(key, value) if save else None,
        ],
        out_shape=[
            out_struct(v.shape, v.dtype, *like),
            out_struct(s0.shape, jnp.float32, *like),
            out_struct((b, hv, n, key, value), saved, *like) if save else None,
        ],
        scratch_shapes=[pltpu.VMEM((heads * hv // h, key, value), jnp.float32)],
        compiler_params=tpu_blocks.params(heads * each),
        interpret=interpret,
        name="gated_linear_attention" if beta is None else "gated_delta_rule",
    )(q, k, v, None if beta is None else layout.lay_out(beta), layout.lay_out(g), s0)


def heads_per_step(q: Any, v: Any, each: int) -> int:
    """Query-key heads of a grid step of which each takes so many bytes of VMEM."""
    (b, h), kind = q.shape[:2], target_of([q]).kind
    budget = tpu_blocks.VMEM_BUDGET * (1 if any(name in kind for name in SMALL_VMEM) else 3)
    most = max(1, MOST_HEADS * h // v.shape[1])
    heads = tpu_blocks.heads_per_step(h, each, most, budget)
    if kind in TWO_CORES and b * h // heads % 2:
        return tpu_blocks.heads_per_step(h, each, max(1, heads // 2), budget)
    return heads


def vmem_per_head(r: int, c: int, keys: Sequence[Array], values: Sequence[Array], saved: Any, *, matrices: int) -> int:
    """Bytes that a query-key head takes in a step, from the arrays [.., t, k] and [.., t, v] that pass through.

    `matrices` is how many float32 results of a value head the compiler keeps at a time, as it reports for K = V = 128.
    """
    key, value = keys[0].shape[-1], values[0].shape[-1]
    state = tpu_blocks.vmem_bytes((key, value), jnp.float32)
    tokens = [tpu_blocks.vmem_bytes((c, x.shape[-1]), x.dtype) for x in keys]
    tokens += [r * tpu_blocks.vmem_bytes((c, x.shape[-1]), x.dtype) for x in values]
    blocks = 2 * (sum(tokens) + r * tpu_blocks.vmem_bytes((key, value), saved))
    results = matrices * tpu_blocks.vmem_bytes((c, max(c, key, value)), jnp.float32)
    return blocks + r * (3 * state + results)


def _forward_kernel(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    g: Any,
    s0: Any,
    o: Any,
    s_last: Any,
    states: Any,
    s: Any,
    *,
    r: int,
    scale: float,
    precision: str,
) -> None:
    values = range(v.shape[0])

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        s[...] = s0[...]

    if states is not None:
        states[...] = s[...].astype(states.dtype)
    gate = gates(len(values), g[...], None if beta is None else beta[...], precision)
    heads = range(k.shape[0])
    if beta is None:
        new = [v[j] for j in values]
    else:
        k_k = [dot(k[i], k[i], precision, "nt") for i in heads]
        solvers = tpu_blocks.solvers(erasures(k_k, gate), precision)
        held = [dot(k[j // r], s[j], precision) for j in values]
        rest = [v[j].astype(jnp.float32) - lanes(gate.before[j], held[j].shape[1]) * held[j] for j in values]
        new = tpu_blocks.solve(solvers, rest, precision)
    q_k = [dot(q[i], k[i], precision, "nt") for i in heads]
    local = [dot(q_k[j // r] * weight, new[j], precision) for j, weight in enumerate(weights(gate, scale))]
    carried = [dot(q[j // r], s[j], precision) for j in values]
    for j in values:
        o[j] = (local[j] + scale * lanes(gate.before[j], o.shape[2]) * carried[j]).astype(o.dtype)
    transposed = [k[i].T.astype(jnp.float32) for i in heads]
    added = [dot(transposed[j // r] * write, new[j], precision) for j, write in enumerate(writes(gate))]
    for j in values:
        s[j] = gate.whole[j] * s[j] + added[j]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        s_last[...] = s[...]
