"""Packed documents: what segment ids mean to a recurrence. Letters: b batch, t time.

`segment_ids` [b, t] names the document of every token; 0 is padding. A token continues the document of the last real
token before it, across padding, when the ids agree, and starts a new one when they differ. The first real token of a
row continues whatever the initial state holds.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int, Int8

CONTINUE, RESET, PADDING = 0, 1, 2


def check_segment_ids(segment_ids: Array, shape: tuple[int, int], name: str = "segment_ids") -> None:
    """Raises ValueError unless `segment_ids`, or what `name` says, are integers of `shape` [b, t]."""
    if segment_ids.shape != shape:
        raise ValueError(f"{name}: shape {segment_ids.shape} must be [batch, time] = {shape}, as in x")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"{name}: dtype {segment_ids.dtype} must be an integer type, such as int32")


def last_real_id_before(segment_ids: Int[Array, "b t"], before: Int[Array, " b"] | None = None) -> Int[Array, "b t"]:
    """The id of the nearest real token strictly before each position; 0 where there is none.

    `before` is the last real id of a stretch of time that comes before this one.
    """
    t = segment_ids.shape[1]
    position = jnp.where(segment_ids != 0, jnp.arange(t), -1)
    latest = jnp.pad(lax.cummax(position, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    found = jnp.take_along_axis(segment_ids, jnp.maximum(latest, 0), axis=1)
    return jnp.where(latest >= 0, found, 0 if before is None else before[:, None])


def starts(segment_ids: Int[Array, "b t"], before: Int[Array, " b"] | None = None) -> Bool[Array, "b t"]:
    """True at the first token of every document but the row's first, which continues the initial state."""
    last = last_real_id_before(segment_ids, before)
    return (segment_ids != 0) & (last != 0) & (segment_ids != last)


def token_kinds(
    segment_ids: Int[Array, "b t"], reverse: bool = False, before: Int[Array, " b"] | None = None
) -> Int8[Array, "b t"]:
    """CONTINUE, RESET (the state is zeroed before this token) or PADDING; `reverse` reads time backwards."""
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    kinds = jnp.where(ids == 0, PADDING, jnp.where(starts(ids, before), RESET, CONTINUE)).astype(jnp.int8)
    return jnp.flip(kinds, 1) if reverse else kinds
