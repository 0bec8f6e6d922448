"""Grouped matrix multiplication in plain JAX against a loop over rows in float64.

Letters: m rows, k inputs, n outputs, g groups.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hybridlm_kernels import check_values, explain, grouped_matmul
from hybridlm_kernels.grouped_matmul.visits import bounds
from jax.sharding import AxisType, NamedSharding, PartitionSpec

IMPLS = ("reference", "chunked")
K, N = 13, 9
SIZES = {  # rows, and how many of them each group has
    "uneven": (700, [3, 0, 290, 1, 256, 149, 1]),
    "empty at both ends": (70, [0, 0, 33, 37, 0]),
    "one group has all": (513, [0, 513, 0]),
    "only one group": (300, [300]),
    "one row each": (5, [1, 1, 1, 1, 1]),
    "rows of no group": (600, [257, 0, 64, 31]),
    "no rows in any group": (40, [0, 0, 0]),
    "one row": (1, [0, 1]),
}
TOLERANCE, ROUNDED = 1e-6, 4e-3  # relative L2 against float64: sums in float32, results in bfloat16


def oracle(x, w, sizes, dy):
    """y, dx and dw, row by row."""
    x, w, dy = (np.asarray(v, np.float64) for v in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for i, j in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[i], dx[i] = x[i] @ w[j], w[j] @ dy[i]
        dw[j] += np.outer(x[i], dy[i])
    return y, dx, dw


def operands(rng, name, dtype: Any = np.float32):
    m, sizes = SIZES[name]
    x, w, dy = (rng.normal(size=shape) for shape in ((m, K), (len(sizes), K, N), (m, N)))
    return jnp.asarray(x, dtype), jnp.asarray(w, np.float32), jnp.asarray(sizes, jnp.int32), jnp.asarray(dy, dtype)


def run(x, w, sizes, dy, impl):
    """y, dx and dw."""
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl=impl), x, w)
    return y, *vjp(dy)


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
def test_products_and_gradients_equal_a_loop_over_rows(rng, impl, name):
    given = operands(rng, name)
    for got, want in zip(run(*given, impl), oracle(*given), strict=True):
        assert got.dtype == jnp.float32 and distance(got, want) < TOLERANCE


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_is_summed_in_float32_and_parameters_get_unrounded_gradients(rng, impl):
    x, w, sizes, dy = operands(rng, "uneven", jnp.bfloat16)
    y, dx, dw = run(x, w, sizes, dy, impl)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    want_y, want_dx, want_dw = oracle(x, w.astype(jnp.bfloat16), sizes, dy)
    assert distance(y, want_y) < ROUNDED and distance(dx, want_dx) < ROUNDED
    assert distance(dw, want_dw) < TOLERANCE
    assert run(x, w.astype(jnp.bfloat16), sizes, dy, impl)[2].dtype == jnp.bfloat16


@pytest.mark.parametrize("impl", IMPLS)
def test_double_precision_is_kept(rng, impl):
    with jax.enable_x64(True):
        x, w, sizes, dy = operands(rng, "uneven", np.float64)
        given = x, w.astype(np.float64) + 1e-9, sizes, dy
        for got, want in zip(run(*given, impl), oracle(*given), strict=True):
            assert distance(got, want) < 1e-14


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_no_group_count_for_nothing_whatever_they_hold(rng, impl):
    x, w, sizes, dy = operands(rng, "rows of no group")
    used = int(sizes.sum())
    clean = run(x, w, sizes, dy, impl)
    poisoned = run(x.at[used:].set(jnp.nan), w, sizes, dy.at[used:].set(jnp.inf), impl)
    for got, want in zip(poisoned, clean, strict=True):
        np.testing.assert_array_equal(got, want)
    assert not poisoned[0][used:].any() and not poisoned[1][used:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bad_row_spoils_its_own_group_alone(rng, impl):
    x, w, sizes, dy = operands(rng, "uneven")
    y, dx, dw = run(x.at[2].set(jnp.nan), w, sizes, dy, impl)  # the last row of group 0, in one tile with group 2's
    assert np.flatnonzero(np.isnan(y).any(1)).tolist() == [2] and not np.isnan(dx).any()
    assert np.flatnonzero(np.isnan(dw).any((1, 2))).tolist() == [0]


@pytest.mark.parametrize("impl", IMPLS)
def test_more_rows_than_there_are_are_cut_off(rng, impl):
    """Sizes computed wrongly upstream must not read or write outside the operands."""
    x, w, _, dy = operands(rng, "empty at both ends")
    for got, want in zip(run(x, w, jnp.array([30, 20, 50, 9, 0]), dy, impl), oracle(x, w, [30, 20, 20, 0, 0], dy),
                         strict=True):  # fmt: skip
        assert distance(got, want) < TOLERANCE
    with check_values(), pytest.raises(ValueError, match="group_sizes, added up,: values from 109 to 109 must be in"):
        grouped_matmul(x, w, jnp.array([30, 20, 50, 9, 0]), impl=impl)


def test_bounds_are_where_groups_start_and_end():
    starts, ends = bounds(jnp.array([3, 0, 5]), 9)
    assert (starts.tolist(), ends.tolist()) == ([0, 3, 3], [3, 3, 8])


@pytest.mark.parametrize("impl", IMPLS)
def test_sizes_known_only_at_run_time_within_scan_and_checkpoint(rng, impl):
    x, w, sizes, dy = operands(rng, "empty at both ends")
    rows = jnp.stack([sizes, sizes[::-1]])

    @jax.jit
    def loss(x, w, rows):
        def layer(x, sizes):
            return x + grouped_matmul(jnp.tanh(x), w, sizes, impl=impl) @ mix, None

        return (jax.lax.scan(jax.checkpoint(layer), x, rows)[0] ** 2).sum()

    def plain(x, w, rows):
        for sizes in rows:
            group = np.repeat(np.arange(len(sizes)), sizes)
            x = x + jnp.einsum("mk,mkn->mn", jnp.tanh(x), w[group]) @ mix
        return (x**2).sum()

    mix = jnp.asarray(rng.normal(size=(N, K)) / N, jnp.float32)
    for got, want in zip(jax.grad(loss, (0, 1))(x, w, rows), jax.grad(plain, (0, 1))(x, w, np.asarray(rows)),
                         strict=True):  # fmt: skip
        assert distance(got, want) < 10 * TOLERANCE


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_inside_shard_map_every_device_multiplies_its_own_groups(rng, impl, check_vma):
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Explicit,))
    x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((160, K), (8, K, N), (160, N)))
    sizes = jnp.array([3, 30, 40, 0, 0, 0, 19, 20], jnp.int32)  # of the 40 rows and 2 groups of each device
    spec = PartitionSpec("expert")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(v, NamedSharding(mesh, spec)) for v in (x, w, sizes, dy)]
        mapped = jax.shard_map(
            partial(run, impl=impl), in_specs=(spec,) * 4, out_specs=(spec,) * 3, check_vma=check_vma
        )
        got = jax.device_get(jax.jit(mapped)(*placed))
    parts = [oracle(*(np.split(np.asarray(v), 4)[i] for v in (x, w, sizes, dy))) for i in range(4)]
    for one, wants in zip(got, zip(*parts, strict=True), strict=True):
        assert distance(one, np.concatenate(wants)) < TOLERANCE


def test_weights_that_every_device_has_get_the_sum_of_their_gradients(rng):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((40, K), (3, K, N), (40, N)))
    sizes = jnp.array([[5, 0, 15], [0, 19, 0]], jnp.int32)
    rows = PartitionSpec("data")

    def loss(x, w, sizes, dy):
        return jax.lax.psum((grouped_matmul(x, w, sizes[0]) * dy).sum(), "data")

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(loss, in_specs=(rows, PartitionSpec(), rows, rows), out_specs=PartitionSpec())
        placed = [jax.device_put(v, NamedSharding(mesh, rows)) for v in (x, sizes, dy)]
        dw = jax.jit(jax.grad(mapped, 1))(placed[0], w, *placed[1:])
    want = sum(oracle(x[half], w, sizes[i], dy[half])[2] for i, half in enumerate((slice(0, 20), slice(20, 40))))
    assert distance(jax.device_get(dw), want) < TOLERANCE


def test_one_input_is_not_one_token():
    x, w = jax.ShapeDtypeStruct((8, 1), jnp.float32), jax.ShapeDtypeStruct((2, 1, 3), jnp.float32)
    assert "token" not in str(explain("grouped_matmul", x, w, jax.ShapeDtypeStruct((2,), jnp.int32)))


X, W, GROUPS = jnp.ones((8, 4)), jnp.ones((2, 4, 3)), jnp.array([3, 5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_matmul(X[0], W, GROUPS), r"x: shape \(4,\) must be \[rows, inputs\]"),
        (lambda: grouped_matmul(X[:0], W, GROUPS), r"x: shape \(0, 4\) must be .* at least one of each"),
        (lambda: grouped_matmul(X > 0, W, GROUPS), "x: dtype bool must be one of bfloat16,"),
        (lambda: grouped_matmul(X, W[0], GROUPS), r"w: shape \(4, 3\) must be \[groups, inputs = 4, outputs\]"),
        (lambda: grouped_matmul(X, W[:, :2], GROUPS), r"w: shape \(2, 2, 3\) must be \[groups, inputs = 4, outputs\]"),
        (lambda: grouped_matmul(X, W.astype(int), GROUPS), "w: dtype int32 must be one of bfloat16,"),
        (lambda: grouped_matmul(X, W, GROUPS[:1]), r"group_sizes: shape \(1,\) must be \[groups\] = \(2,\)"),
        (lambda: grouped_matmul(X, W, GROUPS * 1.0), "group_sizes: dtype float32 must be an integer type"),
        (lambda: grouped_matmul(X, W, GROUPS, impl="chunkd"), "did you mean chunked?"),
    ],
)
def test_a_wrong_call_gets_one_clear_line(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_operands_that_are_sharded_are_refused():
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)
    sharded = jax.device_put(W, NamedSharding(mesh, PartitionSpec("data")))
    x, sizes = (jax.device_put(v, NamedSharding(mesh, PartitionSpec())) for v in (X, GROUPS))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"w: sharded over data; .* inside a jax.shard_map"):
        grouped_matmul(x, sharded, sizes)
