"""Linear attention with a decay per key channel as Pallas kernels for TPU: forward and adjoint.

S_t = Diag(exp g_t) S_{t-1}; with beta also S_t -= beta_t k_t (S_t^T k_t)^T; S_t += [beta_t] k_t v_t^T;
o_t = scale S_t^T q_t, in chunks, as in gated linear attention (Yang et al. 2023, arXiv:2312.06635) and Kimi delta
attention (Kimi Team 2025, arXiv:2510.26692) but for the scores, which take any decay (tpu_channel_scores.py). A grid
step takes a chunk of several heads (tpu_channel_kernels.py), and the states stay in VMEM from chunk to chunk.
Letters: b batch, t time, h query-key heads, r value heads per query-key head, k key dim, v value dim, n chunks,
c chunk.
"""

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
from hybridlm_kernels.linear_attention.tpu_blocks import vmem_bytes
from hybridlm_kernels.linear_attention.tpu_channel_kernels import adjoint_kernel, forward_kernel
from hybridlm_kernels.linear_attention.tpu_per_head import Layout
from hybridlm_kernels.target import target_of

MOST_HEADS, MOST_HEADS_BACKWARD = 16, 8  # value heads of a step; more of them do not take less time each
SMALL_VMEM = ("v2", "v3", "v4")  # have 16 MiB in all, others 64 or more
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")  # share the parallel part of the grid: batch and heads


@dataclass(frozen=True)
class Plan:
    """A grid step's part of the operands, and what it takes."""

    layout: Layout
    together: int
    """Value heads that go through each step of the maths together. The inverse is a long chain of small products, which
    overlaps only with those of other heads; without it, one head at a time keeps most of its values in registers."""
    vmem: int


def plan(q: Array, v: Array, beta: Array | None, chunk: int, precision: str, *, backward: bool) -> Plan:
    b, h, t, key = q.shape
    hv, value = v.shape[1], v.shape[3]
    r = hv // h
    keys, values = vmem_bytes((chunk, key), q.dtype), vmem_bytes((chunk, value), v.dtype)
    gates, states = vmem_bytes((chunk, key), jnp.float32), vmem_bytes((value, key), saved_dtype(precision))
    tokens = 4 * keys + r * (3 * values + 2 * gates) if backward else 2 * keys + r * (2 * values + gates)
    # Matrices that the compiler keeps of each head: measured at dims of 128, and of two pieces or three twice as many.
    kept = (2 if beta is None else 22) if backward else (1 if beta is None else 10)
    kept *= 1 if precision == "default" else 2
    matrix = vmem_bytes((chunk, max(chunk, key, value)), jnp.float32)
    each = 2 * (tokens + r * states) + r * (3 * vmem_bytes((value, key), jnp.float32) + kept * matrix)
    kind = target_of([q]).kind
    small = any(name in kind for name in SMALL_VMEM)
    shared = 16 * matrix
    budget = tpu_blocks.VMEM_BUDGET if small else 2 * tpu_blocks.VMEM_BUDGET
    most = max(1, (MOST_HEADS_BACKWARD if backward else MOST_HEADS) // r)
    if kind in TWO_CORES and b % 2:
        most = min(most, max(1, h // 2))
    heads = tpu_blocks.heads_per_step(h, each, most, budget - shared)
    together = 1 if beta is None else heads * r
    return Plan(Layout(b, h, r, t, chunk, heads, backward), together, heads * each + shared)


def saved_dtype(precision: str) -> Any:
    """Of the states between chunks: bfloat16 where products round them to it anyway."""
    return jnp.bfloat16 if precision == "default" else jnp.float32


@partial(jax.jit, static_argnames=("scale", "chunk", "precision", "save", "interpret"))
def forward(
    q: Array, k: Array, v: Array, beta: Array | None, g: Array, s0: Array,
    *, scale: float, chunk: int, precision: str, save: bool, interpret: Any = False,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """o, the last states, and the states at the start of every chunk [b, h r, n, v, k] where `save`."""
    found = plan(q, v, beta, chunk, precision, backward=False)
    layout, h, hv, key, value = found.layout, q.shape[1], v.shape[1], q.shape[3], v.shape[3]
    like = [x for x in (q, k, v, beta, g, s0) if x is not None]
    keys, values, state = layout.tokens(h, key), layout.tokens(hv, value), layout.state(key, value)
    return pl.pallas_call(
        partial(forward_kernel, together=found.together, scale=scale, precision=precision),
        grid=layout.grid,
        in_specs=[keys, keys, values, None if beta is None else layout.gates(), layout.tokens(hv, key), state],
        out_specs=[values, state, layout.states(value, key) if save else None],
        out_shape=[
            out_struct(v.shape, v.dtype, *like),
            out_struct(s0.shape, jnp.float32, *like),
            out_struct((q.shape[0], hv, q.shape[2] // chunk, value, key), saved_dtype(precision), *like)
            if save
            else None,
        ],
        scratch_shapes=[pltpu.VMEM((layout.heads * layout.r, value, key), jnp.float32)],
        compiler_params=tpu_blocks.params(found.vmem),
        interpret=interpret,
        name="gated_linear_attention_channels" if beta is None else "gated_delta_rule_channels",
    )(q, k, v, None if beta is None else layout.lay_out(beta), g, s0)


@partial(jax.jit, static_argnames=("scale", "chunk", "precision", "interpret"))
def adjoint(
    q: Array, k: Array, v: Array, beta: Array | None, g: Array, states: Array, do: Array, ds_last: Array,
    *, scale: float, chunk: int, precision: str, interpret: Any = False,
) -> tuple[Array, Array, Array, Array | None, Array, Array]:  # fmt: skip
    """Cotangents of q, k, v, beta (None without it), g and s0; `states` as `forward` saved them."""
    found = plan(q, v, beta, chunk, precision, backward=True)
    layout, h, hv, key, value = found.layout, q.shape[1], v.shape[1], q.shape[3], v.shape[3]
    like = [x for x in (q, k, v, beta, g, states, do, ds_last) if x is not None]
    keys, values, channels = layout.tokens(h, key), layout.tokens(hv, value), layout.tokens(hv, key)
    gates, state = None if beta is None else layout.gates(), layout.state(key, value)
    dq, dk, dv, dbeta, dg, ds0 = pl.pallas_call(
        partial(adjoint_kernel, together=found.together, scale=scale, precision=precision),
        grid=layout.grid,
        in_specs=[keys, keys, values, gates, channels, layout.states(value, key), values, state],
        out_specs=[keys, keys, values, gates, channels, state],
        out_shape=[
            out_struct(q.shape, q.dtype, *like),
            out_struct(k.shape, k.dtype, *like),
            out_struct(v.shape, v.dtype, *like),
            None if beta is None else layout.gates_like(*like),
            out_struct(g.shape, jnp.float32, *like),
            out_struct(ds_last.shape, jnp.float32, *like),
        ],
        scratch_shapes=[pltpu.VMEM((layout.heads * layout.r, value, key), jnp.float32)],
        compiler_params=tpu_blocks.params(found.vmem),
        interpret=interpret,
        name=f"{'gated_linear_attention' if beta is None else 'gated_delta_rule'}_channels_adjoint",
    )(q, k, v, None if beta is None else layout.lay_out(beta), g, states, do.astype(v.dtype), ds_last)
    return dq, dk, dv, None if dbeta is None else layout.restore(dbeta), dg, ds0
