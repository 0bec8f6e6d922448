"""Product keys: the best of r^2 rows by comparing with 2 r half keys (Lample et al., 2019, arXiv:1907.05242).

Letters: n tokens, h heads, e width of a half key, r half keys of an axis, k rows per head.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ffns.memory.key_search import BLOCK, best_keys, chunk_of, in_chunks, top_k, with_gradient
from hybridlm.ffns.memory.minor_axis import pick


def product_top_k(
    queries: Float[Array, "n h e2"], keys: Float[Array, "2 h r e"], k: int
) -> tuple[Float[Array, "n h k"], Int[Array, "n h k"]]:
    """Scores and indices i r + j of the k rows with the largest q_1 . keys[0, h, i] + q_2 . keys[1, h, j], descending.

    Exact, as if all r^2 rows were compared; scores are float32. Between equal half scores the lower index goes first,
    between equal sums the pair whose first half ranks higher. Gradients flow through the selected scores alone.
    """
    half_queries = jnp.stack(jnp.split(queries, 2, axis=-1), axis=1)  # n 2 h e
    half_queries = half_queries.reshape(half_queries.shape[0], -1, half_queries.shape[-1])  # n 2h e
    half_keys = keys.reshape(-1, 1, *keys.shape[2:])  # 2h 1 r e
    num_heads, num_keys = keys.shape[1], keys.shape[2]

    one_rank = jnp.ones((half_keys.shape[0], 1, 1), jnp.float32)

    def search(queries: Float[Array, "n g e"]) -> tuple[Array, Array]:
        halves, indices = best_keys(queries, half_keys, one_rank, k)
        first, second = jnp.split(halves[:, :, 0], 2, axis=1)  # n h k
        row, column = best_pairs(first, second)
        picked = jnp.concatenate([pick(first, row), pick(second, column)], axis=1)
        at = jnp.concatenate([pick(indices[:, :num_heads], row), pick(indices[:, num_heads:], column)], axis=1)
        return picked, at

    chunk = chunk_of(2 * num_heads * (min(num_keys, BLOCK) + k))
    halves, at = in_chunks(search, half_queries, chunk)  # n 2h k
    halves = with_gradient(halves[:, :, None], half_queries, half_keys, at)[:, :, 0]
    first, second = jnp.split(halves, 2, axis=1)
    i, j = jnp.split(at, 2, axis=1)
    return first + second, i * num_keys + j


def best_pairs(
    first: Float[Array, "*n k"], second: Float[Array, "*n k"]
) -> tuple[Int[Array, "*n k"], Int[Array, "*n k"]]:
    """Positions (i, j) of the k largest first_i + second_j, both in descending order.

    (i, j) comes after the (i + 1)(j + 1) - 1 other pairs that are no worse in either part, so only those with
    (i + 1)(j + 1) <= k can be among the k best: 119 of 1,024 for k = 32, 645 of 16,384 for k = 128.
    """
    k = first.shape[-1]
    steps = staircase(k)
    sums = [
        (first[..., start:stop, None] + second[..., None, :width]).reshape(*first.shape[:-1], -1)
        for start, stop, width in steps
    ]
    _, at = top_k(jnp.concatenate(sums, axis=-1), k)
    row, column, offset = jnp.zeros_like(at), jnp.zeros_like(at), 0
    for start, stop, width in steps:
        local = at - offset
        down = ((local + 0.5) * (1.0 / width)).astype(jnp.int32)  # local // width, which vector units do slowly
        row = jnp.where(local >= 0, start + down, row)
        column = jnp.where(local >= 0, local - down * width, column)
        offset += (stop - start) * width
    return row, column


def staircase(k: int) -> list[tuple[int, int, int]]:
    """(start, stop, width): the pairs (i, j) with (i + 1)(j + 1) <= k are j < width for start <= i < stop."""
    steps, start = [], 0
    while start < k:
        width = k // (start + 1)
        stop = k // width
        steps.append((start, stop, width))
        start = stop
    return steps
