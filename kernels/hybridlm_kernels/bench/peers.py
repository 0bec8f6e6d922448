"""Other people's ways to compute what ours do, to time beside them.

Letters: b batch, t time, d channels, w taps, h heads, n chunks, c chunk, k key dim, v value dim. Of
`grouped_matmul`: m rows, k inputs, n outputs, g groups. Of `memory_lookup`: t tokens, k rows per token, n rows, v row
width.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hybridlm_kernels.target import target_of

RG_LRU_SCALE = 8.0  # c of De et al. 2024 (arXiv:2402.19427), section 2.4

PLATFORMS = {"deltanet_tpu": "tpu", "megablox": "tpu"}
"""Of the peers that run on one alone."""


def missing(peer: str) -> str | None:
    """What to install before `peer` can run; None where it can."""
    if peer == "recurrentgemma" and importlib.util.find_spec("recurrentgemma") is None:
        return "pip install --no-deps recurrentgemma==1.0.1 'typeguard<3' einops"
    if peer == "deltanet_tpu" and importlib.util.find_spec("deltanet_tpu") is None:
        return "pip install --no-deps deltanet-tpu==0.3.0, on Python 3.12 or newer"
    return None


def associative_scan(a: Array, x: Array) -> Array:
    """h_t = a_t h_{t-1} + x_t by `jax.lax.associative_scan`, under automatic differentiation. [b, t, d]"""

    def compose(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    wide = a.astype(jnp.float32), x.astype(jnp.float32)
    return jax.lax.associative_scan(compose, wide, axis=1)[1].astype(x.dtype)


def recurrentgemma_scan(a: Array, x: Array) -> Array:
    """h_t = a_t h_{t-1} + x_t by google-deepmind/recurrentgemma: its Pallas kernel on TPU, else its plain loop."""
    scan = importlib.import_module("recurrentgemma.jax.scan")
    kinds = importlib.import_module("recurrentgemma.common").ScanType
    kind = kinds.LINEAR_PALLAS if target_of((a, x)).platform == "tpu" else kinds.LINEAR_NATIVE
    return scan.linear_scan(x=x, a=a, scan_type=kind)[0]


def unfused_rg_lru(
    scan: Callable[[Array, Array], Array], x: Array, gate_a: Array, gate_x: Array, decay: Array
) -> Array:
    """RG-LRU of one document with the gates' maths in float32, left to the compiler, around a scan.

    x and the gates [b, t, d], decay [d]; the root is 1 at the first token.
    """
    wide = x.astype(jnp.float32), gate_a.astype(jnp.float32), gate_x.astype(jnp.float32)
    log_a = -RG_LRU_SCALE * jax.nn.softplus(decay) * jax.nn.sigmoid(wide[1])
    first = (jnp.arange(x.shape[1]) == 0)[:, None]  # t 1
    gain = jnp.where(first, 1.0, jnp.sqrt(-jnp.expm1(2 * log_a)))
    return scan(jnp.exp(log_a), gain * jax.nn.sigmoid(wide[2]) * wide[0]).astype(x.dtype)


def lax_conv(x: Array, w: Array, bias: Array) -> Array:
    """silu of a causal depthwise convolution by `jax.lax.conv_general_dilated`. x [b, t, d], w [w, d]"""
    taps, d = w.shape
    y = jax.lax.conv_general_dilated(
        x.astype(jnp.float32),
        w[:, None],  # w 1 d
        window_strides=(1,),
        padding=[(taps - 1, 0)],
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=d,
    )
    return jax.nn.silu(y + bias).astype(x.dtype)


def deltanet_tpu_gdn(q: Array, k: Array, v: Array, beta: Array, log_decay: Array) -> Array:
    """The gated delta rule, one decay per head, by the package deltanet-tpu. q, k [b, t, h, k], v [b, t, h, v]"""
    return _deltanet_tpu(q).chunk_gdn(q, k, v, log_decay, beta)


def deltanet_tpu_kda(q: Array, k: Array, v: Array, beta: Array, log_decay: Array) -> Array:
    """The gated delta rule, one decay per channel [b, t, h, k], by the package deltanet-tpu."""
    return _deltanet_tpu(q).chunk_kda(q, k, v, log_decay, beta)


def deltanet_tpu_gla(q: Array, k: Array, v: Array, log_decay: Array) -> Array:
    """Gated linear attention, one decay per channel [b, t, h, k], by the package deltanet-tpu."""
    return _deltanet_tpu(q).chunk_gla(q, k, v, log_decay)


def _deltanet_tpu(q: Array) -> Any:
    if target_of((q,)).platform == "tpu" and jax.default_backend() != "tpu":
        # It interprets its kernels unless this process has a TPU, also where it is compiled for one that is absent.
        jax.default_backend = lambda: "tpu"
    return importlib.import_module("deltanet_tpu")


def solve_triangular_delta_rule(q: Array, k: Array, v: Array, beta: Array, log_decay: Array) -> Array:
    """The gated delta rule as it is mostly written in plain JAX: all chunks of 64 at once, XLA's triangular solve, a
    scan over states, differences of cumulative sums for decays. q, k [b, t, h, k], v [b, t, h, v], beta [b, t, h]"""
    t, chunk, scale = q.shape[1], 64, q.shape[-1] ** -0.5
    padding = -t % chunk

    def split(x: Array) -> Array:
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 3, 2)  # b n h c ...

    qs, ks, vs, betas, g = (split(x) for x in (q, k, v, beta, log_decay))
    total = jnp.cumsum(g, axis=-1)
    lower = jnp.tril(jnp.ones((chunk, chunk), bool))
    gamma = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf))
    erased = jnp.tril(betas[..., None] * (ks @ jnp.swapaxes(ks, -1, -2)) * gamma, -1)
    sides = jnp.concatenate([vs, ks * jnp.exp(total)[..., None]], axis=-1) * betas[..., None]
    solved = jax.scipy.linalg.solve_triangular(jnp.eye(chunk) + erased, sides, lower=True, unit_diagonal=True)
    scores = (qs @ jnp.swapaxes(ks, -1, -2)) * gamma

    def one_chunk(state: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, scores, solved, total = xs
        u = solved[..., : v.shape[-1]] - solved[..., v.shape[-1] :] @ state
        o = (q * jnp.exp(total)[..., None]) @ state + scores @ u
        left = jnp.exp(total[..., -1:] - total)[..., None]
        return jnp.exp(total[..., -1])[..., None, None] * state + jnp.swapaxes(k * left, -1, -2) @ u, o

    state = jnp.zeros((q.shape[0], q.shape[2], q.shape[-1], v.shape[-1]))
    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (qs, ks, scores, solved, total))
    o = jax.lax.scan(one_chunk, state, xs)[1]  # n b h c v
    o = jnp.moveaxis(o, (0, 3), (1, 2)).reshape(q.shape[0], -1, *v.shape[2:])
    return (scale * o[:, :t]).astype(v.dtype)


def megablox(x: Array, w: Array, group_sizes: Array) -> Array:
    """grouped_matmul by JAX's own Pallas kernels for TPU, in tiles of 512 x 1,024 x 1,024 as MaxText sets them."""
    gmm = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox").gmm
    tiling = tuple(min(most, size) for most, size in zip((512, 1024, 1024), (*x.shape, w.shape[2]), strict=True))
    return gmm(x, w, group_sizes, x.dtype, tiling)


def ragged_dot(x: Array, w: Array, group_sizes: Array) -> Array:
    """grouped_matmul by `jax.lax.ragged_dot`. x [m, k], w [g, k, n]"""
    dtype = jnp.result_type(x.dtype, jnp.float32)
    precision = "highest" if x.dtype == dtype else None
    return jax.lax.ragged_dot(x, w, group_sizes, precision, dtype).astype(x.dtype)


def dense_matmul(x: Array, w: Array) -> Array:
    """All rows times the first matrix: as many operations as a grouped product has, and another result."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.matmul(x, w[0], precision=precision)


def take(table: Array, indices: Array, weights: Array) -> Array:
    """memory_lookup as it is mostly written: all rows of all tokens, then their weighted sum."""
    rows = table[indices].reshape(*indices.shape, -1)  # t k v
    wide = jnp.result_type(weights.dtype, jnp.float32)
    return jnp.einsum("tk,tkv->tv", weights, rows, preferred_element_type=wide).astype(weights.dtype)


def neighbours(table: Array, weights: Array) -> Array:
    """The weighted sums of rows that lie one after the other: a lookup that only streams."""
    t, k = weights.shape
    rows = table[: t * k].reshape(t, k, -1).astype(jnp.float32)
    return jnp.sum(rows * weights.astype(jnp.float32)[..., None], axis=1).astype(weights.dtype)
