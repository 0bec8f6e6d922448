"""Short causal depthwise convolution over time. Letters: b batch, t time, d channels, w taps, s = w - 1 held inputs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hybridlm_kernels.dispatch import Tier, UnsupportedKernel, check_operand, check_sequence, choose
from hybridlm_kernels.jax_compat import align_varying
from hybridlm_kernels.segments import check_segment_ids
from hybridlm_kernels.shards import Axis, local
from hybridlm_kernels.short_conv import chunked
from hybridlm_kernels.short_conv.activations import ACTIVATIONS
from hybridlm_kernels.short_conv.history import (
    document_index,
    from_earlier_devices,
    last_inputs,
    of_last_real_device,
    place_state,
    visible_inputs,
)

Residuals = tuple[Array, Array, Array | None, Array | None, Array | None]  # x, w, bias, halo, reach


def short_conv(
    x: Float[Array, "b t d"],
    w: Float[Array, "w d"],
    *,
    bias: Float[Array, " d"] | None = None,
    state: Float[Array, "b s d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    activation: str | None = None,
    impl: str = "auto",
    sequence_axis: Axis | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
    """y_t = activation(bias + sum_j w[W-1-j] x_{t-j}), every channel on its own; returns y and the state to go on with.

    w[W-1] weighs the current token, w[0] the oldest. `activation` is None, "silu", "gelu" (its tanh form) or "relu".
    Sums are float32 (float64 if an operand is), y has the dtype of `x`.

    `state` [b, W-1, d] holds the W-1 inputs before the first token, oldest first; zeros (or None) for a fresh start.
    The returned state, float32 or wider, holds the last W-1 inputs of the document of the last real token, zeros where
    that document is shorter; a row of padding alone returns the state that it got.

    `segment_ids` separate packed documents (0 = padding): no tap reaches into another document or into padding, and
    only the row's first document sees `state`. Padding may stand before, between and after documents, not inside one;
    y at padding is activation(bias), for the caller to mask. Differentiable in every floating operand.

    A sequence may be cut over devices, W-1 tokens each at least: by the sharding of `x` under a mesh of explicit axes,
    or inside a `jax.shard_map` by naming its mesh axis as `sequence_axis`. A device gets its neighbour's last W-1
    inputs; `state` and the returned one are those of the whole sequence, the same on every device.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    check_sequence("x", x)
    b, t, d = x.shape
    check_operand("x", x, (b, t, d), "[batch, time, channels]")
    if w.ndim != 2 or w.shape[0] == 0:
        raise ValueError(f"w: shape {w.shape} must be [taps, channels] with at least one tap")
    check_operand("w", w, (w.shape[0], d), "[taps, channels]")
    if bias is not None:
        bias = jnp.asarray(bias)
        check_operand("bias", bias, (d,), "[channels]")
    if state is not None:
        state = jnp.asarray(state)
        check_operand("state", state, (b, w.shape[0] - 1, d), "[batch, taps - 1, channels]")
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        check_segment_ids(segment_ids, (b, t))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: must be None, silu, gelu or relu")
    run = partial(_on_shard, tier=choose("short_conv", x, w, impl=impl), activation=activation)
    operands = [(x, "btd"), (w, "wd"), (bias, "d"), (state, "bsd"), (segment_ids, "bt")]
    y, state = local(run, operands, ["btd", "bsd"], sequence_axis)
    return y, state


def _on_shard(
    x: Array,
    w: Array,
    bias: Array | None,
    state: Array | None,
    segment_ids: Array | None,
    *,
    tier: Tier,
    activation: str | None,
    sequence_axis: Axis | None,
) -> tuple[Array, Array]:
    tier = tier.on_shard(x, w)
    dtype = jnp.result_type(jnp.float32, *(v.dtype for v in (x, w, bias, state) if v is not None))
    num_held = w.shape[0] - 1
    held = jnp.zeros((x.shape[0], num_held, x.shape[2]), dtype) if state is None else state.astype(dtype)
    if tier.impl == "reference":
        if sequence_axis is not None:
            raise UnsupportedKernel("impl='reference': short_conv does not cut a sequence over devices; use auto")
        return tier.whole(*align_varying(x, w, bias, held, segment_ids), activation=activation)
    x, segment_ids = align_varying(x, segment_ids)
    cut = sequence_axis if num_held > 0 else None
    if cut is not None:
        held = from_earlier_devices(x, held, segment_ids, cut)
    x, w, bias, held, segment_ids = align_varying(x, w, bias, held, segment_ids)
    if x.shape[1] == 1 and cut is None:
        return chunked.one_token(x, w, bias, held, segment_ids, activation)
    # Kernels read earlier inputs in any case, if only zeros; plain JAX is spared the work.
    halo = None if cut is None and state is None and tier.impl == "chunked" else held
    if segment_ids is None:
        y = _convolve(x, w, bias, halo, None, tier, activation)
        recent = x[:, max(0, x.shape[1] - num_held) :].astype(dtype)
        new = jnp.concatenate([held[:, recent.shape[1] :], recent], axis=1)
    else:
        document = document_index(segment_ids)
        placed, halo, holders = place_state(x, halo, document, num_held, after_padding=state is not None)
        y = _convolve(placed, w, bias, halo, visible_inputs(document, holders), tier, activation)
        new = last_inputs(x, held, document)
    return y, new if cut is None else of_last_real_device(new, segment_ids, cut)


def _convolve_fwd(
    x: Array,
    w: Array,
    bias: Array | None,
    halo: Array | None,
    reach: Array | None,
    tier: Tier,
    activation: str | None,
) -> tuple[Array, Residuals]:
    return tier.forward(x, w, bias, halo, reach, activation=activation), (x, w, bias, halo, reach)


def _convolve_bwd(
    tier: Tier, activation: str | None, residuals: Residuals, dy: Array
) -> tuple[Array, Array, Array | None, Array | None, None]:
    x, w, bias, halo, reach = residuals
    dx, dw, dbias, dhalo = tier.adjoint(x, w, bias, halo, reach, dy, activation=activation)
    dbias = None if bias is None else dbias.astype(bias.dtype)
    dhalo = None if halo is None else dhalo.astype(halo.dtype)
    return dx, dw.astype(w.dtype), dbias, dhalo, None


# The inputs are the only residuals: automatic differentiation would keep one shifted copy of x per tap.
_convolve = jax.custom_vjp(lambda *operands: _convolve_fwd(*operands)[0], nondiff_argnums=(5, 6))
_convolve.defvjp(_convolve_fwd, _convolve_bwd)
