"""Product-key search against a comparison with all rows, its gradients, and the memory it compiles to.

Letters: n tokens, h heads, e width of a half key, r half keys of an axis, k rows per head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.ffns.memory import key_search
from hybridlm.ffns.memory.key_search import search_gradients
from hybridlm.ffns.memory.minor_axis import (
    pick,
    pick_by_comparison,
    pick_by_matmul,
    spread,
    spread_by_comparison,
    spread_by_matmul,
)
from hybridlm.ffns.memory.product_keys import best_pairs, product_top_k, staircase

VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2 of float32 against float64
SHAPES = {  # n, h, r, e, k
    "one block": (13, 3, 37, 6, 5),
    "k = r": (11, 1, 8, 4, 8),
    "k = 1": (7, 2, 9, 5, 1),
    "blocks that overlap": (19, 2, 29, 3, 8),
    "blocks and chunks": (150, 1, 24, 2, 3),
}
shapes = pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
search = jax.jit(product_top_k, static_argnums=2)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 12 keys and chunks of a few tokens, so that small sizes have several of both."""
    monkeypatch.setattr(key_search, "BLOCK", 12)
    monkeypatch.setattr(key_search, "CHUNK_BYTES", 4096)


def inputs(rng: np.random.Generator, n: int, h: int, r: int, e: int) -> tuple[np.ndarray, np.ndarray]:
    return (
        rng.standard_normal((n, h, 2 * e)).astype(np.float32),
        rng.standard_normal((2, h, r, e)).astype(np.float32),
    )


def all_scores(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[n, h, r^2], of every row."""
    first, second = (
        np.einsum("nhe,hre->nhr", half, of_keys)
        for half, of_keys in zip(np.split(np.float64(queries), 2, axis=-1), np.float64(keys), strict=True)
    )
    return (first[..., :, None] + second[..., None, :]).reshape(*first.shape[:2], -1)


def distance(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@shapes
@pytest.mark.usefixtures("small_blocks")
def test_search_equals_a_comparison_with_all_rows(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    *sizes, k = shape
    queries, keys = inputs(rng, *sizes)
    scores, indices = jax.jit(lambda q, keys: product_top_k(q, keys, k))(queries, keys)
    every = all_scores(queries, keys)
    best = np.argsort(-every, axis=-1)[..., :k]
    np.testing.assert_array_equal(indices, best)
    assert distance(scores, np.take_along_axis(every, best, axis=-1)) < VALUE_TOLERANCE


def test_search_with_whole_blocks_equals_a_comparison_with_all_rows(rng: np.random.Generator) -> None:
    queries, keys = inputs(rng, 3, 1, 1100, 4)
    _, indices = search(queries, keys, 16)
    np.testing.assert_array_equal(indices, np.argsort(-all_scores(queries, keys), axis=-1)[..., :16])


@shapes
@pytest.mark.usefixtures("small_blocks")
def test_gradients_equal_those_of_a_comparison_with_all_rows(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    *sizes, k = shape
    queries, keys = inputs(rng, *sizes)
    cotangent = rng.standard_normal((sizes[0], sizes[1], k)).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda q, keys: jnp.vdot(product_top_k(q, keys, k)[0], cotangent), argnums=(0, 1)))
    for got, want in zip(gradients(queries, keys), oracle_gradients(queries, keys, cotangent), strict=True):
        assert distance(got, want) < GRADIENT_TOLERANCE


def oracle_gradients(queries: np.ndarray, keys: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token, head and row at a time."""
    n, h, k = cotangent.shape
    best = np.argsort(-all_scores(queries, keys), axis=-1)[..., :k]
    halves = np.stack(np.split(np.float64(queries), 2, axis=-1))  # 2 n h e
    d_halves, d_keys = np.zeros(halves.shape), np.zeros(keys.shape)
    for token, head, place in np.ndindex(n, h, k):
        for axis, key in enumerate(divmod(best[token, head, place], keys.shape[2])):
            d_halves[axis, token, head] += cotangent[token, head, place] * keys[axis, head, key]
            d_keys[axis, head, key] += cotangent[token, head, place] * halves[axis, token, head]
    return np.concatenate(list(d_halves), axis=-1), d_keys


def test_equal_half_scores_go_to_the_lower_index() -> None:
    queries = np.ones((1, 1, 2), np.float32)
    keys = np.array([3, 5, 5, 1, 2, 4, 2, 4], np.float32).reshape(2, 1, 4, 1)
    scores, indices = search(queries, keys, 4)
    np.testing.assert_array_equal(scores[0, 0], [9, 9, 9, 9])
    np.testing.assert_array_equal(indices[0, 0], [1 * 4 + 1, 1 * 4 + 3, 2 * 4 + 1, 2 * 4 + 3])


def test_scores_of_bfloat16_queries_are_float32(rng: np.random.Generator) -> None:
    queries, keys = inputs(rng, 30, 2, 25, 16)
    narrow = jnp.asarray(queries, jnp.bfloat16), jnp.asarray(keys, jnp.bfloat16)
    scores, indices = search(narrow[0], keys, 4)
    assert scores.dtype == jnp.float32
    want = all_scores(*(np.asarray(x, np.float64) for x in narrow))
    assert distance(scores, np.take_along_axis(want, np.asarray(indices), axis=-1)) < VALUE_TOLERANCE
    cotangent = rng.standard_normal(scores.shape).astype(np.float32)
    run = jax.jit(jax.grad(lambda q, keys: jnp.vdot(product_top_k(q, keys, 4)[0], cotangent), argnums=(0, 1)))
    for got, want in zip(run(narrow[0], keys), run(np.float32(narrow[0]), np.float32(narrow[1])), strict=True):
        assert distance(got, want) < 1e-2


@pytest.mark.parametrize("k", [1, 2, 7, 32, 100])
def test_pairs_under_the_staircase_hold_the_best(k: int, rng: np.random.Generator) -> None:
    # Few values, so that most sums are equal to others: the choice is then by rank, as among all k^2 pairs.
    first, second = -np.sort(-rng.integers(0, 9, (2, 25, k)).astype(np.float32), axis=-1)
    row, column = jax.jit(best_pairs)(first, second)
    best = np.argsort(-(first[:, :, None] + second[:, None, :]).reshape(25, -1), axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.asarray(row) * k + np.asarray(column), best)
    inside = {(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k}
    assert {(i, j) for start, stop, width in staircase(k) for i in range(start, stop) for j in range(width)} == inside


@pytest.mark.parametrize("size", [11, 300])
@pytest.mark.parametrize("f", [pick, pick_by_comparison, pick_by_matmul])
def test_pick_reads_at_positions(f: Callable[..., Any], size: int, rng: np.random.Generator) -> None:
    values = rng.standard_normal((5, 3, size)).astype(np.float32)
    positions = rng.integers(0, size, (5, 3, 6), np.int32)
    np.testing.assert_array_equal(jax.jit(f)(values, positions), np.take_along_axis(values, positions, axis=-1))


@pytest.mark.parametrize("size", [7, 300])
@pytest.mark.parametrize("f", [spread, spread_by_comparison, spread_by_matmul])
def test_spread_adds_at_positions(f: Callable[..., Any], size: int, rng: np.random.Generator) -> None:
    values = rng.standard_normal((5, 3, 11)).astype(np.float32)
    positions = rng.integers(-2, size + 2, (5, 3, 11), np.int32)
    want = np.zeros((5, 3, size))
    for at in np.ndindex(values.shape):
        if 0 <= positions[at] < size:
            want[(*at[:2], positions[at])] += values[at]
    got = jax.jit(functools.partial(f, size=size))(values, positions)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("differentiated", [False, True])
def test_temporaries_do_not_grow_with_tokens_times_keys(differentiated: bool) -> None:
    n, h, r, e, k = 4096, 2, 4096, 32, 8
    queries, keys = jax.ShapeDtypeStruct((n, h, 2 * e), jnp.float32), jax.ShapeDtypeStruct((2, h, r, e), jnp.float32)
    run: Any = functools.partial(product_top_k, k=k)
    if differentiated:
        run = jax.grad(lambda q, keys: jnp.sum(product_top_k(q, keys, k)[0]), argnums=(0, 1))
    temporary = jax.jit(run).lower(queries, keys).compile().memory_analysis().temp_size_in_bytes
    of_tokens, of_keys = 4 * n * h * (2 * e + 6 * k), 4 * 2 * h * r * e
    assert temporary < 4 * key_search.CHUNK_BYTES + 6 * of_tokens + 4 * of_keys
    assert temporary < 4 * n * h * r / 2  # of one axis' scores, half


def test_gradients_of_keys_that_none_selects_are_zero(rng: np.random.Generator) -> None:
    queries, keys = inputs(rng, 6, 1, 20, 3)
    indices = np.full((6, 2, 1), 7, np.int32)
    halves = queries.reshape(6, 2, 3)
    cotangent = np.ones((6, 2, 1, 1), np.float32)
    _, d_keys = jax.jit(search_gradients)(halves, keys.reshape(2, 1, 20, 3), indices, cotangent)
    d_keys = np.asarray(d_keys)
    assert np.all(np.delete(d_keys, 7, axis=2) == 0.0)
    np.testing.assert_allclose(d_keys[:, 0, 7], np.sum(halves, axis=0), rtol=1e-5)
