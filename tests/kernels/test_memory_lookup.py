"""Lookups in a table of rows, in plain JAX, against a loop over pairs in float64.

Letters: t tokens, k rows per token, n rows, v row width, a tiles of a row, l lanes of a tile.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hybridlm_kernels import explain, memory_lookup, memory_scores
from hybridlm_kernels.bench import oracles
from hybridlm_kernels.memory_lookup import chunked
from hybridlm_kernels.memory_lookup.sorted_pairs import in_order_of_pairs, sort_pairs
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

IMPLS = ("reference", "chunked")
VALUES, GRADIENTS, ROUNDED = 1e-6, 1e-6, 4e-3  # relative L2 against float64: sums in float32, results in bfloat16
N, V = 23, 12
CASES = {  # t, k, lowest and highest index
    "all rows are here": (37, 5, 0, N - 1),
    "some rows are elsewhere": (41, 19, -N, 2 * N),
    "no row is here": (9, 3, N, 4 * N),
    "all use one row": (70, 20, 7, 7),
    "one token": (1, 33, 0, N - 1),
    "one row per token": (131, 1, -2, N + 1),
}


def oracle(table, indices, weights, vectors):
    """y, the scores of `vectors`, and the table's gradient for them, in float64."""
    table, weights, vectors = (np.asarray(a.astype(float), np.float64) for a in (table, weights, vectors))
    y, (g, s) = oracles.memory_lookup(table, np.asarray(indices), weights, vectors)
    return y, s, g


def operands(rng, name, dtype: Any = np.float32, row=(V,)):
    """table, indices, weights and vectors."""
    t, k, low, high = CASES[name]
    indices = jnp.asarray(rng.integers(low, high + 1, size=(t, k)), jnp.int32)
    table, weights, vectors = (rng.normal(size=shape) for shape in ((N, *row), (t, k), (t, V)))
    return jnp.asarray(table, dtype), indices, jnp.asarray(weights, dtype), jnp.asarray(vectors, dtype)


def everything(table, indices, weights, vectors, impl):
    """y, s and the table's gradient, each as both operations have it: `vectors` is x of one and dy of the other."""
    y, lookup_vjp = jax.vjp(lambda t, w: memory_lookup(t, indices, w, impl=impl), table, weights)
    s, scores_vjp = jax.vjp(lambda t, x: memory_scores(t, indices, x, impl=impl), table, vectors)
    (g, dweights), (same_g, dx) = lookup_vjp(vectors), scores_vjp(weights)
    return (y, dx), (s, dweights), (g, same_g)


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("row", [(V,), (3, 4)], ids=["flat rows", "rows of tiles"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients_equal_a_loop_over_pairs(rng, impl, name, row):
    given = operands(rng, name, row=row)
    for got, want in zip(everything(*given, impl), oracle(*given), strict=True):
        for one in got:
            assert one.dtype == jnp.float32 and distance(one, want) < VALUES


def test_chunks_that_rows_cross_and_do_not_fill(rng, monkeypatch):
    """Several chunks of tokens, and of pairs of which one row has more than two."""
    for name, size in (("BLOCK", 500), ("TOKENS", 8), ("PAIRS", 16)):
        monkeypatch.setattr(chunked, name, size)
    jax.clear_caches()
    for name in ("some rows are elsewhere", "all use one row"):
        given = operands(rng, name)
        results = *everything(*given, "chunked"), (chunked._lookup_at_once(*given[:3]),) * 2
        want = oracle(*given)
        for got, expected in zip(results, (*want, want[0]), strict=True):
            for one in got:
                assert distance(one, expected) < VALUES
    jax.clear_caches()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_rounded_once_to_the_dtypes_of_their_operands(rng, impl):
    """The sums of 1400 products of which the largest grow to hundreds: 1e-2 and more is lost by adding in bfloat16."""
    table, indices, weights, vectors = operands(rng, "all use one row", jnp.bfloat16)
    weights, vectors = jnp.abs(weights), jnp.abs(vectors)
    want_y, want_s, want_g = oracle(table, indices, weights, vectors)
    (y, dx), (s, dweights), (g, _) = everything(table, indices, weights, vectors, impl)
    for got, want in ((y, want_y), (dx, want_y), (s, want_s), (dweights, want_s), (g, want_g)):
        assert got.dtype == jnp.bfloat16 and distance(got, want) < ROUNDED
    wide = weights.astype(jnp.float32), vectors.astype(jnp.float32)
    (y, _), (s, _), (g, _) = everything(table, indices, *wide, impl)
    assert (y.dtype, s.dtype, g.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert distance(y, want_y) < VALUES and distance(s, want_s) < VALUES and distance(g, want_g) < ROUNDED


@pytest.mark.parametrize("impl", IMPLS)
def test_double_precision_is_kept_and_gradients_equal_finite_differences(rng, impl):
    with jax.enable_x64(True):
        table, indices, weights, vectors = operands(rng, "some rows are elsewhere", np.float64)
        for got, want in zip(everything(table, indices, weights, vectors, impl),
                             oracle(table, indices, weights, vectors), strict=True):  # fmt: skip
            for one in got:
                assert distance(one, want) < 1e-14

        def loss(table, weights):
            y = memory_lookup(table, indices, jnp.tanh(weights), impl=impl)
            return jnp.sum(jnp.sin(y)) + jnp.sum(memory_scores(table, indices, y, impl=impl) ** 2)

        check_grads(loss, (table, weights), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_other_devices_count_for_nothing_whatever_belongs_to_them(rng, impl):
    table, indices, weights, vectors = operands(rng, "some rows are elsewhere")
    elsewhere = (indices < 0) | (indices >= N)
    poisoned = everything(table, indices, jnp.where(elsewhere, jnp.nan, weights), vectors, impl)
    for got, want in zip(jax.tree.leaves(poisoned), jax.tree.leaves(everything(table, indices, weights, vectors, impl)),
                         strict=True):  # fmt: skip
        np.testing.assert_array_equal(got, want)
    _, (s, dweights), _ = poisoned
    assert not s[elsewhere].any() and not dweights[elsewhere].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bad_row_spoils_its_own_readers_alone(rng, impl):
    table, indices, weights, vectors = operands(rng, "all rows are here")
    indices = jnp.where(indices == 0, 1, indices).at[5, 2].set(0)  # row 0 is where clamped indices would point
    (y, _), (s, _), (g, _) = everything(table.at[0].set(jnp.nan), indices, weights, vectors, impl)
    assert np.flatnonzero(np.isnan(y).any(1)).tolist() == [5]
    assert np.argwhere(np.isnan(s)).tolist() == [[5, 2]] and not np.isnan(g).any()


def loss_without_table_gradient(impl, table, indices, weights):
    frozen = jax.lax.stop_gradient(table)

    @jax.checkpoint
    def layer(weights, i):
        return memory_lookup(frozen, indices, weights, impl=impl)[:, : weights.shape[1]] * i, None

    return (jax.lax.scan(layer, weights, jnp.arange(2.0))[0] ** 2).sum()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_table_that_is_not_differentiated_gets_no_gradient_array(rng, impl):
    """Also within jit, scan and checkpoint: nothing as large as the table is made beside it."""
    table, indices, weights, _ = operands(rng, "all rows are here")
    gradient = jax.jit(jax.grad(partial(loss_without_table_gradient, impl), 2))
    assert "scatter" not in gradient.lower(table, indices, weights).as_text()
    tracked = jax.jit(jax.grad(lambda t, w: memory_lookup(t, indices, w, impl=impl).sum(), (0, 1)))
    assert "scatter" in tracked.lower(table, weights).as_text()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_within_jit_scan_and_checkpoint(rng, impl):
    table, indices, weights, _ = operands(rng, "all rows are here")

    def loss(lookup, table, weights):
        @jax.checkpoint
        def layer(weights, ids):
            return jnp.tanh(lookup(table, ids, weights) @ mix), None

        return (jax.lax.scan(layer, weights, jnp.stack([indices, indices[::-1]]))[0] ** 2).sum()

    mix = jnp.asarray(rng.normal(size=(V, weights.shape[1])), jnp.float32)
    plain = partial(loss, lambda table, ids, w: jnp.einsum("tk,tkv->tv", w, table[ids]))
    ours = partial(loss, partial(memory_lookup, impl=impl))
    for got, want in zip(jax.jit(jax.grad(ours, (0, 1)))(table, weights), jax.grad(plain, (0, 1))(table, weights),
                         strict=True):  # fmt: skip
        assert distance(got, want) < 10 * GRADIENTS


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_inside_shard_map_devices_with_some_rows_each_sum_to_the_whole(rng, impl, check_vma):
    """Every device reads its rows for all tokens; the sum over devices is the lookup in the whole table."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    t, k = 19, 6
    table, weights, vectors = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4 * N, V), (t, k), (t, V)))
    indices = jnp.asarray(rng.integers(0, 4 * N, size=(t, k)), jnp.int32)

    def run(table, indices, weights, vectors):
        own = indices - jax.lax.axis_index("rows") * N

        def lookup(table, weights):
            return jax.lax.psum(memory_lookup(table, own, weights, impl=impl), "rows")

        y, vjp = jax.vjp(lookup, table, weights)
        return y, *vjp(vectors)

    rows, whole = PartitionSpec("rows"), PartitionSpec()
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((table, rows), (indices, whole))]
        placed += [jax.device_put(a, NamedSharding(mesh, whole)) for a in (weights, vectors)]
        out_specs = (whole, rows, whole) if check_vma else (whole, rows, rows)
        mapped = jax.shard_map(run, in_specs=(rows, whole, whole, whole), out_specs=out_specs, check_vma=check_vma)
        y, dtable, dweights = jax.device_get(jax.jit(mapped)(*placed))
    want_y, want_s, want_g = oracle(table, indices, weights, vectors)
    # Unchecked, the transpose of psum sums equal cotangents, and every device has its own part of what it should sum.
    scale, dweights = (1, dweights) if check_vma else (4, dweights.reshape(4, t, k).sum(0))
    assert distance(y, want_y) < VALUES
    assert distance(dtable / scale, want_g) < GRADIENTS and distance(dweights / scale, want_s) < GRADIENTS


def test_sorted_pairs_keep_the_order_of_equal_rows_and_go_back():
    indices, weights = jnp.array([[4, -1], [0, 4], [9, 0]]), jnp.arange(6.0).reshape(3, 2)
    pairs = sort_pairs(indices, weights, 5, multiple=4)
    assert pairs.row.tolist() == [0, 0, 4, 4, 5, 5, 5, 5] and int(pairs.num_inside) == 4
    assert pairs.pair.tolist()[:6] == [2, 5, 0, 3, 1, 4] and pairs.weight.tolist()[:4] == [2, 5, 0, 3]
    assert in_order_of_pairs(pairs.row, pairs, (3, 2)).tolist() == [[4, 5], [0, 4], [5, 0]]


def test_tokens_may_have_several_axes(rng):
    table, indices, weights, vectors = operands(rng, "some rows are elsewhere")
    shaped = [a[:40].reshape(5, 8, -1) for a in (indices, weights, vectors)]
    y, s = memory_lookup(table, *shaped[:2]), memory_scores(table, shaped[0], shaped[2])
    np.testing.assert_array_equal(y.reshape(40, -1), memory_lookup(table, indices[:40], weights[:40]))
    np.testing.assert_array_equal(s.reshape(40, -1), memory_scores(table, indices[:40], vectors[:40]))


def test_one_row_per_token_is_not_one_token():
    shapes = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((8, 1), jnp.float32), ((4, 1), jnp.int32), ((4, 1), jnp.float32))
    ]
    assert "token" not in str(explain("memory_lookup", *shapes))


TABLE, INDICES, WEIGHTS = jnp.ones((5, 4)), jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memory_lookup(TABLE[0], INDICES, WEIGHTS), r"table: shape \(4,\) must be \[rows, width\] or"),
        (lambda: memory_lookup(TABLE[:0], INDICES, WEIGHTS), r"table: shape \(0, 4\) must be .* none of them 0"),
        (lambda: memory_lookup(TABLE > 0, INDICES, WEIGHTS), "table: dtype bool must be one of bfloat16,"),
        (lambda: memory_lookup(TABLE, INDICES[0], WEIGHTS), r"indices: shape \(2,\) must be \[tokens, rows per token"),
        (lambda: memory_lookup(TABLE, INDICES[:0], WEIGHTS[:0]), r"indices: shape \(0, 2\) must be .* one of each"),
        (lambda: memory_lookup(TABLE, WEIGHTS, WEIGHTS), "indices: dtype float32 must be an integer type"),
        (lambda: memory_lookup(TABLE, INDICES, WEIGHTS[:2]), r"weights: shape \(2, 2\) must be .* = \(3, 2\)"),
        (lambda: memory_lookup(TABLE, INDICES, INDICES), "weights: dtype int32 must be one of bfloat16,"),
        (lambda: memory_scores(TABLE, INDICES, TABLE), r"x: shape \(5, 4\) must be \[tokens, row width\] = \(3, 4\)"),
        (lambda: memory_scores(TABLE, INDICES, TABLE[:3], impl="chunkd"), "did you mean chunked?"),
    ],
)
def test_a_wrong_call_gets_one_clear_line(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_operands_that_are_sharded_are_refused():
    mesh = jax.make_mesh((2, 4), ("data", "rows"), axis_types=(AxisType.Explicit,) * 2)
    sharded = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec("rows")))
    indices, weights = (jax.device_put(v, NamedSharding(mesh, PartitionSpec())) for v in (INDICES, WEIGHTS))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"table: sharded over rows; .* inside a jax.shard_map"):
        memory_lookup(sharded, indices, weights)
