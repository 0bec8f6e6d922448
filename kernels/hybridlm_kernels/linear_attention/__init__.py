"""Gated linear attention and the gated delta rule: a matrix for a state, written by keys and values, read by queries.

S_t = Diag(exp g_t) S_{t-1} + k_t u_t^T, o_t = scale S_t^T q_t, where u_t = v_t (gated linear attention: Yang et al.
2023, arXiv:2312.06635; with one decay per head Mamba-2's state space duality, Dao and Gu 2024, arXiv:2405.21060), or
u_t = beta_t (v_t - S^T k_t) with the decayed S (gated delta rule: Yang et al. 2024, arXiv:2412.06464; with one decay
per channel Kimi delta attention, arXiv:2510.26692).

Letters: b batch, t time, h query-key heads, Hv value heads, k key dim, v value dim.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from hybridlm_kernels.debug import check_range
from hybridlm_kernels.dispatch import (
    PLATFORMS,
    Tier,
    UnsupportedKernel,
    check_operand,
    check_sequence,
    choose,
    tier_module,
)
from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.linear_attention import chunked, reference
from hybridlm_kernels.segments import check_segment_ids, starts
from hybridlm_kernels.shards import Axis, align_whole, id_before, local, pass_on

RESET = -(2.0**17)
"""The log decay that stands for forgetting everything; exact in bfloat16."""
PRECISIONS = ("default", "high", "highest")


def gated_linear_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t Hv v"],
    log_decay: Float[Array, "b t Hv *k"],
    *,
    scale: float | None = None,
    s0: Float[Array, "b Hv k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    positions: Int[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    precision: str | None = None,
    impl: str = "auto",
    sequence_axis: Axis | None = None,
) -> tuple[Float[Array, "b t Hv v"], Float[Array, "b Hv k v"]]:
    """S_t = Diag(exp log_decay_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; returns o and the last state.

    `log_decay` is at most 0, one number per head [b, t, Hv] (the faster form) or one per channel of the key
    [b, t, Hv, k]; any finite one is exact. Value head j reads with the query and writes with the key of head
    j // (Hv / h). `scale` is k^-1/2 when None. o has the dtype of `v`; states are float32, or float64 if an operand is.

    `s0` is the state before the first token, zeros when None. `segment_ids` separate packed documents (0 = padding):
    the state is forgotten before a token of another document than the last real token, so only the row's first
    document sees `s0`. With `positions`, counted within the document, it is forgotten where they are 0 instead. Padding
    leaves the state unchanged; o at padding reads it, for the caller to mask. The last state is the state after the
    last real token.

    `chunk_size` (16, 32, 64 or 128) and `precision` of the matmuls, "default" (one bfloat16 pass on TPU), "high"
    (three) or "highest" (float32), are the implementation's and the operands' own when None. Differentiable in every
    floating operand, also through the last state; kept for that are the operands and states between chunks.

    A sequence may be cut over devices: by the sharding of `q` under a mesh of explicit axes, or inside a
    `jax.shard_map` by naming its mesh axis as `sequence_axis`. Devices exchange one state and what it decays by; `s0`
    and the last state are those of the whole sequence, the same on every device.
    """
    return _run(
        "gated_linear_attention",
        q,
        k,
        v,
        None,
        log_decay,
        scale=scale,
        s0=s0,
        segment_ids=segment_ids,
        positions=positions,
        chunk_size=chunk_size,
        precision=precision,
        impl=impl,
        sequence_axis=sequence_axis,
    )


def gated_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t Hv v"],
    beta: Float[Array, "b t Hv"],
    log_decay: Float[Array, "b t Hv *k"] | None = None,
    *,
    scale: float | None = None,
    s0: Float[Array, "b Hv k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    positions: Int[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    precision: str | None = None,
    impl: str = "auto",
    sequence_axis: Axis | None = None,
) -> tuple[Float[Array, "b t Hv v"], Float[Array, "b Hv k v"]]:
    """S = Diag(exp log_decay_t) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, o_t = scale S_t^T q_t; o and last S.

    Keys are expected to have unit norm and `beta` [b, t, Hv] to lie in (0, 2): above 1 the transition has negative
    eigenvalues (Grazzi et al. 2024, arXiv:2411.12537). Without `log_decay` nothing decays (DeltaNet, Yang et al. 2024,
    arXiv:2406.06484). Everything else as in `gated_linear_attention`; a sequence that is cut over devices exchanges two
    matrices per head, the state and what a stretch of time makes of the one before it.
    """
    return _run(
        "gated_delta_rule",
        q,
        k,
        v,
        beta,
        log_decay,
        scale=scale,
        s0=s0,
        segment_ids=segment_ids,
        positions=positions,
        chunk_size=chunk_size,
        precision=precision,
        impl=impl,
        sequence_axis=sequence_axis,
    )


def _check(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    log_decay: Array | None,
    s0: Array | None,
    segment_ids: Array | None,
    positions: Array | None,
) -> None:
    """Raises ValueError that names the operand that does not fit the others."""
    check_sequence("q", q, "[batch, time, heads, key dim]")
    check_operand("q", q, q.shape, "[batch, time, heads, key dim]")
    check_operand("k", k, q.shape, "[batch, time, heads, key dim]")
    b, t, h, key_dim = q.shape
    if v.ndim != 4 or v.shape[2] % h:
        raise ValueError(f"v: shape {v.shape} must be [batch, time, a multiple of q's {h} heads, value dim]")
    heads, value_dim = v.shape[2:]
    check_operand("v", v, (b, t, heads, value_dim), "[batch, time, value heads, value dim]")
    if beta is not None:
        check_operand("beta", beta, (b, t, heads), "[batch, time, value heads]")
        check_range("beta", beta, 0.0, 2.0)
    if log_decay is not None:
        if log_decay.shape not in ((b, t, heads), (b, t, heads, key_dim)):
            raise ValueError(
                f"log_decay: shape {log_decay.shape} must be [batch, time, value heads] = {(b, t, heads)}, with or"
                f" without the key dim {key_dim}"
            )
        check_operand("log_decay", log_decay, log_decay.shape, "")
        check_range("log_decay", log_decay, -float("inf"), 0.0)
    if s0 is not None:
        check_operand("s0", s0, (b, heads, key_dim, value_dim), "[batch, value heads, key dim, value dim]")
    for name, array in (("segment_ids", segment_ids), ("positions", positions)):
        if array is not None:
            check_segment_ids(array, (b, t), name)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is static in a call: `chunk_size` None leaves it to the implementation."""

    scale: float
    chunk: int | None
    precision: str
    axis: Axis | None = None

    def of_tier(self) -> dict[str, Any]:
        return {"scale": self.scale, "chunk": self.chunk, "precision": self.precision}


def _run(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    log_decay: Any,
    *,
    scale: float | None,
    s0: Any,
    segment_ids: Any,
    positions: Any,
    chunk_size: int | None,
    precision: str | None,
    impl: str,
    sequence_axis: Axis | None,
) -> tuple[Array, Array]:
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    optional = (beta, log_decay, s0, segment_ids, positions)
    beta, log_decay, s0, segment_ids, positions = (x if x is None else jnp.asarray(x) for x in optional)
    _check(q, k, v, beta, log_decay, s0, segment_ids, positions)
    if chunk_size is not None and chunk_size not in chunked.CHUNKS:
        raise ValueError(f"chunk_size={chunk_size}: must be one of {', '.join(map(str, chunked.CHUNKS))}")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
    gates = [x for x in (beta, log_decay) if x is not None]
    tier = choose(op, q, k, v, *gates, impl=impl)
    floating = [x.dtype for x in (q, k, v, *gates, s0) if x is not None]
    dtype = jnp.result_type(jnp.float32, *floating)
    if precision is None:
        narrow = all(x.dtype.itemsize == 2 for x in (q, k, v))
        precision = "default" if narrow else "highest"
    options = _Options(q.shape[-1] ** -0.5 if scale is None else float(scale), chunk_size, precision)
    decay_letters = "bthk" if log_decay is not None and log_decay.ndim == 4 else "bth"
    operands = [(q, "bthk"), (k, "bthk"), (v, "bthv"), (beta, "bth"), (log_decay, decay_letters), (s0, "bhkv")]
    ids = [(segment_ids, "bt"), (positions, "bt")]
    run = partial(_on_shard, tier=tier, options=options, dtype=dtype)
    o, s_last = local(run, [*operands, *ids], ["bthv", "bhkv"], sequence_axis, whole="kv")
    return o, s_last


def _on_shard(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    log_decay: Array | None,
    s0: Array | None,
    segment_ids: Array | None,
    positions: Array | None,
    *,
    tier: Tier,
    options: _Options,
    dtype: jnp.dtype,
    sequence_axis: Axis | None,
) -> tuple[Array, Array]:
    b, t, _, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    gates = [x for x in (beta, log_decay) if x is not None]
    tier = _serving(tier.on_shard(q, k, v, *gates), options, q, k, v, *gates, erases=beta is not None)
    chunk = options.chunk
    if chunk is None and tier.impl != "reference":
        chunk = tier_module(tier.op, tier.impl).default_chunk(q, k, v, *gates)
    options = dataclasses.replace(options, chunk=chunk, axis=sequence_axis)
    g = jnp.zeros((b, t, heads), dtype) if log_decay is None else log_decay.astype(dtype)
    beta = None if beta is None else beta.astype(dtype)
    k, beta, g = _fold(k, beta, g, segment_ids, positions, sequence_axis)
    s0 = jnp.zeros((b, heads, key_dim, value_dim), dtype) if s0 is None else s0.astype(dtype)
    q, k, v, beta, g = align_varying(q, k, v, beta, g)
    q, k, v, g = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, g))
    beta = None if beta is None else jnp.swapaxes(beta, 1, 2)
    s0 = align_varying(q, s0)[1] if sequence_axis is None else align_whole(s0, q, sequence_axis)
    if tier.impl == "reference" or (t == 1 and sequence_axis is None):
        if sequence_axis is not None:
            raise UnsupportedKernel(f"impl='reference': {tier.op} does not cut a sequence over devices; use auto")
        directly = reference.one_token if t == 1 else reference.forward
        o, s_last = directly(q, k, v, beta, g, s0, scale=options.scale)
        return jnp.swapaxes(o, 1, 2), s_last
    assert options.chunk is not None
    padding = -t % options.chunk
    padded = (x if x is None else jnp.pad(x, _at_the_end(x, padding)) for x in (q, k, v, beta, g))
    o, s_last = _attend(*padded, s0, tier, options)
    return jnp.swapaxes(o[:, :, :t], 1, 2), s_last


def _serving(tier: Tier, options: _Options, *operands: Array, erases: bool) -> Tier:
    """`tier`, or the chunked form where a kernel does not serve the chunk size or precision asked for.

    Raises UnsupportedKernel where the kernel was asked for by name.
    """
    if tier.impl not in PLATFORMS:
        return tier
    refuses = tier_module(tier.op, tier.impl).refuses
    refusal = refuses(*operands, erases=erases, chunk=options.chunk, precision=options.precision)
    if refusal is None:
        return tier
    if tier.by_name:
        raise UnsupportedKernel(f"impl={tier.impl!r}: {tier.op} {refusal}; use auto")
    return Tier(tier.op, "chunked", by_name=False)


def _at_the_end(x: Array, padding: int) -> list[tuple[int, int]]:
    return [(0, padding if axis == 2 else 0) for axis in range(x.ndim)]


def _fold(
    k: Array, beta: Array | None, g: Array, ids: Array | None, positions: Array | None, axis: Axis | None
) -> tuple[Array, Array | None, Array]:
    """Padding writes, erases and decays nothing; the first token of a document decays everything before it."""

    def where(condition: Array, then: float, x: Array) -> Array:
        return jnp.where(condition.reshape(*condition.shape, *[1] * (x.ndim - 2)), jnp.asarray(then, x.dtype), x)

    if ids is None:
        return k, beta, g if positions is None else where(positions == 0, RESET, g)
    first = positions == 0 if positions is not None else starts(ids, None if axis is None else id_before(ids, axis))
    g = where(first, RESET, g)
    padding = ids == 0
    return where(padding, 0, k), beta if beta is None else where(padding, 0, beta), where(padding, 0, g)


def _forward(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array,
    s0: Array,
    tier: Tier,
    options: _Options,
    save: bool = False,
) -> tuple[Array, Array, Any, Array | None]:
    """o, the last state, what the adjoint needs of the states, and what this stretch of time makes of a state."""
    run = partial(tier.forward, q, k, beta=beta, g=g, **options.of_tier())
    if options.axis is None:
        return *run(v=v, s0=s0, save=save), None
    _, added, _ = run(v=v, s0=_varying(jnp.zeros_like(s0), q), save=False)
    if beta is None:
        total = jnp.exp(jnp.sum(g, axis=2))  # b h (k)
        decay = total.reshape(*total.shape[:2], -1, 1)
        entering, s_last = pass_on(decay, added, s0, options.axis, False)
    else:
        unit = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=s0.dtype), (*s0.shape[:3], k.shape[-1]))
        nothing = jnp.zeros((*v.shape[:3], k.shape[-1]), v.dtype)
        _, decay, _ = run(v=_varying(nothing, q), s0=_varying(unit, q), save=False)
        entering, s_last = pass_on(decay, added, s0, options.axis, False, _matmul)
    o, _, states = run(v=v, s0=_varying(entering, q), save=save)
    return o, s_last, states, decay


def _forward_and_save(*operands: Any) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    o, s_last, states, decay = _forward(*operands, save=True)
    return (o, s_last), (*operands[:5], states, decay)


def _backward(
    tier: Tier, options: _Options, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    q, k, v, beta, g, states, decay = residuals
    do, ds_last = cotangents
    run = partial(tier.adjoint, q, k, v, beta, g, states, do, **options.of_tier())
    if options.axis is None:
        return run(ds_last)
    *_, added = run(_varying(jnp.zeros_like(ds_last), q))
    if beta is None:
        leaving, ds0 = pass_on(decay, added, ds_last, options.axis, True)
    else:
        leaving, ds0 = pass_on(jnp.swapaxes(decay, -1, -2), added, ds_last, options.axis, True, _matmul)
    *gradients, _ = run(_varying(leaving, q))
    return *gradients, ds0


def _varying(x: Array, like: Array) -> Array:
    return align_varying(like, x)[1]


def _matmul(decay: Array, state: Array) -> Array:
    return jnp.matmul(decay, state, precision=lax.Precision.HIGHEST)


_attend = jax.custom_vjp(lambda *operands: _forward(*operands)[:2], nondiff_argnums=(6, 7))
_attend.defvjp(_forward_and_save, _backward)
