"""All-to-all over the mesh axis `expert`, inside a `jax.shard_map`: rows go to the devices of their experts and back.

Letters: p devices of the axis, e experts of one device, x experts (p e), r rows that a device sends, d model width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from hybridlm_kernels.target import target_of
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from hybridlm import config
from hybridlm.ffns.moe.sorted_rows import Order, sort_by_expert, take_rows

AXIS = "expert"
SMALLEST_BUFFER = 1024  # rows: a few tokens are never even, and room for them costs nothing

RunExperts = Callable[[Float[Array, "r d"], Int[Array, " e"]], Float[Array, "r d"]]
"""Rows sorted by this device's experts, and how many each has, to their outputs."""


def num_devices() -> int:
    """Of the `expert` axis; 1 where no mesh is in scope."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)


def run_remotely(
    rows: Float[Array, "r d"], counts: Int[Array, " x"], choices: int, run: RunExperts, cfg: config.Dropless
) -> tuple[Float[Array, "r d"], Int[Array, ""]]:
    """The outputs of rows sorted by expert, computed where the experts are, and how many of this device's rows were
    dropped because a buffer was full. Dropped rows come back as 0. Each token has so many `choices`, of experts that
    are distinct, and so as many rows."""
    through = {"ragged": _ragged, "padded": _padded}[cfg.exchange]
    # One token has no more rows for a device than the device has experts.
    to_one_device = rows.shape[0] // choices * min(choices, counts.size // num_devices())
    return through(rows, counts, to_one_device, run, cfg)


def buffer_rows(num_rows: int, factor: float | None, most: int) -> int:
    """Rows of a buffer for `factor` times the fair share `num_rows`, of at most `most` that could come."""
    if factor is None:
        return most
    return min(most, max(8 * math.ceil(factor * num_rows / 8), SMALLEST_BUFFER))


def all_to_all(x: Shaped[Array, "p *rest"], slices: int = 1) -> Shaped[Array, "p *rest"]:
    """Row i goes to device i and is replaced by the one that comes from it.

    With several slices in two steps: among the devices of a slice, which thereby collect what goes to one device of
    each other slice, then across slices, one message for each.
    """
    p = x.shape[0]
    if slices == 1:
        return lax.all_to_all(x, AXIS, 0, 0, tiled=True)
    inside = p // slices
    within = [[s * inside + i for i in range(inside)] for s in range(slices)]
    across = [[s * inside + i for s in range(slices)] for i in range(inside)]
    x = x.reshape(slices, inside, *x.shape[1:])
    x = lax.all_to_all(x, AXIS, 1, 1, axis_index_groups=within, tiled=True)
    x = lax.all_to_all(x, AXIS, 0, 0, axis_index_groups=across, tiled=True)
    return x.reshape(p, *x.shape[2:])


class Slices(NamedTuple):
    """Arguments of `lax.ragged_all_to_all`, [p e]: entry (i, j) is the slice between this device and device i that
    concerns the j-th expert of whichever of the two computes."""

    input_offsets: Int[Array, " pe"]
    send_sizes: Int[Array, " pe"]
    output_offsets: Int[Array, " pe"]
    recv_sizes: Int[Array, " pe"]


def _ragged(
    rows: Float[Array, "r d"], counts: Int[Array, " x"], most: int, run: RunExperts, cfg: config.Dropless
) -> tuple[Float[Array, "r d"], Int[Array, ""]]:
    """One slice per device and expert, so that rows arrive sorted by expert."""
    p, me = num_devices(), lax.axis_index(AXIS)
    r = rows.shape[0]
    size = buffer_rows(r, cfg.buffer_factor, p * most)
    counts_of = lax.all_gather(counts, AXIS).reshape(p, p, -1)  # sender receiver e
    sent_from = _starts(counts_of.reshape(p, -1)).reshape(counts_of.shape)
    arriving = jnp.moveaxis(counts_of, 0, 2)  # receiver e sender
    lands_at = _starts(arriving.reshape(p, -1)).reshape(arriving.shape)
    kept = jnp.maximum(jnp.minimum(arriving, size - lands_at), 0)
    here, theirs = kept[me], kept[:, :, me]  # e sender; receiver e
    there = Slices(sent_from[me].ravel(), theirs.ravel(), lands_at[:, :, me].ravel(), here.T.ravel())
    back = Slices(lands_at[me].T.ravel(), here.T.ravel(), sent_from[:, me].ravel(), theirs.ravel())
    outputs = run(_move(size, rows, there, back), jnp.sum(here, axis=1))
    return _move(r, outputs, back, there), jnp.sum(counts) - jnp.sum(theirs)


def _starts(sizes: Int[Array, "p s"]) -> Int[Array, "p s"]:
    return jnp.cumsum(sizes, axis=1) - sizes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(num_rows: int, x: Float[Array, "r d"], there: Slices, back: Slices) -> Float[Array, "s d"]:
    """What this device receives, in an array of so many rows, 0 elsewhere. `back` is the way of the cotangents."""
    return _ragged_all_to_all(num_rows, x, there)


def _move_forward(
    num_rows: int, x: Float[Array, "r d"], there: Slices, back: Slices
) -> tuple[Float[Array, "s d"], tuple[Array, Slices]]:
    return _move(num_rows, x, there, back), (_rows_alone(x), back)


def _move_backward(
    num_rows: int, saved: tuple[Array, Slices], dy: Float[Array, "s d"]
) -> tuple[Float[Array, "r d"], None, None]:
    like, back = saved
    return _ragged_all_to_all(like.shape[0], dy, back), None, None


_move.defvjp(_move_forward, _move_backward)


def _ragged_all_to_all(num_rows: int, x: Float[Array, "r d"], slices: Slices) -> Float[Array, "s d"]:
    output = jnp.zeros((num_rows, x.shape[1]), x.dtype)
    if target_of((x,)).platform != "cpu":
        return lax.ragged_all_to_all(x, output, *slices, axis_name=AXIS)
    # XLA has none for CPUs: gather everything, and look up for each row of the output which slice covers it.
    p, me = num_devices(), lax.axis_index(AXIS)
    operands = lax.all_gather(x, AXIS)  # p r d
    starts, sizes, offsets = (
        lax.all_gather(of, AXIS).reshape(p, p, -1)[:, me].ravel()  # sender e
        for of in (slices.input_offsets, slices.send_sizes, slices.output_offsets)
    )
    row = jnp.arange(num_rows)[:, None]
    covers = (row >= offsets) & (row < offsets + sizes)  # s pe
    which = jnp.argmax(covers, axis=1)
    sender = which // (sizes.size // p)
    source = operands[sender, starts[which] + row[:, 0] - offsets[which]]
    return jnp.where(jnp.any(covers, axis=1)[:, None], source, output)


def _padded(
    rows: Float[Array, "r d"], counts: Int[Array, " x"], most: int, run: RunExperts, cfg: config.Dropless
) -> tuple[Float[Array, "r d"], Int[Array, ""]]:
    """The same number of rows to every device, which sorts what it received."""
    p, r = num_devices(), rows.shape[0]
    size = buffer_rows(math.ceil(r / p), cfg.buffer_factor, most)
    by_device = counts.reshape(p, -1)
    kept = jnp.maximum(jnp.minimum(by_device, size - _starts(by_device)), 0)
    first = _starts(jnp.sum(by_device, axis=1)[None])[0]
    layout = Packing(first, jnp.sum(kept, axis=1))
    received = all_to_all(_pack(size, rows, layout), cfg.slices)  # p size d
    sizes = all_to_all(kept, cfg.slices)  # p e
    ends = jnp.cumsum(sizes, axis=1)
    expert_of = jnp.sum(jnp.arange(size)[:, None] >= ends[:, None], axis=-1)  # p size; e where there is no row
    order = sort_by_expert(expert_of.reshape(-1, 1), sizes.shape[1])
    outputs = run(take_rows(received.reshape(p * size, -1), order), order.counts)
    unsorted = take_rows(outputs, Order(order.choice_of[:, None], order.row_of[:, 0], order.counts))
    returned = all_to_all(unsorted.reshape(received.shape), cfg.slices)
    return _unpack(r, returned, layout), jnp.sum(counts) - jnp.sum(kept)


class Packing(NamedTuple):
    """Rows first to first + size - 1 of a sorted array belong to each device."""

    first: Int[Array, " p"]
    size: Int[Array, " p"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pack(capacity: int, rows: Float[Array, "r d"], layout: Packing) -> Float[Array, "p c d"]:
    """Each device's rows at the start of a buffer of their own, 0 behind them."""
    slot = jnp.arange(capacity)
    filled = slot < layout.size[:, None]  # p c
    taken = rows.at[layout.first[:, None] + slot].get(mode="clip")
    return jnp.where(filled[:, :, None], taken, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpack(num_rows: int, buffers: Float[Array, "p c d"], layout: Packing) -> Float[Array, "r d"]:
    """The inverse of `_pack`; 0 in rows that were not packed."""
    row = jnp.arange(num_rows)[:, None]
    packed = (row >= layout.first) & (row < layout.first + layout.size)  # r p
    device = jnp.argmax(packed, axis=1)
    taken = buffers.at[device, row[:, 0] - layout.first[device]].get(mode="clip")
    return jnp.where(jnp.any(packed, axis=1)[:, None], taken, 0)


def _pack_forward(
    capacity: int, rows: Float[Array, "r d"], layout: Packing
) -> tuple[Float[Array, "p c d"], tuple[Array, Packing]]:
    return _pack(capacity, rows, layout), (_rows_alone(rows), layout)


def _pack_backward(
    capacity: int, saved: tuple[Array, Packing], dy: Float[Array, "p c d"]
) -> tuple[Float[Array, "r d"], None]:
    like, layout = saved
    return _unpack(like.shape[0], dy, layout), None


def _unpack_forward(
    num_rows: int, buffers: Float[Array, "p c d"], layout: Packing
) -> tuple[Float[Array, "r d"], tuple[Array, Packing]]:
    return _unpack(num_rows, buffers, layout), (_rows_alone(buffers[0]), layout)


def _unpack_backward(
    num_rows: int, saved: tuple[Array, Packing], dy: Float[Array, "r d"]
) -> tuple[Float[Array, "p c d"], None]:
    like, layout = saved
    return _pack(like.shape[0], dy, layout), None


def _rows_alone(x: Float[Array, "r d"]) -> Float[Array, "r 0"]:
    """An array without elements that remembers how many rows there were."""
    return jnp.zeros((x.shape[0], 0))


_pack.defvjp(_pack_forward, _pack_backward)
_unpack.defvjp(_unpack_forward, _unpack_backward)
