"""The GPU kernels of grouped matrix multiplication, run by Pallas' GPU interpreter on CPU, agree with float64 loops.

Letters: m rows, k inputs, n outputs, g groups. The interpreter follows copies, barriers, stages and warpgroups; it
knows nothing of registers, layouts or what runs asynchronously.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels.grouped_matmul import gpu_rows, gpu_stages, pallas_gpu

Array = np.ndarray
Run = Callable[..., Any]  # calls a function with its GPU kernels interpreted
ROUNDED = 4e-3  # relative L2 of results in bfloat16
SUMMED = 1e-6  # and of float32 sums


@pytest.fixture(autouse=True, scope="module")
def one_multiprocessor() -> Iterator[None]:
    """Which takes one tile after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_stages, "MULTIPROCESSORS", 1)
        yield


def exact(x: Any) -> Array:
    return np.asarray(x, np.float64)


def oracle(x: Array, w: Array, dy: Array, group_sizes: Sequence[int]) -> tuple[Array, Array, Array]:
    """y, dx and dw by a loop over the groups, in float64."""
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    first = 0
    for group, size in enumerate(group_sizes):
        rows = slice(first, first + size)
        y[rows], dx[rows], dw[group] = x[rows] @ w[group], dy[rows] @ w[group].T, x[rows].T @ dy[rows]
        first += size
    return y, dx, dw


def error(result: Any, expected: Array) -> float:
    return float(np.linalg.norm(exact(result) - expected) / max(np.linalg.norm(expected), 1e-30))


def check(
    interpreted: Run,
    rng: np.random.Generator,
    m: int,
    k: int,
    n: int,
    group_sizes: Sequence[int],
    dtype: str = "float32",
) -> None:
    """All three products agree with the oracle, dw in `dtype`; rows past the groups hold no numbers."""
    x, dy = (jnp.asarray(rng.normal(size=(m, dim)), jnp.bfloat16).at[sum(group_sizes) :].set(np.nan) for dim in (k, n))
    w = jnp.asarray(rng.normal(size=(len(group_sizes), k, n)), jnp.bfloat16)
    sizes = jnp.asarray(group_sizes, jnp.int32)

    def products(x: Any, w: Any, dy: Any, sizes: Any) -> tuple:
        dw = pallas_gpu.weights(x, dy, sizes, jnp.dtype(dtype))
        return pallas_gpu.forward(x, w, sizes), pallas_gpu.transposed(dy, w, sizes), dw

    y, dx, dw = interpreted(jax.jit(products), x, w, dy, sizes)
    assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == dtype
    expected = oracle(exact(x), exact(w), exact(dy), group_sizes)
    assert error(y, expected[0]) < ROUNDED
    assert error(dx, expected[1]) < ROUNDED
    assert error(dw, expected[2]) < (SUMMED if dtype == "float32" else ROUNDED)
    past = sum(group_sizes)
    np.testing.assert_array_equal(exact(y[past:]), 0)
    np.testing.assert_array_equal(exact(dx[past:]), 0)
    np.testing.assert_array_equal(exact(dw)[np.asarray(group_sizes) == 0], 0)


@pytest.mark.parametrize(
    ("m", "group_sizes"),
    [
        (300, [0, 131, 1, 0, 60, 0]),  # empty groups, borders within blocks, a group of one row, rows past the groups
        pytest.param(37, [5, 0, 19], marks=pytest.mark.slow),  # fewer rows than a block
        pytest.param(72, [0, 0], marks=pytest.mark.slow),  # no row belongs to a group
        pytest.param(300, [300], marks=pytest.mark.slow),  # one group has all rows
        pytest.param(256, [128, 128], marks=pytest.mark.slow),  # groups are whole visits
        pytest.param(333, [1, 63, 64, 65, 127, 13], marks=pytest.mark.slow),
    ],
)
def test_products_agree_with_a_loop_over_groups(
    m: int, group_sizes: list[int], rng: np.random.Generator, interpreted: Run
) -> None:
    check(interpreted, rng, m, 128, 192, group_sizes)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "n"), [(64, 64), (64, 320), (320, 64), (192, 576)])
def test_tiles_may_stand_out_beyond_the_columns(k: int, n: int, rng: np.random.Generator, interpreted: Run) -> None:
    check(interpreted, rng, 200, k, n, [70, 0, 90], dtype="bfloat16")


@pytest.mark.slow
def test_blocks_of_threads_divide_the_tiles(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, interpreted: Run
) -> None:
    monkeypatch.setattr(gpu_stages, "MULTIPROCESSORS", 3)
    monkeypatch.setattr(gpu_stages, "WIDEST", 64)
    monkeypatch.setattr(gpu_rows, "PANEL", 2)
    check(interpreted, rng, 300, 128, 320, [140, 0, 90])


@pytest.mark.parametrize("group_sizes", [[0, 131, 1, 0, 60, 0], [0, 0, 0], [2000, 48], [7] * 11, [2048], [2047, 2]])
def test_visits_cover_every_row_once_and_copies_begin_at_multiples_of_8(group_sizes: list[int]) -> None:
    """The interpreter copies from any row on; the copy engine does not."""
    m = 2048
    visits = gpu_rows.Visits.of(jnp.asarray(group_sizes, jnp.int32), m)
    assert visits.table.shape[1] == gpu_rows.most_visits(m, len(group_sizes)) >= visits.count[0]
    group_of_row = np.full(m, -1)
    for group, row, low, high in np.asarray(visits.table).T[: int(visits.count[0])]:
        assert row % 8 == 0 and 0 <= low < high <= 128
        assert np.all(group_of_row[row + low : row + high] == -1)
        group_of_row[row + low : row + high] = group
    expected = np.repeat(np.arange(len(group_sizes) + 1), [*group_sizes, m])[:m]
    np.testing.assert_array_equal(group_of_row, expected)
    begin, first, end = gpu_stages.spans(jnp.asarray(group_sizes, jnp.int32), m)
    ends = np.minimum(np.cumsum(group_sizes), m)
    assert np.all(np.asarray(begin) % 8 == 0) and np.all(np.asarray(first) < 8)
    np.testing.assert_array_equal(begin + end, ends)
    np.testing.assert_array_equal(begin + first, [0, *ends[:-1]])


@pytest.mark.parametrize(
    ("columns", "tiles_a_column", "width"),
    [(1024, 1000, 256), (1408, 1000, 256), (320, 1000, 192), (128, 1000, 128), (64, 5, 64), (1024, 10, 128)],
)
def test_tiles_are_wide_unless_it_costs_more(columns: int, tiles_a_column: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_stages, "MULTIPROCESSORS", 132)
        assert gpu_stages.tile_width(columns, tiles_a_column) == width


@pytest.mark.parametrize(
    ("dtypes", "k", "n", "compute_capability", "reason"),
    [
        (("bfloat16", "bfloat16"), 2048, 1088, 9.0, None),
        (("float16", "float16"), 64, 64, 9.0, None),
        (("bfloat16", "bfloat16"), 64, 64, None, "needs a Hopper GPU"),
        (("bfloat16", "bfloat16"), 64, 64, 10.0, "needs a Hopper GPU"),
        (("float32", "float32"), 64, 64, 9.0, "not float32"),
        (("bfloat16", "float16"), 64, 64, 9.0, "one dtype, not bfloat16 and float16"),
        (("bfloat16", "bfloat16"), 96, 64, 9.0, "multiple of 64 inputs, not 96"),
        (("bfloat16", "bfloat16"), 64, 1000, 9.0, "multiple of 64 outputs, not 1000"),
    ],
)
def test_what_cannot_be_served_has_a_reason(
    dtypes: tuple[str, str], k: int, n: int, compute_capability: float | None, reason: str | None
) -> None:
    x, w = (jax.ShapeDtypeStruct(shape, jnp.dtype(d)) for shape, d in zip(((9, k), (3, k, n)), dtypes, strict=True))
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    refusal = pallas_gpu.supports(x, w, sizes, compute_capability=compute_capability)
    assert (refusal is None) if reason is None else (refusal is not None and reason in refusal)
