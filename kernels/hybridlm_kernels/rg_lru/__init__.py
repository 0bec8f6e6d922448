"""The real-gated linear recurrent unit after its gates' projections (De et al. 2024, arXiv:2402.19427, section 2.4).

Letters: b batch, t time, d channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from hybridlm_kernels.dispatch import Tier, check_operand, check_sequence, choose
from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.linear_scan import scan
from hybridlm_kernels.segments import CONTINUE, PADDING, RESET, check_segment_ids, starts
from hybridlm_kernels.shards import Axis, align_whole, id_before, local, pass_on

# x, gate_a, gate_x, rate, h, h0 and the kinds of the tokens
Residuals = tuple[Array, Array, Array, Array, Array, Array, Array]


def rg_lru(
    x: Float[Array, "b t d"],
    gate_a: Float[Array, "b t d"],
    gate_x: Float[Array, "b t d"],
    decay: Float[Array, " d"],
    *,
    h0: Float[Array, "b d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    positions: Int[Array, "b t"] | None = None,
    scale: float = 8.0,
    impl: str = "auto",
    sequence_axis: Axis | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(gate_x_t) x_t, log a_t = -scale softplus(decay) sigmoid(gate_a_t).

    Returns all states h, in the dtype of `x`, and the last one in float32 (float64 if an operand is). The gates come
    before their sigmoid, bias included; `decay` is the paper's Lambda, `scale` its c. `h0` is the state before the
    first token, zeros when None.

    A document's first token starts from a zero state and takes its input whole, its root being 1: the tokens at
    position 0 of `positions`, counted within the document; where those are None, the first of every segment, and of the
    row unless `h0` is given. `segment_ids` as in `linear_scan`: 0 is padding, which leaves the state unchanged.

    The derivative of the root is bounded by 1000: it is infinite where a = 1. Differentiable in every floating operand.
    The kernels keep no [b, t, d] array but the operands and h. `sequence_axis` as in `linear_scan`.
    """
    x, gate_a, gate_x, decay = (jnp.asarray(v) for v in (x, gate_a, gate_x, decay))
    check_sequence("x", x)
    b, t, d = x.shape
    for name, array in (("x", x), ("gate_a", gate_a), ("gate_x", gate_x)):
        check_operand(name, array, (b, t, d), "[batch, time, channels]")
    check_operand("decay", decay, (d,), "[channels]")
    if h0 is not None:
        h0 = jnp.asarray(h0)
        check_operand("h0", h0, (b, d), "[batch, channels]")
    for name, array in (("segment_ids", segment_ids), ("positions", positions)):
        if array is not None:
            check_segment_ids(jnp.asarray(array), (b, t), name)
    dtype = jnp.result_type(jnp.float32, *(v.dtype for v in (x, gate_a, gate_x, decay, h0) if v is not None))
    rate = scale * jax.nn.softplus(decay.astype(dtype))
    run = partial(_on_shard, tier=choose("rg_lru", x, gate_a, gate_x, impl=impl), dtype=dtype)
    operands = [(x, "btd"), (gate_a, "btd"), (gate_x, "btd"), (rate, "d"), (h0, "bd")]
    ids = [(segment_ids, "bt"), (positions, "bt")]
    h, h_last = local(run, [*operands, *ids], ["btd", "bd"], sequence_axis)
    return h, h_last


def decay_and_root(gate_a: Float[Array, "... d"], rate: Float[Array, " d"]) -> tuple[Array, Array]:
    """a = exp(-rate sigmoid(gate_a)) and sqrt(1 - a^2)."""
    log_a = -rate * jax.nn.sigmoid(gate_a)
    return jnp.exp(log_a), bounded_sqrt(-jnp.expm1(2.0 * log_a))


@jax.custom_jvp
def bounded_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """sqrt(x), its derivative at most 1000: it is infinite at 0, where a = 1."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / jnp.maximum(2.0 * root, 1e-3)


def _on_shard(
    x: Array,
    gate_a: Array,
    gate_x: Array,
    rate: Array,
    h0: Array | None,
    segment_ids: Array | None,
    positions: Array | None,
    *,
    tier: Tier,
    dtype: jnp.dtype,
    sequence_axis: Axis | None,
) -> tuple[Array, Array]:
    kinds = _kinds(x, segment_ids, positions, h0 is None, sequence_axis)
    h0 = jnp.zeros((x.shape[0], x.shape[2]), dtype) if h0 is None else h0.astype(dtype)
    x, gate_a, gate_x, rate, kinds = align_varying(x, gate_a, gate_x, rate, kinds)
    tier = tier.on_shard(x, gate_a, gate_x)
    if tier.impl in ("reference", "chunked"):
        return _composed(x, gate_a, gate_x, rate, h0, kinds, tier, sequence_axis)
    h0 = align_varying(x, h0)[1] if sequence_axis is None else align_whole(h0, x, sequence_axis)
    return _fused(x, gate_a, gate_x, rate, h0, kinds, tier, sequence_axis)


def _kinds(x: Array, ids: Array | None, positions: Array | None, fresh: bool, axis: Axis | None) -> Array:
    """Like `segments.token_kinds`, but every first token of a document is RESET, the row's too if it has no state."""
    if ids is None:
        ids = jnp.ones(x.shape[:2], jnp.int32)
        first = jnp.broadcast_to((jnp.arange(x.shape[1]) == 0) & fresh, x.shape[:2])
        begins = first if positions is None else positions == 0
        if positions is None and axis is not None:
            begins &= lax.axis_index(axis) == 0
    elif positions is not None:
        begins = positions == 0
    else:
        before = None if axis is None else id_before(ids, axis)
        begins = starts(ids, before)
        if fresh:
            first = jnp.cumsum(ids != 0, axis=1) == 1
            begins |= first if before is None else first & (before == 0)[:, None]
    return jnp.where(ids == 0, PADDING, jnp.where(begins, RESET, CONTINUE)).astype(jnp.int8)


def _composed(
    x: Array, gate_a: Array, gate_x: Array, rate: Array, h0: Array, kinds: Array, tier: Tier, axis: Axis | None
) -> tuple[Array, Array]:
    """In two dimensions before the scan: XLA on CPU flattens what projections made, and vectorises it in two alone."""
    tokens = [v.reshape(-1, x.shape[2]).astype(h0.dtype) for v in (x, gate_a, gate_x)]
    a, root = decay_and_root(tokens[1], rate)
    root = jnp.where(kinds.reshape(-1, 1) == RESET, 1.0, root)
    value = root * (jax.nn.sigmoid(tokens[2]) * tokens[0])
    inner = Tier("linear_scan", tier.impl)
    h, h_last = scan(a.reshape(x.shape), value.reshape(x.shape), h0, kinds, inner, False, axis)
    return h.astype(x.dtype), h_last


def _fused_fwd(
    x: Array, gate_a: Array, gate_x: Array, rate: Array, h0: Array, kinds: Array, tier: Tier, axis: Axis | None
) -> tuple[tuple[Array, Array], Residuals]:
    if axis is None:
        h, h_last = tier.forward(x, gate_a, gate_x, rate, h0, kinds)
        return (h, h_last), (x, gate_a, gate_x, rate, h, h0, kinds)
    decay, added = tier.summary(x, gate_a, gate_x, rate, kinds)
    entering, h_last = pass_on(decay, added, h0, axis, False)
    h, _ = tier.forward(x, gate_a, gate_x, rate, entering, kinds)
    return (h, h_last), (x, gate_a, gate_x, rate, h, entering, kinds)


def _fused_bwd(
    tier: Tier, axis: Axis | None, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array, Array, None]:
    x, gate_a, gate_x, rate, h, h0, kinds = residuals
    dh, dh_last = cotangents
    if axis is None:
        return *tier.adjoint(x, gate_a, gate_x, rate, h, h0, dh, dh_last, kinds), None
    decay, added = tier.adjoint_summary(gate_a, rate, dh, kinds)
    leaving, dh0 = pass_on(decay, added, dh_last, axis, True)
    *gradients, _ = tier.adjoint(x, gate_a, gate_x, rate, h, h0, dh, leaving, kinds)
    return *gradients, dh0, None


_fused = jax.custom_vjp(lambda *operands: _fused_fwd(*operands)[0], nondiff_argnums=(6, 7))
_fused.defvjp(_fused_fwd, _fused_bwd)
