"""Softmax attention over a sequence that is cut over devices, inside `jax.shard_map`.

Every device holds one equal stretch of time, in the order of the devices; documents may lie on any number of them.
Two ways, for an attention over keys of which the last t belong to the queries, with what comes before them:

Keys come to the queries (`bring_keys`): stretches are passed on from neighbour to neighbour, only as far as a window
reaches. Heads are exchanged for time (`exchange_heads`, Jacobs et al., 2023, arXiv:2309.14509): every device then has
some heads over all of time. Without a window this halves the work: a device scores h t T pairs against brought keys,
most of them masked on the first devices, and h / p heads over all of time are h t T / 2 pairs on every device.

Letters: b batch, t time on one device, T on all of them, p devices, h query heads, g key-value heads, k head dim.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from hybridlm_kernels.shards import Axis
from jax import lax
from jaxtyping import Array, Float

from hybridlm.mixers.base import Segments

Attention = Callable[[Array, Array, Array, Segments], Array]
"""(q, k, v, segments) -> o, where k, v and segments may begin before q."""


def attend_across(
    attention: Attention,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Segments,
    *,
    window: int | None,
    axis: Axis,
) -> Float[Array, "b t h k"]:
    """`attention`, which looks back over `window` tokens or everything, over a sequence cut over `axis`."""
    num, t = lax.axis_size(axis), q.shape[1]
    before = (num - 1) * t if window is None else min(window - 1, (num - 1) * t)
    if window is None and q.shape[2] % num == 0:
        return exchange_heads(attention, q, k, v, segments, axis)
    return attention(q, *bring_keys(k, v, segments, before, axis))


def bring_keys(
    k: Float[Array, "b t g k"], v: Float[Array, "b t g k"], segments: Segments, before: int, axis: Axis
) -> tuple[Float[Array, "b s g k"], Float[Array, "b s g k"], Segments]:
    """The `before` keys, values and segments ahead of a device's own, and those; padding ahead of the first token.

    Each device passes on what it received, so that a link carries `before` tokens whatever their distance.
    """
    own = received = (k, v, segments)
    num, t = lax.axis_size(axis), k.shape[1]
    onward = [(i, i + 1) for i in range(num - 1)]  # the first device receives zeros, which are padding
    stretches = [own]
    for ahead in range(0, before, t):
        size = min(t, before - ahead)
        received = jax.tree.map(lambda x, size=size: lax.ppermute(x[:, t - size :], axis, onward), received)
        stretches.insert(0, received)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *stretches)


def exchange_heads(
    attention: Attention,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Segments,
    axis: Axis,
) -> Float[Array, "b t h k"]:
    """`attention` of h / p heads over all of time on each device. The devices must divide the query heads."""
    num, g = lax.axis_size(axis), k.shape[2]
    copies = math.lcm(g, num) // g  # of a key-value head whose query heads lie on several devices

    def heads_for_time(x: Array) -> Array:
        return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)  # b T h/p k

    whole: Any = jax.tree.map(lambda x: lax.all_gather(x, axis, axis=1, tiled=True), segments)
    k, v = (heads_for_time(jnp.repeat(x, copies, axis=2)) for x in (k, v))
    o = attention(heads_for_time(q), k, v, whole)
    return lax.all_to_all(o, axis, split_axis=1, concat_axis=2, tiled=True)
