"""Reads and sums at positions along the minor axis of an array.

On a TPU a gather or scatter there goes element by element. Short axes are read by comparing all positions with all
places; long ones by matmuls with position = LANES hi + lo, ones where lo is, and a comparison of hi.

Letters: k positions, r places, a = r / LANES, l = LANES.
"""

import jax
import jax.numpy as jnp
from hybridlm_kernels.target import target_of
from jaxtyping import Array, Float, Int, Shaped

LANES = 128


def pick(values: Shaped[Array, "*n r"], positions: Int[Array, "*n k"]) -> Shaped[Array, "*n k"]:
    """values[..., positions], for finite values."""
    if target_of([values]).platform != "tpu":
        return jnp.take_along_axis(values, positions, axis=-1, mode="promise_in_bounds")
    is_long = values.shape[-1] > LANES and jnp.issubdtype(values.dtype, jnp.floating)
    return pick_by_matmul(values, positions) if is_long else pick_by_comparison(values, positions)


def spread(values: Float[Array, "*n k"], positions: Int[Array, "*n k"], size: int) -> Float[Array, "*n r"]:
    """The transpose of `pick`: zeros of `size` places with the values added at their positions.

    What lies outside is left out.
    """
    if target_of([values]).platform == "tpu":
        return (spread_by_matmul if size > LANES else spread_by_comparison)(values, positions, size)
    flat = values.reshape(-1, values.shape[-1])
    places = jnp.where((positions >= 0) & (positions < size), positions, size).reshape(flat.shape)
    row = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 0)
    sums = jnp.zeros((flat.shape[0], size), values.dtype).at[row, places].add(flat, mode="drop")
    return sums.reshape(*values.shape[:-1], size)


def pick_by_comparison(values: Shaped[Array, "*n r"], positions: Int[Array, "*n k"]) -> Shaped[Array, "*n k"]:
    places = jnp.arange(values.shape[-1], dtype=positions.dtype)
    chosen = jnp.where(positions[..., None] == places, values[..., None, :], jnp.zeros((), values.dtype))
    return jnp.sum(chosen, axis=-1, dtype=values.dtype)


def spread_by_comparison(
    values: Float[Array, "*n k"], positions: Int[Array, "*n k"], size: int
) -> Float[Array, "*n r"]:
    places = jnp.arange(size, dtype=positions.dtype)[:, None]
    chosen = jnp.where(positions[..., None, :] == places, values[..., None, :], jnp.zeros((), values.dtype))
    return jnp.sum(chosen, axis=-1, dtype=values.dtype)


def pick_by_matmul(values: Float[Array, "*n r"], positions: Int[Array, "*n k"]) -> Float[Array, "*n k"]:
    tiles = -(-values.shape[-1] // LANES)
    padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, tiles * LANES - values.shape[-1])])
    padded = padded.reshape(*values.shape[:-1], tiles, LANES)
    in_lane = (positions[..., None] % LANES == jnp.arange(LANES)).astype(values.dtype)  # n k l
    # Exact: else a TPU would round the values to bfloat16.
    of_tiles = jnp.einsum("...al,...kl->...ak", padded, in_lane, precision=jax.lax.Precision.HIGHEST)
    return pick_tile(of_tiles, positions // LANES)


def pick_tile(values: Float[Array, "*n a k"], tiles: Int[Array, "*n k"]) -> Float[Array, "*n k"]:
    is_tile = tiles[..., None, :] == jnp.arange(values.shape[-2])[:, None]
    return jnp.sum(jnp.where(is_tile, values, jnp.zeros((), values.dtype)), axis=-2)


def spread_by_matmul(values: Float[Array, "*n k"], positions: Int[Array, "*n k"], size: int) -> Float[Array, "*n r"]:
    tiles = -(-size // LANES)
    is_tile = positions[..., None, :] // LANES == jnp.arange(tiles)[:, None]  # n a k
    in_tiles = jnp.where(is_tile, values[..., None, :], jnp.zeros((), values.dtype))
    in_lane = (positions[..., None] % LANES == jnp.arange(LANES)).astype(values.dtype)  # n k l
    sums = jnp.einsum("...ak,...kl->...al", in_tiles, in_lane, precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(*values.shape[:-1], tiles * LANES)[..., :size]
