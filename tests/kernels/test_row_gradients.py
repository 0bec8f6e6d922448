"""Gradients of used rows and the usage of rows against loops over pairs in float64.

Letters: t tokens, k rows per token, n rows of the table, v row width.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels.memory_lookup.row_gradients import (
    apply_row_gradients,
    row_usage,
    squared_row_gradients,
    usage_metrics,
)

N, T, K, V = 23, 9, 4, 6
PATTERNS = {
    "random": lambda rng: rng.integers(0, N, (T, K)),
    "others among them": lambda rng: rng.integers(-N, 2 * N, (T, K)),
    "one row has all": lambda rng: np.full((T, K), N - 1),
    "one row twice in each token": lambda rng: np.repeat(rng.integers(0, N, (T, K // 2)), 2, axis=1),
    "two rows": lambda rng: np.where(rng.random((T, K)) < 0.5, 0, N - 1),
    "one pair": lambda rng: np.where(np.arange(T * K).reshape(T, K) == 17, 5, N),
    "none": lambda rng: np.where(rng.random((T, K)) < 0.5, -1, N),
    "the last pairs are outside": lambda rng: np.where(np.arange(T)[:, None] < 7, rng.integers(0, N, (T, K)), N),
}
CHUNKS = (1, 2, 3, 7, T * K, None)
TOLERANCE = 1e-6  # relative L2 against float64: sums in float32


def operands(rng, pattern):
    weights, vectors = rng.normal(size=(T, K)), rng.normal(size=(T, V))
    return (
        jnp.asarray(PATTERNS[pattern](rng), jnp.int32),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(vectors, jnp.float32),
    )


def oracle(indices, weights, vectors):
    """The dense gradient, and which rows are used."""
    weights, vectors = np.asarray(weights, np.float64), np.asarray(vectors, np.float64)
    gradient, used = np.zeros((N, V)), np.zeros(N, bool)
    for t, rows in enumerate(np.asarray(indices)):
        for k, row in enumerate(rows):
            if 0 <= row < N:
                gradient[row] += weights[t, k] * vectors[t]
                used[row] = True
    return gradient, used


def close(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) <= TOLERANCE * max(np.linalg.norm(want), 1e-30)


@partial(jax.jit, static_argnames="chunk")
def change(state, indices, weights, vectors, chunk):
    """Writes each row's gradient and number, and counts how often it is seen."""

    def update(rows, grads, ids):
        return {"seen": rows["seen"] + 1, "id": ids, "table": grads, "offset": rows["offset"] - grads.reshape(-1, 2, 3)}

    return apply_row_gradients(state, indices, weights, vectors, update, chunk=chunk)


def state_of(rng):
    table, offset = rng.normal(size=(N, V)), rng.normal(size=(N, 2, 3))
    return {
        "seen": jnp.zeros(N, jnp.int32),
        "id": jnp.full(N, -1),
        "table": jnp.asarray(table, jnp.float32),
        "offset": jnp.asarray(offset, jnp.float32),
    }


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_each_used_row_gets_its_whole_gradient_once_and_others_stay(rng, chunk, pattern):
    given, state = operands(rng, pattern), state_of(rng)
    gradient, used = oracle(*given)
    new = change(state, *given, chunk)
    np.testing.assert_array_equal(new["seen"], used)
    np.testing.assert_array_equal(new["id"], np.where(used, np.arange(N), -1))
    assert close(new["table"][used], gradient[used])
    assert close(new["offset"][used].reshape(-1, V), np.asarray(state["offset"])[used].reshape(-1, V) - gradient[used])
    for name in ("table", "offset"):
        np.testing.assert_array_equal(new[name][~used], state[name][~used])


@pytest.mark.parametrize("pattern", ["others among them", "none"])
def test_padding_has_distinct_ids_past_the_table_and_no_gradient(rng, pattern):
    given = operands(rng, pattern)
    gradient, used = oracle(*given)
    seen = []
    with jax.disable_jit():
        apply_row_gradients(
            jnp.zeros((N, V)), *given, lambda rows, grads, ids: seen.append((ids, grads)) or rows, chunk=5
        )
    assert bool(seen) == bool(used.any())
    for ids, grads in seen:
        assert (np.diff(ids) > 0).all()
        np.testing.assert_array_equal(grads[ids >= N], 0)
    assert close(sum(float(jnp.sum(grads)) for _, grads in seen), gradient.sum())


def test_squares_are_those_of_the_dense_gradient(rng):
    given = operands(rng, "others among them")
    want = np.sum(oracle(*given)[0] ** 2)
    for chunk in (3, None):
        assert float(squared_row_gradients(N, *given, chunk=chunk)) == pytest.approx(want, rel=TOLERANCE)


def test_bfloat16_vectors_are_summed_in_float32(rng):
    indices, weights, vectors = operands(rng, "two rows")
    vectors = vectors.astype(jnp.bfloat16)
    gradient, used = oracle(indices, weights, vectors)
    new = apply_row_gradients(jnp.zeros((N, V)), indices, weights, vectors, lambda rows, grads, ids: grads, chunk=7)
    assert close(new, gradient)


def test_chunks_do_not_change_what_is_not_finite_elsewhere(rng):
    """A token whose vector is not finite spoils the rows that it uses, and a pair without a row spoils none."""
    indices, weights, vectors = operands(rng, "the last pairs are outside")
    vectors = vectors.at[T - 1].set(jnp.nan).at[0].set(jnp.inf)
    spoiled = np.isin(np.arange(N), indices[0])
    for chunk in (3, None):
        new = apply_row_gradients(jnp.zeros((N, V)), indices, weights, vectors, lambda r, grads, i: grads, chunk=chunk)
        np.testing.assert_array_equal(~np.isfinite(new).all(axis=1), spoiled)


@pytest.mark.parametrize("row", [(512,), (4, 128)])
def test_a_donated_table_is_changed_in_place(row):
    n, (t, k) = 2**16, (128, 32)

    def update(rows, grads, ids):
        table, total = rows
        return table - grads.reshape(table.shape), total + jnp.mean(grads * grads, axis=1)

    @partial(jax.jit, donate_argnums=0)
    def step(state, indices, weights, vectors):
        return apply_row_gradients(state, indices, weights, vectors, update, chunk=256)

    struct = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    state, pairs = (struct((n, *row)), struct((n,))), (t, k)
    compiled = step.lower(state, jax.ShapeDtypeStruct(pairs, jnp.int32), struct(pairs), struct((t, 512))).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    table = n * 512 * 4  # 128 MiB
    assert memory.alias_size_in_bytes == table + n * 4
    assert memory.temp_size_in_bytes < table / 50


def usage_oracle(indices, weights, num_rows, num_pools):
    """Share of the rows that are used and divergence from uniform, pool by pool."""
    s, used = np.zeros(num_rows), np.zeros(num_rows)
    for row, weight in zip(indices.ravel(), np.asarray(weights, np.float64).ravel(), strict=True):
        if 0 <= row < num_rows:
            s[row] += abs(weight)
            used[row] = 1
    shares, divergences = [], []
    for of_pool, used_of_pool in zip(s.reshape(num_pools, -1), used.reshape(num_pools, -1), strict=True):
        z = of_pool / of_pool.sum() if of_pool.any() else np.eye(len(of_pool))[0]
        shares.append(used_of_pool.mean())
        divergences.append(np.log(len(z)) + sum(p * np.log(p) for p in z if p > 0))
    return shares, divergences


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("num_rows", "num_pools"), [(N, 1), (N - 2, 3)])
def test_usage_counts_rows_and_measures_their_distance_from_uniform(rng, pattern, num_rows, num_pools):
    indices, weights, _ = operands(rng, pattern)
    metrics = usage_metrics(row_usage(indices, weights, num_rows, num_pools), num_rows // num_pools)
    wanted = usage_oracle(np.asarray(indices), weights, num_rows, num_pools)
    for got, want in zip(metrics, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_even_use_has_no_divergence_and_a_single_row_has_the_largest():
    every = jnp.arange(12).reshape(4, 3)
    share, divergence = usage_metrics(row_usage(every, jnp.full((4, 3), -0.3), 12), 12)
    assert float(share[0]) == 1 and float(divergence[0]) == pytest.approx(0, abs=1e-6)
    share, divergence = usage_metrics(row_usage(every * 0 + 7, jnp.ones((4, 3)), 12), 12)
    assert float(share[0]) == pytest.approx(1 / 12) and float(divergence[0]) == pytest.approx(np.log(12), rel=1e-6)


def test_usage_of_many_rows_is_added_up_precisely(rng):
    n = 2**18
    indices = rng.integers(0, n, (2**12, 32))
    _, divergence = usage_metrics(row_usage(jnp.asarray(indices), jnp.full(indices.shape, 1 / 32), n), n)
    z = np.bincount(indices.ravel(), minlength=n) / indices.size
    want = np.log(n) + np.sum(z[z > 0] * np.log(z[z > 0]))
    assert float(divergence[0]) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("parts", [(7, 7, 7), (10, 1, 10)])
def test_usage_of_devices_with_different_rows_adds_up(rng, parts):
    indices, weights, _ = operands(rng, "others among them")
    whole = row_usage(indices, weights, N - 2, 3)
    firsts = np.cumsum((0, *parts))
    usages = [
        row_usage(indices - first, weights, N - 2, 3, first_row=first, num_local=part)
        for first, part in zip(firsts, parts, strict=False)
    ]
    for want, *got in zip(whole, *usages, strict=True):
        np.testing.assert_allclose(sum(got), want, rtol=1e-6)


def test_a_clipped_step_sorts_once():
    @jax.jit
    def step(table, indices, weights, vectors):
        squares = squared_row_gradients(N, indices, weights, vectors)
        return apply_row_gradients(table, indices, weights, vectors, lambda rows, grads, ids: rows - grads / squares)

    struct = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    given = struct((N, V)), jax.ShapeDtypeStruct((T, K), jnp.int32), struct((T, K)), struct((T, V))
    assert step.lower(*given).compile().as_text().count(" sort(") == 1


def test_what_does_not_fit_is_named(rng):
    indices, weights, vectors = operands(rng, "random")

    def call(state=None, indices=indices, weights=weights, vectors=vectors):
        state = jnp.zeros((N, V)) if state is None else state
        return apply_row_gradients(state, indices, weights, vectors, lambda rows, grads, ids: rows)

    with pytest.raises(ValueError, match=r"^state: shapes \(23, 6\), \(22,\) must all begin with"):
        call(state=(jnp.zeros((N, V)), jnp.zeros(N - 1)))
    with pytest.raises(ValueError, match=r"^state: shapes of nothing"):
        call(state={})
    with pytest.raises(ValueError, match=r"^indices: shape \(36,\) must be \[tokens, rows per token\]"):
        call(indices=indices.reshape(-1))
    with pytest.raises(ValueError, match=r"^indices: dtype float32 must be an integer type"):
        call(indices=weights)
    with pytest.raises(ValueError, match=r"^weights: shape \(9, 3\) must be .* = \(9, 4\)"):
        call(weights=weights[:, 1:])
    with pytest.raises(ValueError, match=r"^vectors: shape \(8, 6\) must be \[tokens = 9, row width\]"):
        call(vectors=vectors[1:])
    with pytest.raises(ValueError, match=r"^num_pools=2: must divide num_rows=23"):
        row_usage(indices, weights, N, 2)
