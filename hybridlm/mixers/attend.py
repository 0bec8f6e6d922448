"""Softmax attention over packed documents, with memory linear in the sequence length.

Training: JAX's splash attention (Pallas) on TPU; elsewhere blocks of queries, each against the keys its window reaches.
Decoding: against a ring of cached keys. Products and softmax come from `jax.nn.dot_product_attention`, except under a
logit soft cap, which it lacks.

Letters: b batch, t time, h query heads, g key-value heads, k head dim, s keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
from hybridlm_kernels.target import target_of
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

from hybridlm.mixers.base import Segments, State

QUERY_BLOCK = 256
"""Queries per block outside TPU: a block's scores at window 1024 are 256 x 1279 per head."""
SPLASH_BLOCK = 512
LANES = 128


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
) -> Float[Array, "b t h k"]:
    """Causal attention within each document. Outputs of padding tokens are finite and meaningless."""
    if target_of().platform == "tpu" and q.shape[1] >= LANES:
        return splash_attention(q, k, v, segments, window=window, soft_cap=soft_cap)
    return blocked_attention(q, k, v, segments, window=window, soft_cap=soft_cap)


def blocked_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Segments,
    *,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "b t h k"]:
    """Blocks of queries one after another; the backward pass recomputes each block's scores."""
    t = q.shape[1]
    if t <= QUERY_BLOCK:
        return _weigh_values(q, k, v, _training_mask(segments, segments, 0, 0, window), soft_cap)
    block, padding = QUERY_BLOCK, -t % QUERY_BLOCK
    # A block sees `before` keys ahead of it, or simply all keys where its window reaches that far.
    before = 0 if window is None or window - 1 + block >= t else window - 1
    span = before + block if before else t + padding
    ids, positions = (jnp.pad(x, ((0, 0), (before, padding))) for x in segments)
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (before, padding), (0, 0), (0, 0))) for x in (k, v))

    @jax.checkpoint
    def one_block(first: Array) -> Array:
        key_start = first if before else jnp.zeros_like(first)

        def cut(x: Array, start: Array, size: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        queries = Segments(cut(ids, first + before, block), cut(positions, first + before, block))
        keys = Segments(cut(ids, key_start, span), cut(positions, key_start, span))
        mask = _training_mask(queries, keys, first + before, key_start, window)
        return _weigh_values(cut(q, first, block), cut(k, key_start, span), cut(v, key_start, span), mask, soft_cap)

    blocks = jax.lax.map(one_block, jnp.arange(0, t + padding, block))  # n b block h k
    return jnp.moveaxis(blocks, 0, 1).reshape(q.shape)[:, :t]


def splash_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Segments,
    *,
    window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """JAX's Pallas kernel for TPU; skips the blocks outside the window. `interpret` runs it on any device."""
    t, head_dim = q.shape[1], q.shape[3]
    block = min(SPLASH_BLOCK, t + -t % LANES)
    time_padding, head_padding = -t % block, -head_dim % LANES
    # The kernel compares ids for equality: a document's first index is unique where its id may come twice.
    first = jnp.arange(t, dtype=jnp.int32) - segments.positions
    first = jnp.pad(jnp.where(segments.ids != 0, first, -1), ((0, 0), (0, time_padding)), constant_values=-1)
    q, k, v = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, time_padding), (0, 0), (0, head_padding))), 1, 2)
        for x in (q * head_dim**-0.5, k, v)
    )  # b h t k
    square = (t + time_padding, t + time_padding)
    mask = splash_mask.CausalMask(square) if window is None else splash_mask.LocalMask(square, (window - 1, 0), 0)
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
    o: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(first, first))
    return jnp.swapaxes(o, 1, 2)[:, :t, :, :head_dim].astype(v.dtype)


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
