"""The TPU kernels of grouped_matmul, interpreted, against a float64 loop over rows; their visits and their blocks.

Letters: m rows, k inputs, n outputs, g groups.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import grouped_matmul, interpret_pallas
from hybridlm_kernels.grouped_matmul import pallas_tpu, tpu_blocks
from hybridlm_kernels.grouped_matmul.tpu_blocks import Blocks
from hybridlm_kernels.grouped_matmul.visits import of_every_group, of_every_tile
from jax.experimental.pallas import tpu as pltpu

TOLERANCE, ROUNDED = 1e-6, 4e-3  # relative L2 against float64: sums in float32, results in bfloat16
M = 300  # three tiles of 128 rows, the last one cut
SIZES = {
    "borders inside tiles": [100, 31, 99, 20, 40, 10],
    "empty groups": [0, 130, 0, 0, 170, 0],
    "several groups in one tile": [1, 60, 3, 64, 150, 22],
    "one group has all": [0, M, 0, 0, 0, 0],
    "tiles of no group": [0, 0, 90, 0, 20, 0],
    "no rows in any group": [0, 0, 0, 0, 0, 0],
}


def oracle(x, w, sizes, dy):
    """y, dx and dw, row by row."""
    x, w, dy = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for i, j in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[i], dx[i] = x[i] @ w[j], w[j] @ dy[i]
        dw[j] += np.outer(x[i], dy[i])
    return y, dx, dw


def operands(rng, m, sizes, dtype=jnp.float32, k=128, n=256):
    """Rows of no group hold NaN."""
    x, w, dy = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, k), (len(sizes), k, n), (m, n)))
    used = sum(sizes)
    return x.at[used:].set(jnp.nan), w, jnp.asarray(sizes, jnp.int32), dy.at[used:].set(jnp.nan)


def run(x, w, sizes, dy, dtype=jnp.float32, interpret: Any = True):
    """y, dx and dw by the kernels."""
    return (
        pallas_tpu.forward(x, w, sizes, interpret=interpret),
        pallas_tpu.transposed(dy, w, sizes, interpret=interpret),
        pallas_tpu.weights(x, dy, sizes, dtype, interpret=interpret),
    )


def distance(got, want):
    got, want = np.asarray(got.astype(jnp.float32), np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Blocks]]:
    """A list whose one element is the block of every kernel traced within the test."""
    chosen: list[Blocks] = []
    jax.clear_caches()
    for name in ("of_products", "of_weights"):
        monkeypatch.setattr(tpu_blocks, name, lambda *sizes: chosen[0])
    yield chosen
    jax.clear_caches()


@pytest.mark.parametrize("name", SIZES)
def test_products_and_gradients_equal_a_loop_over_rows(rng, name):
    given = operands(rng, M, SIZES[name])
    for got, want in zip(run(*given), oracle(*given), strict=True):
        assert distance(got, want) < TOLERANCE


def test_fewer_rows_than_a_tile(rng):
    given = operands(rng, 37, [30, 0, 5])
    for got, want in zip(run(*given), oracle(*given), strict=True):
        assert distance(got, want) < TOLERANCE


def test_bfloat16_gives_float32_gradients_of_weights_unrounded(rng):
    given = operands(rng, M, SIZES["borders inside tiles"], jnp.bfloat16)
    wants = oracle(*given)
    for got, want, tolerance in zip(run(*given), wants, (ROUNDED, ROUNDED, TOLERANCE), strict=True):
        assert distance(got, want) < tolerance
    dw = run(*given, jnp.bfloat16)[2]
    assert dw.dtype == jnp.bfloat16 and distance(dw, wants[2]) < ROUNDED


@pytest.mark.parametrize(
    ("chosen", "dtype"),
    [
        (Blocks(48, 384, 256), jnp.float32),
        (Blocks(152, 128, 512), jnp.float32),
        (Blocks(64, 128, 256), jnp.bfloat16),
    ],
    ids=str,
)
def test_any_blocks_give_the_same(rng, blocks, chosen, dtype):
    """Sums over several blocks of k, blocks that reach over the last column, tiles that reach over the last row."""
    given = operands(rng, 200, [0, 33, 130, 0, 1, 15, 0], dtype, k=384, n=384)
    blocks.append(chosen)
    for got, want in zip(run(*given, dtype), oracle(*given), strict=True):
        assert got.dtype == dtype and distance(got, want) < (TOLERANCE if dtype == jnp.float32 else ROUNDED)


def test_no_race_and_nothing_read_that_was_not_written(rng, blocks):
    blocks.append(Blocks(32, 128, 128))
    given = operands(rng, 100, [0, 40, 0, 17, 0], k=256, n=256)
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    for got, want in zip(run(*given, interpret=strict), oracle(*given), strict=True):
        assert distance(got, want) < TOLERANCE


def test_the_operation_takes_the_kernels(rng):
    x, w, sizes, dy = operands(rng, 90, [30, 0, 50], jnp.bfloat16, n=128)
    parameters = w.astype(jnp.float32)
    with interpret_pallas():
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl="pallas_tpu"), x, parameters)
        dx, dw = vjp(dy)
    want_y, want_dx, want_dw = oracle(x, w, [30, 0, 50], dy)
    assert distance(y, want_y) < ROUNDED and distance(dx, want_dx) < ROUNDED
    assert dw.dtype == jnp.float32 and distance(dw, want_dw) < TOLERANCE


@pytest.mark.parametrize("listing", [of_every_tile, of_every_group])
@pytest.mark.parametrize(("m", "size", "g"), [(90, 16, 9), (64, 16, 4), (5, 8, 3), (40, 7, 1)])
def test_every_tile_and_group_that_meet_are_visited_once_and_in_order(rng, listing, m, size, g):
    listed, num_tiles = jax.jit(partial(listing, num_rows=m, size=size)), -(-m // size)
    for _ in range(30):
        borders = np.sort(rng.integers(0, m + 1, size=g))
        borders[rng.integers(0, g) :] = borders[-1]
        starts = np.concatenate([[0], borders[:-1]])
        visits = [np.asarray(v) for v in listed(jnp.asarray(borders - starts))]
        assert len(visits[0]) == num_tiles + g - 1
        rows = [(j, t * size + row) for t, j, first, end in zip(*visits, strict=True) for row in range(first, end)]
        assert rows == [(j, row) for j in range(g) for row in range(starts[j], borders[j])]
        tiles, groups, first, end = visits
        assert ((first < end) | ((first == 0) & (end == 0))).all()
        assert (tiles >= 0).all() and (tiles < num_tiles).all() and (groups >= 0).all() and (groups < g).all()
        # What a kernel writes must leave VMEM once: visits to it follow each other, and there is one at least.
        written, num = (tiles, num_tiles) if listing is of_every_tile else (groups, g)
        assert (np.diff(written) >= 0).all() and np.unique(written).tolist() == list(range(num))


SHAPES = [
    (131072, 2048, 1024, 8),
    (16384, 2048, 1024, 64),
    (8192, 14336, 4096, 8),
    (512, 128, 128, 4),
    (7, 1408, 640, 2),
]


@pytest.mark.parametrize("kind", tpu_blocks.CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_and_leave_no_core_idle(kind, itemsize):
    for m, k, n, g in SHAPES:
        products = tpu_blocks.of_products(m, k, n, g, itemsize, kind)
        weights = tpu_blocks.of_weights(m, k, n, g, itemsize, 4, kind)
        assert k % products.inputs == 0
        for block in (products, weights):
            assert 2 * itemsize * block.inputs * block.outputs <= tpu_blocks.CHIPS[kind].vmem
            assert block.rows <= m and block.inputs % 128 == 0 and block.outputs % 128 == 0
        if tpu_blocks.CHIPS[kind].cores == 2 and m > 8 * n:  # else reading the matrices takes longer
            assert -(-n // products.outputs) % 2 == 0


def test_small_groups_get_small_tiles():
    rows = [tpu_blocks.of_weights(m, 2048, 1024, 16, 2, 4, "TPU v5 lite").rows for m in (2048, 16384, 262144)]
    assert rows == sorted(rows) and rows[0] == 128 and rows[-1] == 512


def test_what_the_kernels_cannot_do_is_said():
    x, w, sizes = jnp.zeros((8, 128)), jnp.zeros((2, 128, 256)), jnp.zeros(2, jnp.int32)
    assert pallas_tpu.supports(x, w, sizes) is None
    assert "float16" in (pallas_tpu.supports(x.astype(jnp.float16), w, sizes) or "")
    assert "64 inputs: must be a multiple of 128" in (pallas_tpu.supports(x[:, :64], w[:, :64], sizes) or "")
    assert "200 outputs: must be a multiple of 128" in (pallas_tpu.supports(x, w[:, :, :200], sizes) or "")
