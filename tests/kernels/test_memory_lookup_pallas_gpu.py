"""The GPU kernels of memory lookups, run by Pallas' GPU interpreter on CPU, agree with a float64 loop over pairs.

Letters: t tokens, k rows per token, n rows, v row width. The interpreter knows nothing of registers and layouts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels.bench import oracles
from hybridlm_kernels.memory_lookup import pallas_gpu

Array = np.ndarray
Run = Callable[..., Any]  # calls a function with its GPU kernels interpreted
TOLERANCE, ROUNDED = 3e-6, 4e-3  # relative L2 against float64: sums in float32, results in bfloat16
CASES: dict[str, Any] = {  # table, t, k, lowest and highest index
    "some rows are elsewhere": ((70, 2, 128), 5, 11, -30, 100),
    "all use one row": ((3, 128), 6, 9, 1, 1),
    "no row is here": ((3, 128), 2, 3, 3, 9),
    "several blocks of columns": ((40, 768), 4, 3, 0, 39),
}
QUICK = "some rows are elsewhere"


def oracle(table: Any, indices: Any, weights: Any, vectors: Any) -> tuple[Array, Array, Array]:
    """y, the scores of `vectors`, and the table's gradient for them, in float64."""
    table, weights, vectors = (np.asarray(a.astype(float), np.float64) for a in (table, weights, vectors))
    y, (g, s) = oracles.memory_lookup(table, np.asarray(indices), weights, vectors)
    return y, s, g


def distance(got: Any, want: Array) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30))


def check(interpreted: Run, rng: np.random.Generator, name: str, dtype: Any, tolerance: float) -> None:
    """Weights of rows that are elsewhere are NaN."""
    shape, t, k, low, high = CASES[name]
    indices = jnp.asarray(rng.integers(low, high + 1, size=(t, k)), jnp.int32)
    table, weights, vectors = (
        jnp.asarray(rng.normal(size=s), dtype) for s in (shape, (t, k), (t, int(np.prod(shape[1:]))))
    )
    weights = jnp.where((indices >= 0) & (indices < shape[0]), weights, jnp.nan)

    def everything(table: Any, indices: Any, weights: Any, vectors: Any) -> tuple:
        y, s = pallas_gpu.lookup(table, indices, weights), pallas_gpu.scores(table, indices, vectors)
        return y, s, *pallas_gpu.gradients(table, indices, weights, vectors)

    y, s, g = oracle(table, indices, weights, vectors)
    results = interpreted(jax.jit(everything), table, indices, weights, vectors)
    for got, want in zip(results, (y, s, s, g), strict=True):
        assert got.dtype == dtype and distance(got, want) < tolerance


@pytest.mark.parametrize("name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_values_and_gradients_equal_a_loop_over_pairs(interpreted: Run, rng: np.random.Generator, name: str) -> None:
    check(interpreted, rng, name, jnp.float32, TOLERANCE)


@pytest.mark.slow
def test_rows_of_16_bits_are_summed_in_float32_and_rounded_once(interpreted: Run, rng: np.random.Generator) -> None:
    check(interpreted, rng, "all use one row", jnp.bfloat16, ROUNDED)


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "reason"),
    [
        ((8, 128), "float32", 8.0, "needs a Hopper GPU"),
        ((8, 96), "float32", 9.0, "rows of a multiple of 128 numbers, not 96"),
        ((8, 2, 128), "float16", 9.0, "takes bfloat16, float32, not float16"),
        ((8, 2, 128), "bfloat16", 9.0, None),
    ],
)
def test_what_the_kernels_cannot_read_they_refuse(
    shape: tuple[int, ...], dtype: str, capability: float, reason: str | None
) -> None:
    table, indices = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((4, 2), jnp.int32)
    weights = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    refusal = pallas_gpu.supports(table, indices, weights, compute_capability=capability)
    assert refusal is None if reason is None else reason in str(refusal)
