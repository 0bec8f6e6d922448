"""The TPU's kernels of memory lookups, interpreted, against a float64 loop over pairs.

Letters: t tokens, k rows per token, n rows, v row width, a tiles of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import UnsupportedKernel, interpret_pallas, memory_lookup, memory_scores
from hybridlm_kernels.bench import oracles
from hybridlm_kernels.memory_lookup import pallas_tpu, tpu_gradients
from jax.experimental.pallas import tpu as pltpu

TOLERANCE, ROUNDED = 3e-6, 4e-3  # relative L2 against float64: thousands summed in float32, results in bfloat16
CASES: dict[str, Any] = {  # n, a, t, k, lowest and highest index
    "some rows are elsewhere": (50, 2, 37, 5, -20, 80),
    "all are here, in several steps": (300, 1, 80, 33, 0, 299),
    "no row is here": (4, 1, 5, 3, 4, 9),
    "all use one row": (3, 4, 40, 70, 1, 1),
    "one token and one row": (1, 1, 1, 1, 0, 0),
}
QUICK = ("some rows are elsewhere",)


def oracle(table, indices, weights, vectors):
    """y, the scores of `vectors`, and the table's gradient for them, in float64."""
    table, weights, vectors = (np.asarray(a.astype(float), np.float64) for a in (table, weights, vectors))
    y, (g, s) = oracles.memory_lookup(table, np.asarray(indices), weights, vectors)
    return y, s, g


def operands(rng, name, dtype: Any = jnp.float32, table_dtype: Any = jnp.float32):
    """Weights of rows that are elsewhere are NaN."""
    n, a, t, k, low, high = CASES[name]
    indices = jnp.asarray(rng.integers(low, high + 1, size=(t, k)), jnp.int32)
    table, weights, vectors = (rng.normal(size=shape) for shape in ((n, a, 128), (t, k), (t, a * 128)))
    weights = jnp.where((indices >= 0) & (indices < n), jnp.asarray(weights, dtype), jnp.nan)
    return jnp.asarray(table, table_dtype), indices, weights, jnp.asarray(vectors, dtype)


def run(table, indices, weights, vectors, interpret: Any = True):
    """y, the scores, the scores again and the table's gradient, by the kernels."""
    y = pallas_tpu.lookup(table, indices, weights, interpret=interpret)
    s = pallas_tpu.scores(table, indices, vectors, interpret=interpret)
    return y, s, *pallas_tpu.gradients(table, indices, weights, vectors, interpret=interpret)


def distance(got, want):
    got, want = np.asarray(got.astype(jnp.float32), np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_values_and_gradients_equal_a_loop_over_pairs(rng, name):
    given = operands(rng, name)
    y, s, g = oracle(*given)
    for got, want in zip(run(*given), (y, s, s, g), strict=True):
        assert got.dtype == jnp.float32 and distance(got, want) < TOLERANCE


@pytest.mark.slow
def test_rows_of_16_bits_are_summed_in_float32_and_rounded_once(rng):
    given = operands(rng, "all use one row", jnp.bfloat16, jnp.bfloat16)
    y, s, g = oracle(*given)
    for got, want in zip(run(*given), (y, s, s, g), strict=True):
        assert got.dtype == jnp.bfloat16 and distance(got, want) < ROUNDED


@pytest.mark.slow
def test_rows_that_go_on_through_chunks_of_pairs(rng, monkeypatch):
    monkeypatch.setattr(tpu_gradients, "PAIRS", 128)
    jax.clear_caches()
    table, _, weights, vectors = operands(rng, "all use one row")
    indices = jnp.asarray(rng.choice([0, 1, 1, 1, 2, 5], size=weights.shape), jnp.int32)
    weights = jnp.asarray(rng.normal(size=weights.shape), jnp.float32)
    got = pallas_tpu.gradients(table, indices, weights, vectors, interpret=True)
    jax.clear_caches()
    for one, want in zip(got, oracle(table, indices, weights, vectors)[1:], strict=True):
        assert distance(one, want) < TOLERANCE


@pytest.mark.slow
def test_no_copy_is_read_before_it_has_arrived(rng):
    """The TPU interpreter moves data only at a wait, fills what is not written with NaN, and looks for races."""
    given = operands(rng, "some rows are elsewhere")
    y, s, g = oracle(*given)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True)):
        for got, want in zip(run(*given, interpret=False), (y, s, s, g), strict=True):
            assert distance(got, want) < TOLERANCE


def test_a_bad_row_spoils_its_own_readers_alone(rng):
    table, indices, weights, vectors = operands(rng, "some rows are elsewhere")
    indices = jnp.where(indices == 0, 1, indices).at[5, 2].set(0)
    y = pallas_tpu.lookup(table.at[0].set(jnp.nan), indices, weights.at[5, 2].set(1.0), interpret=True)
    assert np.flatnonzero(np.isnan(y).any(1)).tolist() == [5]


def test_both_operations_and_their_gradients_take_the_kernels(rng):
    table, indices, weights, vectors = operands(rng, "some rows are elsewhere")
    want_y, want_s, want_g = oracle(table, indices, weights, vectors)
    with interpret_pallas():
        y, vjp = jax.vjp(lambda t, w: memory_lookup(t, indices, w, impl="pallas_tpu"), table, weights)
        g, s = vjp(vectors)
        same_s, vjp = jax.vjp(lambda x: memory_scores(table, indices, x, impl="pallas_tpu"), vectors)
        (same_y,) = vjp(weights)
    for got, want in ((y, want_y), (same_y, want_y), (s, want_s), (same_s, want_s), (g, want_g)):
        assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize(
    ("row", "dtype", "k", "reason"),
    [
        ((256,), "float32", 8, r"reads tables \[rows, tiles, 128\], whose rows lie in one piece, not \(64, 256\)"),
        (
            (3, 128),
            "float32",
            8,
            "rows of 1, 2, 4 or a multiple of 8 tiles; of 3 the compiler would first copy the whole",
        ),
        ((1, 128), "bfloat16", 8, "rows of 2, 4 or a multiple of 8 tiles; of 1 the compiler"),
        ((128, 128), "float32", 8, "rows of at most 32768 bytes"),
        ((2, 128), "float16", 8, "takes bfloat16, float32, not float16"),
        ((2, 128), "float32", 600, "at most 512 rows per token, not 600"),
    ],
)
def test_what_the_kernels_cannot_read_they_refuse(row, dtype, k, reason):
    with interpret_pallas(), pytest.raises(UnsupportedKernel, match=reason):
        indices, weights = jnp.zeros((4, k), jnp.int32), jnp.zeros((4, k), jnp.float32)
        memory_lookup(jnp.zeros((64, *row), dtype), indices, weights, impl="pallas_tpu")
