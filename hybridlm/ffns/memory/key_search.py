"""The best keys of each query, and the gradients of their scores, with keys in blocks and tokens in chunks.

No array here has both all tokens and all keys. Letters: n tokens, g groups of keys (an axis of a head each), c ranks,
r keys, e key width, k selected keys.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ffns.memory.minor_axis import pick, spread

BLOCK = 1024
"""Keys that are scored at a time."""
CHUNK_BYTES = 16 * 2**20
"""Of the scores that are held at a time: little enough for a TPU's vector memory, and enough for the 128 tokens that a
matrix unit wants, with four heads and keys in blocks of 1,024."""


def in_chunks(f: Callable[..., Any], operands: Any, chunk: int) -> Any:
    """f(operands) with at most `chunk` tokens at a time; operands and results are pytrees with the token axis first.

    Where the chunks do not divide the tokens, zeros are appended and what belongs to them is left out of the result.
    """
    n = jax.tree.leaves(operands)[0].shape[0]
    if n <= chunk:
        return f(operands)
    parts = jax.tree.map(lambda x: _chunked(x, chunk), operands)
    results = jax.lax.map(f, parts)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:n], results)


def _chunked(x: Array, chunk: int) -> Array:
    missing = -x.shape[0] % chunk
    padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
    return padded.reshape(-1, chunk, *x.shape[1:])


def chunk_of(floats_per_token: int) -> int:
    """Tokens of one chunk, a power of two."""
    fitting = max(CHUNK_BYTES // (4 * floats_per_token), 8)
    return 1 << (fitting.bit_length() - 1)


def block_scores(queries: Float[Array, "n g e"], keys: Float[Array, "g c r e"]) -> Float[Array, "n g c r"]:
    """float32 scores by operands in the queries' dtype."""
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    scores = jnp.einsum("nge,gcre->gncr", queries, keys.astype(queries.dtype), preferred_element_type=wide)
    return jnp.swapaxes(scores, 0, 1)


def best_keys(
    queries: Float[Array, "n g e"], keys: Float[Array, "g c r e"], basis: Float[Array, "g c c"], k: int
) -> tuple[Float[Array, "n g c k"], Int[Array, "n g k"]]:
    """Of the keys with the k largest basis[g, :, 0] . s, where s = q_g . keys_g,r in all ranks: s, and their indices.

    `basis` is orthogonal. In descending order, equal ones with the lower index first. No gradient flows (see
    `with_gradient`), and all tokens are searched at once: the caller cuts them into chunks.
    """
    queries, keys, basis = jax.lax.stop_gradient((queries, keys, basis))
    num_keys, ranks = keys.shape[2], keys.shape[1]
    block = min(max(BLOCK, k), num_keys)

    def scored(start: Int[Array, ""] | int) -> Float[Array, "n g c r"]:
        scores = block_scores(queries, jax.lax.dynamic_slice_in_dim(keys, start, block, axis=2))
        return turned(scores, jnp.swapaxes(basis, 1, 2))

    def best_of(scores: Float[Array, "n g c r"], compared: Float[Array, "n g r"]) -> tuple[Array, Array]:
        """`compared` is the first rank of `scores`, so that only the others are looked up."""
        values, at = top_k(compared, k)
        if ranks == 1:
            return values[:, :, None], at
        rest = pick(scores[:, :, 1:], jnp.broadcast_to(at[:, :, None], (*scores.shape[:2], ranks - 1, k)))
        return jnp.concatenate([values[:, :, None], rest], axis=2), at

    def step(best: tuple[Array, Array], first: Int[Array, ""]) -> tuple[tuple[Array, Array], None]:
        start = jnp.minimum(first, num_keys - block)
        scores = jnp.concatenate([best[0], scored(start)], axis=-1)
        # The last block overlaps the one before it.
        places = jnp.arange(k + block)
        seen = (places >= k) & (places < k + first - start)
        scores, at = best_of(scores, jnp.where(seen, -jnp.inf, scores[:, :, 0]))
        indices = jnp.where(at < k, pick(best[1], jnp.minimum(at, k - 1)), start + at - k)
        return (scores, indices), None

    scores = scored(0)
    best = best_of(scores, scores[:, :, 0])
    if block < num_keys:
        best, _ = jax.lax.scan(step, best, jnp.arange(block, num_keys, block, dtype=jnp.int32))
    return turned(best[0], basis), best[1]


def turned(scores: Float[Array, "n g c k"], basis: Float[Array, "g c c"]) -> Float[Array, "n g c k"]:
    """basis s, by sums: a TPU would round the operands of a matmul to bfloat16."""
    ranks = scores.shape[2]
    if ranks == 1:
        return scores * basis[:, :, :1]
    return sum(
        (basis[:, :, a, None] * scores[:, :, None, a] for a in range(1, ranks)),
        basis[:, :, 0, None] * scores[:, :, None, 0],
    )


def top_k(x: Float[Array, "*n r"], k: int) -> tuple[Float[Array, "*n k"], Int[Array, "*n k"]]:
    """`jax.lax.top_k` whose results may be sliced. XLA merges such slices with those that it knows a top-k by, and then
    sorts: on CPU 2.5 s instead of 0.2 (4,096 tokens, 8 axes of 512 keys, k = 32)."""
    values, at = jax.lax.top_k(x, k)
    # One barrier each: XLA makes one barrier of both of the top-k's tuple, which its own next pass does not expect.
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(at)


@jax.custom_vjp
def with_gradient(
    scores: Float[Array, "n g c k"],
    queries: Float[Array, "n g e"],
    keys: Float[Array, "g c r e"],
    indices: Int[Array, "n g k"],
) -> Float[Array, "n g c k"]:
    """`scores`, which are those of the keys at `indices`, with the gradients of queries and keys that this entails."""
    return scores


def _forward(scores: Array, queries: Array, keys: Array, indices: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return scores, (queries, keys, indices)


def _backward(saved: tuple[Array, Array, Array], d_scores: Array) -> tuple[Array, Array, Array, None]:
    queries, keys, indices = saved
    d_queries, d_keys = search_gradients(queries, keys, indices, d_scores)
    return jnp.zeros_like(d_scores), d_queries, d_keys, None


with_gradient.defvjp(_forward, _backward)


def search_gradients(
    queries: Float[Array, "n g e"],
    keys: Float[Array, "g c r e"],
    indices: Int[Array, "n g k"],
    d_scores: Float[Array, "n g c k"],
) -> tuple[Float[Array, "n g e"], Float[Array, "g c r e"]]:
    """d_q = sum_ck d_ck keys[c, i_k], d_keys[c, i] = sum over the selections of i of d_ck q, by matmuls over blocks.

    The cotangents of a chunk of tokens are first laid out over a block of keys: zeros where a key was not selected.
    """
    num_groups, ranks, num_keys, _ = keys.shape
    block = min(BLOCK, num_keys)
    firsts = jnp.arange(0, num_keys, block, dtype=jnp.int32)
    wide = d_scores.dtype
    chunk = min(chunk_of(num_groups * ranks * block), queries.shape[0])

    def of_chunk(d_keys: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        queries, indices, d_scores = part

        def of_block(sums: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
            d_queries, d_keys = sums
            start = jnp.minimum(first, num_keys - block)
            own = jnp.where(indices >= first, indices - start, -1)  # the last block overlaps the one before it
            at = jnp.broadcast_to(own[:, :, None], d_scores.shape)
            laid_out = spread(d_scores.astype(queries.dtype), at, block)
            of_keys = jax.lax.dynamic_slice_in_dim(keys, start, block, axis=2)
            d_queries += jnp.einsum(
                "ngcr,gcre->nge", laid_out, of_keys.astype(queries.dtype), preferred_element_type=wide
            )
            d_of_keys = jnp.einsum("ngcr,nge->gcre", laid_out, queries, preferred_element_type=wide)
            d_of_keys += jax.lax.dynamic_slice_in_dim(d_keys, start, block, axis=2)
            return (d_queries, jax.lax.dynamic_update_slice_in_dim(d_keys, d_of_keys, start, axis=2)), None

        (d_queries, d_keys), _ = jax.lax.scan(of_block, (jnp.zeros(queries.shape, wide), d_keys), firsts)
        return d_keys, d_queries.astype(queries.dtype)

    parts = _chunked(queries, chunk), _chunked(indices, chunk), _chunked(d_scores, chunk)
    d_keys, d_queries = jax.lax.scan(of_chunk, jnp.zeros(keys.shape, wide), parts)
    return d_queries.reshape(-1, *queries.shape[1:])[: queries.shape[0]], d_keys.astype(keys.dtype)
