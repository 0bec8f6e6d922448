"""Optimizers of tables against dense ones in float64 that are restricted to the used rows.

Letters: t tokens, k rows per token, n rows of the table, v row width.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridlm.config_check import ConfigError
from hybridlm.config_tables import RowAdagrad, RowAdam, TableOptimizer
from hybridlm.table_optim import (
    TABLE_OPTIMIZERS,
    init_rows,
    learning_rate,
    random_bits,
    round_stochastically,
    update_rows,
)

N, T, K, V, STEPS = 24, 9, 4, 6, 3
SCALE = 1 / 7
CONFIGS = [RowAdam(b1=0.8, b2=0.9, eps=1e-3), RowAdagrad(eps=1e-3)]
# Below the norm of every step's gradient.
CLIPPED = [RowAdam(b1=0.8, b2=0.9, eps=1e-3, clip_norm=0.4), RowAdagrad(eps=1e-3, clip_norm=0.4)]


def name_of(cfg):
    return type(cfg).__name__ + (" clipped" if cfg.clip_norm else "")


def records(rng, steps=STEPS):
    """Of each step: indices, some of them outside, many twice, and every sixth row in none; weights; vectors."""

    def draw():
        indices = rng.integers(-4, N + 4, (T, K))
        weights, vectors = rng.normal(size=(T, K)), rng.normal(size=(T, V))
        indices = jnp.asarray(np.where(indices % 6 == 5, N, indices), jnp.int32)
        return indices, jnp.asarray(weights, jnp.float32), jnp.asarray(vectors, jnp.float32)

    return [draw() for _ in range(steps)]


def table_of(rng, row=(V,), dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=(N, *row)), dtype)


def dense_gradient(indices, weights, vectors):
    indices, weights, vectors = (np.asarray(x, np.float64) for x in (indices, weights, vectors))
    gradient, used = np.zeros((N, V)), np.zeros(N, bool)
    for t in range(T):
        for k in range(K):
            if 0 <= indices[t, k] < N:
                gradient[int(indices[t, k])] += SCALE * weights[t, k] * vectors[t]
                used[int(indices[t, k])] = True
    return gradient, used


def oracle(cfg, table, steps, lr):
    """The table after all steps, and the rows that were ever used."""
    table = np.asarray(table, np.float64).reshape(N, V).copy()
    m, v, a, ever = np.zeros((N, V)), np.zeros((N, V)), np.zeros(N), np.zeros(N, bool)
    for i, given in enumerate(steps, start=1):
        gradient, used = dense_gradient(*given)
        if cfg.clip_norm is not None:
            gradient *= min(1, cfg.clip_norm / np.sqrt(np.sum(gradient**2)))
        for row in np.flatnonzero(used):
            g = gradient[row]
            if isinstance(cfg, RowAdam):
                m[row] = cfg.b1 * m[row] + (1 - cfg.b1) * g
                v[row] = cfg.b2 * v[row] + (1 - cfg.b2) * g**2
                unbiased = m[row] / (1 - cfg.b1**i), v[row] / (1 - cfg.b2**i)
                table[row] -= lr * unbiased[0] / (np.sqrt(unbiased[1]) + cfg.eps)
            else:
                a[row] += np.mean(g**2)
                table[row] -= lr * g / (np.sqrt(a[row]) + cfg.eps)
        ever |= used
    return table, ever


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def one_step(cfg, table, state, given, step, lr=0.1, seed=0):
    return update_rows(cfg, table, state, *given, lr=lr, step=step, scale=SCALE, key=jax.random.key(seed))


def after(cfg, table, steps):
    table, state = jnp.array(table), init_rows(cfg, table)
    for i, given in enumerate(steps):
        table, state = one_step(cfg, table, state, given, i)
    return table, state


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("row", [(V,), (2, 3)])
@pytest.mark.parametrize("cfg", CONFIGS + CLIPPED, ids=name_of)
def test_used_rows_move_as_in_the_dense_optimizer_and_others_stay(rng, cfg, row):
    table, steps = table_of(rng, row), records(rng)
    want, ever = oracle(cfg, table, steps, lr=0.1)
    assert 0 < ever.sum() < N
    got, state = after(cfg, table, steps)
    assert distance(got.reshape(N, V), want) < 1e-6
    np.testing.assert_array_equal(got[~ever], table[~ever])
    for kept in state.values():
        np.testing.assert_array_equal(kept[~ever], 0)


@pytest.mark.parametrize("cfg", CLIPPED, ids=name_of)
def test_state_of_a_row_waits_while_it_is_not_used(rng, cfg):
    table, (given, *_) = table_of(rng), records(rng)
    table, state = after(cfg, table, [given])
    elsewhere = (jnp.full((T, K), -1), *given[1:])
    kept = jax.tree.map(np.asarray, (table, state))
    jax.tree.map(np.testing.assert_array_equal, one_step(cfg, table, state, elsewhere, 1), kept)


def test_gradient_below_the_clip_norm_is_not_clipped(rng):
    table, steps = table_of(rng), records(rng, 1)
    norm = float(np.linalg.norm(dense_gradient(*steps[0])[0]))
    above, below, never = (
        after(RowAdagrad(eps=1.0, clip_norm=clip), table, steps)[0] for clip in (1.01 * norm, 0.5 * norm, None)
    )
    assert distance(above, never) < 1e-6 < 1e-3 < distance(below, never)


def test_first_moment_may_be_bfloat16(rng):
    table, steps = table_of(rng), records(rng)
    cfg = RowAdam(b1=0.8, b2=0.9, eps=1e-3, first_moment_dtype="bfloat16")
    got, state = after(cfg, table, steps)
    assert state["m"].dtype == jnp.bfloat16 and state["v"].dtype == jnp.float32
    want, _ = oracle(cfg, table, steps, lr=0.1)
    moved = np.asarray(table, np.float64) - want
    assert 1e-6 < distance(np.asarray(table, np.float64) - np.asarray(got, np.float64), moved) < 4e-3


def test_documented_size_of_the_state():
    table = jnp.zeros((N, V))

    def size(cfg):
        return sum(x.nbytes for x in init_rows(cfg, table).values())

    assert size(RowAdam()) == 8 * N * V
    assert size(RowAdam(first_moment_dtype="bfloat16")) == 6 * N * V
    assert size(RowAdagrad()) == 4 * N


@pytest.mark.parametrize("cfg", CONFIGS, ids=name_of)
def test_new_rows_of_a_bfloat16_table_are_right_on_average(rng, cfg):
    """Its rate is far below half a unit in the last place, so rounding to nearest would leave every row as it is."""
    table, (given, *_) = table_of(rng, dtype=jnp.bfloat16), records(rng)
    lr = 2.0**-12
    want, ever = oracle(cfg, table, [given], lr)
    state = init_rows(cfg, table)

    def new(seed):
        key = jax.random.key(seed)
        return update_rows(cfg, table, state, *given, lr=lr, step=0, scale=SCALE, key=key)[0].astype(jnp.float32)

    draws = 2048
    mean = np.asarray(jax.jit(jax.vmap(new))(jnp.arange(draws)), np.float64).mean(axis=0)
    old = np.asarray(table, np.float64)
    np.testing.assert_array_equal(mean[~ever], old[~ever])
    # One unit in the last place is 2^-8 of the number at most; a mean of draws that are one of two neighbours.
    error = np.abs(mean - want) / (2.0**-7 * np.abs(old) + 1e-30)
    assert error.max() < 5 * 0.5 / np.sqrt(draws)
    moved, wanted = (mean - old)[ever], (want - old)[ever]
    assert np.sum(moved * wanted) / np.sum(wanted**2) == pytest.approx(1, abs=0.1)


def test_rounding_keeps_what_bfloat16_holds_and_what_is_not_finite():
    x = jnp.array([1.0, -1.0, 0.0, -0.0, 3.0e38, jnp.inf, -jnp.inf, jnp.nan, 2.0**-130], jnp.float32)
    x = x.at[4].set(jnp.float32(jnp.bfloat16(3.0e38)))
    nan = jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32)  # all bits set: adding to it overflows
    for bits in (0, 0xFFFF, 0xFFFFFFFF):
        got = round_stochastically(x, jnp.full(x.shape, bits, jnp.uint32))
        np.testing.assert_array_equal(got.astype(jnp.float32), x)
        assert jnp.isnan(round_stochastically(nan, jnp.uint32(bits)))


def test_rounding_gives_the_two_neighbours_as_often_as_they_are_near():
    x = jnp.float32(-(1 + 3 / 8 * 2**-7))  # three eighths of the way between two bfloat16 numbers
    rounded = round_stochastically(jnp.full(2**16, x), jnp.arange(2**16, dtype=jnp.uint32))
    values, counts = np.unique(np.asarray(rounded, np.float32), return_counts=True)
    np.testing.assert_array_equal(values, np.float32([-(1 + 2**-7), -1]))
    np.testing.assert_array_equal(counts, [2**16 * 3 / 8, 2**16 * 5 / 8])


def test_random_bits_are_uniform_independent_and_the_same_for_every_part():
    key = jax.random.key(0)
    bits = np.asarray(random_bits(key, jnp.arange(300), jnp.arange(200)))
    part = random_bits(key, 100 + jnp.arange(7), 50 + jnp.arange(9))
    np.testing.assert_array_equal(part, bits[100:107, 50:59])
    low = (bits & 0xFFFF) / 2**16 - 0.5
    deviations = 5 / np.sqrt(12)
    assert abs(low.mean()) < deviations / np.sqrt(low.size)
    assert np.abs(low.mean(axis=0)).max() < deviations / np.sqrt(300)
    assert np.abs(low.mean(axis=1)).max() < deviations / np.sqrt(200)
    # Neighbours in a column, in a row, and across.
    for other in (low[1:, 1:], low[1:, :-1], low[:-1, 1:]):
        assert abs(np.mean(low[:-1, :-1] * other)) < 5 / 12 / np.sqrt(other.size)
    assert np.mean(bits == np.asarray(random_bits(jax.random.key(1), jnp.arange(300), jnp.arange(200)))) < 1e-3


@pytest.mark.parametrize(("dtype", "check_vma"), [(jnp.float32, True), (jnp.bfloat16, False)])
@pytest.mark.parametrize("cfg", CLIPPED, ids=name_of)
def test_table_cut_by_rows_and_columns_equals_one_device(rng, cfg, dtype, check_vma):
    table, steps = table_of(rng, dtype=dtype), records(rng)
    whole, whole_state = after(cfg, table, steps)
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Explicit,) * 2)
    cut = P("rows", "columns")
    layout = {"sum": P("rows"), "m": cut, "v": cut}

    def on_device(table, state, indices, weights, vectors, step):
        origin = tuple(jax.lax.axis_index(axis) * size for axis, size in zip(mesh.axis_names, table.shape, strict=True))
        return update_rows(
            cfg,
            table,
            state,
            indices - origin[0],
            weights,
            vectors,
            lr=0.1,
            step=step,
            scale=SCALE,
            key=jax.random.key(0),
            origin=origin,
            row_sum=lambda x: jax.lax.psum(x, "rows"),
            column_sum=lambda x: jax.lax.psum(x, "columns"),
        )

    with jax.set_mesh(mesh):
        table = jax.device_put(table, NamedSharding(mesh, cut))
        state = jax.jit(partial(init_rows, cfg))(table)
        for name, kept in state.items():
            assert kept.sharding.spec == layout[name]
        specs = cut, {name: layout[name] for name in state}
        in_specs = (*specs, P(), P(), P(None, "columns"), P())
        mapped = jax.shard_map(on_device, in_specs=in_specs, out_specs=specs, check_vma=check_vma)
        step = jax.jit(mapped, donate_argnums=(0, 1))
        for i, (indices, weights, vectors) in enumerate(steps):
            vectors = jax.device_put(vectors, NamedSharding(mesh, P(None, "columns")))
            table, state = step(table, state, indices, weights, vectors, i)
    for kept, want in zip(state.values(), whole_state.values(), strict=True):
        np.testing.assert_allclose(kept, want, rtol=1e-5, atol=1e-7)
    if dtype == jnp.float32:
        assert distance(table, whole) < 1e-6
    else:  # sums in another order may turn a rounding that was nearly even; other bits would turn half of all
        assert np.mean(np.asarray(table) != np.asarray(whole)) < 0.02


def test_own_rate_is_constant_and_a_multiplier_goes_with_the_schedule():
    steps = 11
    for step, base in ((0, 0.5), (5, 0.25), (10, 0.1)):
        assert learning_rate(RowAdam(lr=1e-3), base, step, steps) == 1e-3
        assert learning_rate(RowAdam(), base, step, steps) == base
        assert learning_rate(RowAdagrad(multiplier=3.0), base, step, steps) == 3 * base
    from_ten_to_one = RowAdam(multiplier=10.0, final_multiplier=1.0)
    rates = [float(learning_rate(from_ten_to_one, 2.0, jnp.int32(step), steps)) for step in (0, 5, 10)]
    assert rates == pytest.approx([20.0, 11.0, 2.0])
    assert learning_rate(from_ten_to_one, 2.0, 0, 1) == 20.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowAdam(lr=0.0), "lr=0.0: must be above 0"),
        (lambda: RowAdam(lr=1e-3, multiplier=10.0), "lr=0.001: is constant; leave it out, or multiplier"),
        (lambda: RowAdagrad(lr=1e-3, final_multiplier=1.0), "lr=0.001: is constant; leave it out, or multiplier"),
        (lambda: RowAdam(b2=1.0), "b2=1: must be below 1"),
        (lambda: RowAdam(first_moment_dtype="float16"), "first_moment_dtype='float16': must be one of"),
    ],
)
def test_config_that_makes_no_sense_is_an_error(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message)


def test_unknown_optimizer_names_the_known_ones():
    class Sign(TableOptimizer):
        pass

    with pytest.raises(ConfigError, match="Sign is not registered; known are RowAdam, RowAdagrad"):
        init_rows(Sign(), jnp.zeros((N, V)))


@pytest.mark.parametrize("kind", TABLE_OPTIMIZERS)
def test_repeated_steps_learn_a_table(rng, kind):
    """Rows are pulled towards a target: whatever the optimizer, the squared error falls."""
    target, table = table_of(rng), jnp.zeros((N, V))
    cfg, weights = kind(), jnp.ones((N, 1))
    state, indices = init_rows(cfg, table), jnp.arange(N)[:, None]

    def step(carry, i):
        table, state = carry
        return update_rows(
            cfg, table, state, indices, weights, table - target, lr=0.1, step=i, key=jax.random.key(0)
        ), jnp.sum((table - target) ** 2)

    _, errors = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(100)))((table, state))
    assert errors[-1] < errors[0] / 100
