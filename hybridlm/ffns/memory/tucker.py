"""Tucker-decomposed scores of rows (Huang et al., 2025, arXiv:2411.12364, section 3).

A row (i, j) of a grid scores S_ij = sum_ab C_ab A_ai B_bj, with r scores A_a = q_row . keys_a,i by the keys of its
first axis and B_b likewise by those of its second. Here C is the sum of cores C_c, one for each block of a value.

Letters: n tokens, h heads, c cores, r ranks (a, b), g grid side, m and k selected, e key width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridlm.ffns.memory.key_search import BLOCK, best_keys, chunk_of, in_chunks, top_k, with_gradient
from hybridlm.ffns.memory.minor_axis import pick


def tucker_top_k(
    queries: Float[Array, "n 2 e"], keys: Float[Array, "2 h r g e"], cores: Float[Array, "h c r r"], k: int
) -> tuple[Float[Array, "n h c k"], Int[Array, "n h k"]]:
    """Of the k best rows that the search finds: the score by each core in float32, and the indices i g + j.

    Rows are searched where the k best i by u . A and the k best j by t . B cross; u t^T lambda is the best
    approximation of C of rank 1. There all scores are exact, and the k largest sums over cores win, in descending
    order. Gradients flow through the scores of the selected alone, to queries, keys and cores.
    """
    _, num_heads, ranks, side, width = keys.shape
    both = jnp.repeat(queries, num_heads, axis=1)  # n 2h e
    flat = keys.reshape(2 * num_heads, ranks, side, width)
    whole = jax.lax.stop_gradient(jnp.sum(cores, axis=1))
    u, _, t = leading(whole)
    basis = jnp.concatenate([u, t])  # 2h r r

    def search(queries: Float[Array, "n g e"]) -> tuple[Array, Array]:
        scores, at = best_keys(queries, flat, basis, k)
        first, second = jnp.split(scores, 2, axis=1)  # n h r m
        grid = combine(whole[:, None], first[..., :, None], second[..., None, :])[:, :, 0]  # n h m m
        _, best = top_k(grid.reshape(*grid.shape[:2], k * k), k)
        row = ((best + 0.5) * (1.0 / k)).astype(jnp.int32)  # best // k, which vector units do slowly
        places = jnp.concatenate([row, best - row * k], axis=1)  # n 2h k
        of_ranks = jnp.broadcast_to(places[:, :, None], (*scores.shape[:3], k))
        return pick(scores, of_ranks), pick(at, places)

    chunk = chunk_of(num_heads * (2 * (ranks + 1) * (min(side, BLOCK) + k) + 2 * k * k))
    scores, at = in_chunks(search, both, chunk)  # n 2h r k, n 2h k
    first, second = jnp.split(with_gradient(scores, both, flat, at), 2, axis=1)
    i, j = jnp.split(at, 2, axis=1)
    return combine(cores, first, second), i * side + j


def combine(
    cores: Float[Array, "h c r r"], first: Float[Array, "n h r ..."], second: Float[Array, "n h r ..."]
) -> Float[Array, "n h c ..."]:
    """sum_ab C_ab A_a B_b, by sums: a TPU would round the operands of a matmul to bfloat16."""
    ranks, rest = cores.shape[-1], first.ndim - 3
    weights = cores.reshape(*cores.shape, *(1,) * rest)
    products = (
        weights[:, :, a, b] * (first[:, :, None, a] * second[:, :, None, b]) for a in range(ranks) for b in range(ranks)
    )
    return functools.reduce(jnp.add, products)


def leading(matrices: Float[Array, "*n r r"]) -> tuple[Array, Array, Array]:
    """u [*n, r, r], lambda [*n, r], t [*n, r, r] with C = u diag(lambda) t^T, without gradient.

    Both signs of a pair (u, t) are right, but the search depends on it: sum(u) + sum(t) >= 0 for the first one. From
    positive cores, as they begin, that sign is continuous in C.
    """
    u, values, t = jnp.linalg.svd(jax.lax.stop_gradient(matrices))
    t = jnp.swapaxes(t, -1, -2)
    positive = jnp.sum(u[..., 0], axis=-1) + jnp.sum(t[..., 0], axis=-1) >= 0.0
    sign = jnp.where(positive, 1.0, -1.0)[..., None, None].astype(u.dtype)
    return u * sign, values, t * sign


def tucker_loss(cores: Float[Array, "h c r r"], margin: float) -> Float[Array, ""]:
    """1 / (r - 1) sum_{i >= 2} max(0, lambda_i - margin)^2, summed over heads: of what the search leaves out."""
    whole = jnp.sum(cores, axis=1)
    ranks = whole.shape[-1]
    if ranks == 1:
        return jnp.zeros(())
    u, _, t = leading(whole)
    values = jnp.sum(u * jnp.einsum("hab,hbi->hai", whole, t, precision=jax.lax.Precision.HIGHEST), axis=-2)  # h r
    return jnp.sum(jnp.square(jnp.maximum(values[:, 1:] - margin, 0.0))) / (ranks - 1)


@functools.cache
def first_score(side: int, k: int, ranks: int, num_cores: int) -> float:
    """Mean score by one core of the selected rows, for normal A and B of variance 1 and cores uniform in [0, 1].

    By 64 draws with a seed of their own: within 3 % of its expectation.
    """
    rng, draws = np.random.default_rng(0), 64
    cores = np.sum(rng.uniform(size=(draws, num_cores, ranks, ranks)), axis=1)
    u, _, t = np.linalg.svd(cores)
    found = []
    for core, of_rows, of_columns in zip(cores, u[:, :, 0], t[:, 0], strict=True):
        sign = math.copysign(1.0, of_rows.sum() + of_columns.sum())
        first, second = rng.standard_normal((2, ranks, side))
        i, j = (np.argsort(sign * (mix @ scores))[-k:] for mix, scores in ((of_rows, first), (of_columns, second)))
        grid = first[:, i].T @ core @ second[:, j]
        found.append(np.mean(np.sort(grid, axis=None)[-k:]))
    return float(np.mean(found)) / num_cores
