"""Softmax attention over packed documents, with memory linear in the sequence length.

Training: JAX's splash attention (Pallas) on TPU; elsewhere blocks of queries, each against the keys its window reaches.
Decoding: against a ring of cached keys. Products and softmax come from `jax.nn.dot_product_attention`, except under a
logit soft cap, which it lacks.

Letters: b batch, t time, h query heads, g key-value heads, k head dim, s keys.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hybridlm_kernels.shards import Axis
from hybridlm_kernels.target import target_of
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

from hybridlm.mixers.attend_across import attend_across
from hybridlm.mixers.base import Segments, State

QUERY_BLOCK = 256
"""Queries per block outside TPU: a block's scores at window 1024 are 256 x 1279 per head."""
SPLASH_BLOCK = 512
MAX_GRID_STEPS = 2**18
"""Of the TPU kernel, which keeps 3 bytes of each in 1 MiB of scalar memory: 256k tokens without a window."""
LANES = 128
OF_PADDING = -(2**31)
"""What padding has in place of its document's first index."""


def attended_tokens(length: int, window: int | None) -> float:
    """Keys that a query sees, averaged over the positions of a sequence of `length`."""
    w = length if window is None else min(window, length)
    return w - w * (w - 1) / (2 * length)


def attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Segments,
    *,
    window: int | None,
    soft_cap: float | None,
    axis: Axis | None = None,
) -> Float[Array, "b t h k"]:
    """Causal attention within each document. Outputs of padding tokens are finite and meaningless.

    Inside a `jax.shard_map` whose devices hold stretches of one sequence, `axis` names the mesh axes it is cut over.
    """
    num = 1 if axis is None else jax.lax.axis_size(axis)
    if window is not None and window >= num * q.shape[1]:
        window = None
    attention = partial(_attend_keys, window=window, soft_cap=soft_cap)
    if axis is None or num == 1:
        return attention(q, k, v, segments)
    return attend_across(attention, q, k, v, segments, window=window, axis=axis)


def _attend_keys(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    segments: Segments,
    *,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "b t h k"]:
    on_tpu = target_of().platform == "tpu" and q.shape[1] >= LANES
    return (splash_attention if on_tpu else blocked_attention)(q, k, v, segments, window=window, soft_cap=soft_cap)


def blocked_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    segments: Segments,
    *,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "b t h k"]:
    """Blocks of queries one after another; the backward pass recomputes each block's scores.

    The last t of the s keys and segments are the queries' own; those before them, fewer than the window, come first.
    """
    t, before = q.shape[1], k.shape[1] - q.shape[1]
    if t <= QUERY_BLOCK:
        queries = Segments(*(x[:, before:] for x in segments))
        return _weigh_values(q, k, v, _training_mask(queries, segments, before, 0, window), soft_cap)
    block, padding = QUERY_BLOCK, -t % QUERY_BLOCK
    if window is None or window - 1 + block >= before + t:  # a block sees all keys
        lead, stride, span = 0, 0, before + t + padding
    else:  # the keys that its window reaches
        lead, stride, span = window - 1 - before, 1, window - 1 + block
    ids, positions = (jnp.pad(x, ((0, 0), (lead, padding))) for x in segments)
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (lead, padding), (0, 0), (0, 0))) for x in (k, v))

    @jax.checkpoint
    def one_block(first: Array) -> Array:
        query_start, key_start = lead + before + first, stride * first

        def cut(x: Array, start: Array, size: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        queries = Segments(cut(ids, query_start, block), cut(positions, query_start, block))
        keys = Segments(cut(ids, key_start, span), cut(positions, key_start, span))
        mask = _training_mask(queries, keys, query_start, key_start, window)
        return _weigh_values(cut(q, first, block), cut(k, key_start, span), cut(v, key_start, span), mask, soft_cap)

    blocks = jax.lax.map(one_block, jnp.arange(0, t + padding, block))  # n b block h k
    return jnp.moveaxis(blocks, 0, 1).reshape(q.shape)[:, :t]


def splash_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    segments: Segments,
    *,
    window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """JAX's Pallas kernel for TPU; skips the blocks outside the window. `interpret` runs it on any device.

    Queries that make too large a grid of blocks are halved. The last t of the s keys and segments are the queries' own.
    """
    t, before, head_dim = q.shape[1], k.shape[1] - q.shape[1], q.shape[3]
    block = min(SPLASH_BLOCK, t + -t % LANES)
    reach = before + t if window is None else min(window, before + t)
    if t > block and -(-t // block) * -(-reach // block) > MAX_GRID_STEPS:
        half = block * (t // block // 2 or 1)
        halves = []
        for start, stop in ((0, half), (half, t)):
            first_key = 0 if window is None else max(0, before + start - window + 1)
            ends = (first_key, before + stop)
            keys = [jax.tree.map(lambda x, ends=ends: x[:, slice(*ends)], part) for part in (k, v, segments)]
            attention = partial(splash_attention, window=window, soft_cap=soft_cap, interpret=interpret)
            halves.append(attention(q[:, start:stop], *keys))
        return jnp.concatenate(halves, axis=1)
    query_padding, head_padding = -t % block, -head_dim % LANES
    key_padding = query_padding + -before % block  # a padded query, too, has its own key: no row of scores is empty
    # The kernel compares ids for equality: a document's first index is unique where its id may come twice. It counts
    # from the first query, so it may be negative.
    first = jnp.arange(-before, t, dtype=jnp.int32) - segments.positions
    first = jnp.where(segments.ids != 0, first, OF_PADDING)
    ids = (
        jnp.pad(x, ((0, 0), (0, padding)), constant_values=OF_PADDING)
        for x, padding in ((first[:, before:], query_padding), (first, key_padding))
    )
    q, k, v = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, head_padding))), 1, 2)
        for x, padding in ((q * head_dim**-0.5, query_padding), (k, key_padding), (v, key_padding))
    )  # b h t k
    mask = Band((q.shape[2], k.shape[2]), (None if window is None else window - 1, 0), offset=before)
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * q.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    o: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(*ids))
    return jnp.swapaxes(o, 1, 2)[:, :t, :, :head_dim].astype(v.dtype)


class Band(splash_mask.LocalMask):
    """JAX's mask of a window, with one value for a block that lies wholly within it or outside.

    When it is traced the kernel asks every block for any and all of its pairs; comparing all pairs of 128k tokens takes
    45 s.
    """

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        queries, keys = idx
        nearest = queries.start + self.offset - (keys.stop - 1)
        farthest = queries.stop - 1 + self.offset - keys.start
        reach = np.inf if self.window_size[0] is None else self.window_size[0]
        within, outside = nearest >= 0 and farthest <= reach, farthest < 0 or nearest > reach
        if within or outside:
            return np.full((1, 1), within)
        return super().__getitem__(idx)


def _training_mask(
    queries: Segments, keys: Segments, query_start: int | Array, key_start: int | Array, window: int | None
) -> Bool[Array, "b t s"]:
    """Same document, not after the query, within the window. Both starts count from the same origin."""
    distance = (
        query_start + jnp.arange(queries.ids.shape[1])[:, None] - key_start - jnp.arange(keys.ids.shape[1])[None, :]
    )
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    # In one document positions advance with the tokens; from one document to the next they never do.
    same = distance == queries.positions[:, :, None] - keys.positions[:, None, :]
    return visible & same & (keys.ids != 0)[:, None, :]


def _weigh_values(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    mask: Bool[Array, "b t s"],
    soft_cap: float | None,
) -> Float[Array, "b t h k"]:
    """Softmax attention under a mask, scores in float32. A query that sees nothing gets the mean of all values."""
    if soft_cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])  # b t g r k
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=jnp.float32) * k.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None], soft_cap * jnp.tanh(scores / soft_cap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(q.shape)


def attend_cached(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Segments,
    state: State,
    *,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Float[Array, "b t h k"], State]:
    """Attention of new tokens over the cache and themselves, and the cache with them in it.

    A token's document is known by where it started: order - position, where order counts the row's real tokens.
    """
    real = segments.ids != 0
    order = state["count"][:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    start = order - segments.positions
    new = {"k": k, "v": v, "start": jnp.where(real, start, -1), "order": order}
    keys = {name: jnp.concatenate([state[name].astype(x.dtype), x], axis=1) for name, x in new.items()}
    distance = order[:, :, None] - keys["order"][:, None, :]
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    same = (keys["start"][:, None, :] == start[:, :, None]) & (keys["start"] >= 0)[:, None, :]
    o = _weigh_values(q, keys["k"], keys["v"], visible & same, soft_cap)
    # The last `slots` real tokens take their places in the ring; the index of the others falls outside and is dropped.
    slots = state["order"].shape[1]
    count = order[:, -1] + 1
    kept = real & (order >= count[:, None] - slots)
    slot = jnp.where(kept, order % slots, slots)
    rows = jnp.arange(q.shape[0])[:, None]
    updated = {
        name: state[name].at[rows, slot].set(x.astype(state[name].dtype), mode="drop") for name, x in new.items()
    }
    return o, {**updated, "count": count}
