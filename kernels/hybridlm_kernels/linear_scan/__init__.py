"""Diagonal linear recurrence h_t = a_t h_{t-1} + x_t. Letters: b batch, t time, d channels.

The recurrence of RG-LRU (De et al. 2024, arXiv:2402.19427), LRU (Orvieto et al. 2023, arXiv:2303.06349) and their kin.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Inexact, Int

from hybridlm_kernels.dispatch import Tier, UnsupportedKernel, check_operand, check_sequence, choose
from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.linear_scan import chunked
from hybridlm_kernels.segments import check_segment_ids, token_kinds
from hybridlm_kernels.shards import Axis, align_whole, id_before, local, pass_on

Residuals = tuple[Array, Array, Array, Array | None]  # a, h, h0 and the kinds of the tokens


def linear_scan(
    a: Inexact[Array, "b t d"],
    x: Inexact[Array, "b t d"],
    *,
    h0: Inexact[Array, "b d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    impl: str = "auto",
    sequence_axis: Axis | None = None,
) -> tuple[Inexact[Array, "b t d"], Inexact[Array, "b d"]]:
    """h_t = a_t h_{t-1} + x_t, every channel on its own; returns all states h and the last one.

    `a` and `x` are real or complex. The state is carried in float32 (complex64), or in double precision if an operand
    is; h has the promoted dtype of `a` and `x`, and the last state keeps the precision of the carry. `h0` is the state
    before the first token, zeros when None.

    `segment_ids` separate packed documents (0 = padding): the state is zeroed before a token of another document than
    the last real token, so only the row's first document sees `h0`. Padding leaves the state unchanged: h repeats it
    there, for the caller to mask, and the padding's own `a` and `x` count for nothing and get zero gradient. The last
    state is the state after the last real token.

    `reverse` mirrors time: h_t = a_t h_{t+1} + x_t, `h0` comes after the last token, and the last state is at t = 0.
    Differentiable in `a`, `x` and `h0`, also through the last state; reverse mode only.

    A sequence may be cut over devices: by the sharding of `x` under a mesh of explicit axes, or inside a
    `jax.shard_map` by naming its mesh axis as `sequence_axis`. Devices scan their stretches and exchange one state and
    one decay per channel; `h0` and the last state are those of the whole sequence, the same on every device.
    """
    a, x = jnp.asarray(a), jnp.asarray(x)
    check_sequence("x", x)
    check_operand("x", x, x.shape, "[batch, time, channels]", allow_complex=True)
    check_operand("a", a, x.shape, "[batch, time, channels]", allow_complex=True)
    b, t, d = x.shape
    carry_dtype = jnp.result_type(a.dtype, x.dtype, jnp.float32)
    if h0 is not None:
        h0 = jnp.asarray(h0)
        check_operand("h0", h0, (b, d), "[batch, channels]", allow_complex=True)
        carry_dtype = jnp.result_type(carry_dtype, h0.dtype)
        if jnp.iscomplexobj(h0) and not jnp.iscomplexobj(a) and not jnp.iscomplexobj(x):
            raise ValueError(f"h0: dtype {h0.dtype} is complex while a and x are real; make one of them complex")
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        check_segment_ids(segment_ids, (b, t))
    tier = choose("linear_scan", a, x, impl=impl)
    run = partial(_on_shard, tier=tier, carry_dtype=carry_dtype, reverse=reverse)
    operands = [(x, "btd"), (a, "btd"), (h0, "bd"), (segment_ids, "bt")]
    h, h_last = local(run, operands, ["btd", "bd"], sequence_axis)
    return h, h_last


def _on_shard(
    x: Array,
    a: Array,
    h0: Array | None,
    segment_ids: Array | None,
    *,
    tier: Tier,
    carry_dtype: jnp.dtype,
    reverse: bool,
    sequence_axis: Axis | None,
) -> tuple[Array, Array]:
    kinds = None
    if segment_ids is not None:
        before = None if sequence_axis is None else id_before(segment_ids, sequence_axis, reverse)
        kinds = token_kinds(segment_ids, reverse, before)
    h0 = jnp.zeros((x.shape[0], x.shape[2]), carry_dtype) if h0 is None else h0.astype(carry_dtype)
    return scan(a, x, h0, kinds, tier.on_shard(a, x), reverse, sequence_axis)


def scan(
    a: Array, x: Array, h0: Array, kinds: Array | None, tier: Tier, reverse: bool, sequence_axis: Axis | None
) -> tuple[Array, Array]:
    """h and h_last of one device's shard; `h0` has the dtype of the carry, `kinds` [b, t] are as in segments.py."""
    if tier.impl == "reference":
        if sequence_axis is not None:
            raise UnsupportedKernel("impl='reference': linear_scan does not cut a sequence over devices; use auto")
        return tier.forward(a, x, h0, kinds, reverse=reverse)
    a, x, kinds = align_varying(a, x, kinds)
    if sequence_axis is not None:
        return _scan(a, x, align_whole(h0, a, sequence_axis), kinds, tier, reverse, x.dtype, sequence_axis)
    a, x, h0, kinds = align_varying(a, x, h0, kinds)
    if x.shape[1] == 1:
        return chunked.one_token(a, x, h0, kinds)
    return _scan(a, x, h0, kinds, tier, reverse, x.dtype, None)


def _scan_fwd(
    a: Array,
    x: Array,
    h0: Array,
    kinds: Array | None,
    tier: Tier,
    reverse: bool,
    x_dtype: jnp.dtype,
    axis: Axis | None,
) -> tuple[tuple[Array, Array], Residuals]:
    if axis is None:
        h, h_last = tier.forward(a, x, h0, kinds, reverse=reverse)
        return (h, h_last), (a, h, h0, kinds)
    # The state that enters this device's stretch of time comes from a first pass, which writes no states.
    decay, added = tier.summary(a, x, kinds, reverse=reverse, premultiplied=False)
    entering, h_last = pass_on(decay, added, h0, axis, reverse)
    h, _ = tier.forward(a, x, entering, kinds, reverse=reverse)
    return (h, h_last), (a, h, entering, kinds)


def _scan_bwd(
    tier: Tier,
    reverse: bool,
    x_dtype: jnp.dtype,
    axis: Axis | None,
    residuals: Residuals,
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array, None]:
    a, h, h0, kinds = residuals
    dh, dh_last = cotangents
    if axis is None:
        return *tier.adjoint(a, h, h0, dh, dh_last, kinds, reverse=reverse, x_dtype=x_dtype), None
    # The adjoint's carry is a recurrence against time.
    decay, added = tier.summary(a, dh, kinds, reverse=not reverse, premultiplied=True)
    leaving, dh0 = pass_on(decay, added, dh_last, axis, not reverse)
    da, dx, _ = tier.adjoint(a, h, h0, dh, leaving, kinds, reverse=reverse, x_dtype=x_dtype)
    return da, dx, dh0, None


_scan = jax.custom_vjp(lambda *operands: _scan_fwd(*operands)[0], nondiff_argnums=(4, 5, 6, 7))
_scan.defvjp(_scan_fwd, _scan_bwd)
