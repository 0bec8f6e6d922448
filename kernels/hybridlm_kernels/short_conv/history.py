"""Which earlier inputs a token of a short convolution sees: of its document, of a state, of the device before.

Letters: b batch, t time, d channels, w taps, s = w - 1 held inputs.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from hybridlm_kernels.jax_compat import align_varying, gather_equal
from hybridlm_kernels.segments import starts
from hybridlm_kernels.shards import Axis, id_before

NOBODY = -2  # holds an input that no token may see


def document_index(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """0 for the row's first document, 1 for the second and so on; -1 at padding."""
    return jnp.where(segment_ids != 0, jnp.cumsum(starts(segment_ids), axis=1), -1)


def place_state(
    x: Array, state: Array | None, document: Array, num_held: int, *, after_padding: bool
) -> tuple[Array, Array | None, Array]:
    """x, the inputs before it, and the documents [b, s + t] that these and those belong to.

    The inputs of `state` come right before the row's first real token: in place of padding, where the row begins with
    it and `after_padding` allows it.
    """
    b, t = document.shape
    if state is None or num_held == 0:
        return x, state, jnp.pad(document, ((0, 0), (num_held, 0)), constant_values=NOBODY)
    if not after_padding:
        before = jnp.where(document[:, :1] == 0, 0, NOBODY)
        return x, state, jnp.concatenate([jnp.broadcast_to(before, (b, num_held)), document], axis=1)
    first = jnp.argmax(document >= 0, axis=1)[:, None]
    row, position = jnp.arange(b)[:, None], first + jnp.arange(num_held)  # position among s + t inputs
    holders = jnp.pad(document, ((0, 0), (num_held, 0)), constant_values=NOBODY)
    holders = holders.at[row, position].set(jnp.where(document.max(axis=1, keepdims=True) >= 0, 0, NOBODY))
    in_x = jnp.where(position >= num_held, position - num_held, t)  # t is dropped
    halo = jnp.zeros_like(state).at[row, position].set(state, mode="drop")
    return x.at[row, in_x].set(state.astype(x.dtype), mode="drop"), halo, holders


def visible_inputs(document: Int[Array, "b t"], holders: Int[Array, "b st"]) -> Int[Array, "b t"]:
    """How many inputs before each token are of its document, at most s; -1 at padding."""
    t = document.shape[1]
    num_held = holders.shape[1] - t
    reach = jnp.zeros_like(document)
    for j in range(1, num_held + 1):
        unbroken = reach == j - 1
        reach = reach + (unbroken & (holders[:, num_held - j : num_held - j + t] == document))
    return jnp.where(document >= 0, reach, -1).astype(jnp.int32)


def last_inputs(x: Array, held: Array, document: Array) -> Array:
    """The last w-1 inputs of the document of each row's last real token, or of the state before it."""
    t, num_held = x.shape[1], held.shape[1]
    if num_held == 0:
        return held
    latest = document.max(axis=1, keepdims=True)  # b 1
    length = ((document == latest) & (document >= 0)).sum(axis=1, keepdims=True)
    end = jnp.max(jnp.where(document >= 0, jnp.arange(t), -1), axis=1, keepdims=True)
    back = num_held - 1 - jnp.arange(num_held)  # tokens between the input and the last one
    row = jnp.arange(x.shape[0])[:, None]
    recent = x[row, jnp.maximum(end - back, 0)].astype(held.dtype)
    earlier = held[row, jnp.clip(jnp.arange(num_held) + length, 0, num_held - 1)]
    earlier = jnp.where((latest <= 0)[:, :, None], earlier, 0)
    return jnp.where((back < length)[:, :, None], recent, earlier)


def from_earlier_devices(x: Array, state: Array, segment_ids: Array | None, axis: Axis) -> Array:
    """The state that this device's stretch of time begins with: its neighbour's last inputs, or `state` at the start.

    Raises ValueError where a stretch is shorter than that.
    """
    t, num_held = x.shape[1], state.shape[1]
    if t < num_held:
        raise ValueError(f"x: {t} tokens per device must be at least taps - 1 = {num_held}; use fewer devices")
    x, state, segment_ids = align_varying(x, state, segment_ids)
    if segment_ids is None:
        ends, goes_on = x[:, t - num_held :].astype(state.dtype), True
        nothing_before = lax.axis_index(axis) == 0
    else:
        before = id_before(segment_ids, axis)
        nothing_before = (before == 0)[:, None, None]
        first = jnp.take_along_axis(segment_ids, jnp.argmax(segment_ids != 0, axis=1)[:, None], axis=1)[:, 0]
        goes_on = ((first == before) | (first == 0))[:, None, None]
        ends = last_inputs(x, jnp.where(nothing_before, state, 0), document_index(segment_ids))
    num = lax.axis_size(axis)
    received = lax.ppermute(ends, axis, [(i, i + 1) for i in range(num - 1)])
    return jnp.where(nothing_before, state, jnp.where(goes_on, received, 0))


def of_last_real_device(state: Array, segment_ids: Array | None, axis: Axis) -> Array:
    """The `state` of the device that holds each row's last real token, the same on all devices."""
    num, me = lax.axis_size(axis), lax.axis_index(axis)
    if segment_ids is None:
        mine = me == num - 1
    else:
        real = gather_equal((segment_ids != 0).any(axis=1), axis)  # p b
        last = jnp.max(jnp.where(real, jnp.arange(num)[:, None], 0), axis=0)
        mine = (last == me)[:, None, None]
    return lax.psum(jnp.where(mine, state, 0), axis)
