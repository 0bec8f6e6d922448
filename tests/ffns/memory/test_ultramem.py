"""UltraMem against its formulas in float64, its search, its permutation of virtual rows, and its start.

Letters: n tokens, h heads, c cores, r ranks, g grid side, e key width, k rows per head, v row width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import Pass
from hybridlm.ffns.memory import key_search
from hybridlm.ffns.memory.tucker import first_score, leading, tucker_loss, tucker_top_k
from hybridlm.ffns.memory.ultramem import UltraMem, shuffled
from hybridlm.mixers.base import Context, Segments

SMALL = config.UltraMem(num_rows=16, top_k=5, key_dim=6, value_dim=8)
CASES = {
    "published": SMALL,
    "three ranks, one core": config.UltraMem(
        num_rows=25, top_k=4, key_dim=5, value_dim=6, num_heads=1, tucker_rank=3, num_cores=1, expansion=1
    ),
    "nine projectors, three cores": config.UltraMem(
        num_rows=9, top_k=3, key_dim=4, value_dim=6, num_heads=3, num_cores=3, expansion=9, tucker_loss=0.5
    ),
    "one rank": config.UltraMem(num_rows=36, top_k=6, key_dim=4, tucker_rank=1, tucker_margin=0.0),
}
cases = pytest.mark.parametrize("cfg", [pytest.param(cfg, id=name) for name, cfg in CASES.items()])


def standardized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def oracle(
    cfg: config.UltraMem,
    params: Any,
    tables: dict[str, np.ndarray],
    x: np.ndarray,
    real: np.ndarray,
    training: bool,
) -> tuple[np.ndarray, dict[str, float]]:
    [table] = tables.values()
    rows = table.reshape(cfg.num_rows, cfg.num_cores, -1)
    queries = standardized((x @ params["w_query"]).reshape(len(x), 2, -1)) * params["query_scale"]
    keys = standardized(params["keys"]) * params["key_scale"][:, None, None, None]
    o = np.zeros((len(x), cfg.expansion, *rows.shape[1:]))
    physical = permutation(cfg)
    for head, cores in enumerate(params["cores"]):
        for n, virtual, scores in selected(queries, keys[:, head], cores, cfg.top_k):
            row, projector = physical[virtual]
            o[n, projector] += scores[:, None] * rows[row]
    y = (o.reshape(len(x), -1) @ params["w_out"]) * real[:, None]
    values = np.linalg.svd(params["cores"].sum(1), compute_uv=False)[:, 1:]
    if cfg.tucker_rank == 1:
        return y, {}
    excess = np.sum(np.maximum(values - cfg.tucker_margin, 0) ** 2)
    return y, {"ultramem_tucker_loss": cfg.tucker_loss / (cfg.tucker_rank - 1) * excess}


def selected(queries: np.ndarray, keys: np.ndarray, cores: np.ndarray, k: int) -> Any:
    """(token, virtual row, score by each core) of every selection of one head."""
    whole, side = cores.sum(0), keys.shape[2]
    u, _, t = np.linalg.svd(whole)
    u, t = u[:, 0], t[0]
    sign = 1.0 if u.sum() + t.sum() >= 0 else -1.0
    for n, (of_row, of_column) in enumerate(queries):
        first, second = keys[0] @ of_row, keys[1] @ of_column  # r g
        near_rows, near_columns = np.argsort(-sign * (u @ first))[:k], np.argsort(-sign * (t @ second))[:k]
        by_core = np.einsum("cab,ai,bj->cij", cores, first, second)
        grid = by_core.sum(0)
        best = sorted(((grid[i, j], i, j) for i in near_rows for j in near_columns), reverse=True)[:k]
        for _, i, j in best:
            yield n, i * side + j, by_core[:, i, j]


def permutation(cfg: config.UltraMem) -> list[tuple[int, int]]:
    """Row and projector of each virtual row."""
    virtual = jnp.arange(cfg.searched_keys**2, dtype=jnp.int32)
    parts = shuffled(virtual, cfg.half_keys, math.isqrt(cfg.expansion))
    return list(zip(*(np.asarray(part).tolist() for part in parts), strict=True))


@cases
def test_layer_equals_its_formulas(cfg: config.UltraMem, build: Any, agrees: Callable[..., None]) -> None:
    agrees(build(cfg), oracle, training=True)


@pytest.mark.parametrize("num_tables", [None, 1])
def test_layers_read_a_table_of_their_own_or_share_one(
    num_tables: int | None, build: Any, agrees: Callable[..., None]
) -> None:
    cfg = config.UltraMem(num_rows=9, top_k=2, key_dim=4, value_dim=4, num_heads=1, num_tables=num_tables)
    agrees(build(cfg, 2), oracle)


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), pytest.param((1, 2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_mesh_gives_what_one_device_gives(
    shape: tuple[int, ...], build: Any, same_on_a_mesh: Callable[..., None]
) -> None:
    same_on_a_mesh(build(SMALL), shape, training=True)


def test_search_in_blocks_of_keys_equals_its_formula(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_search, "BLOCK", 8)
    monkeypatch.setattr(key_search, "CHUNK_BYTES", 4096)
    queries, keys = rng.standard_normal((21, 2, 4)), rng.standard_normal((2, 3, 2, 27, 4))
    cores = rng.uniform(size=(3, 2, 2, 2))
    arguments = (jnp.asarray(a, jnp.float32) for a in (queries, keys, cores))
    scores, rows = jax.jit(lambda *a: tucker_top_k(*a, 5))(*arguments)
    for head in range(3):
        found = list(selected(queries, keys[:, head], cores[head], 5))
        np.testing.assert_array_equal(rows[:, head].ravel(), [row for _, row, _ in found])
        want = np.reshape([s for _, _, s in found], (21, 5, 2))
        np.testing.assert_allclose(np.swapaxes(scores[:, head], 1, 2), want, rtol=1e-4, atol=1e-5)


def test_search_finds_the_best_rows_where_the_core_has_rank_1(rng: np.random.Generator) -> None:
    queries, keys = rng.uniform(size=(9, 2, 4)), rng.uniform(size=(2, 1, 2, 30, 4))
    core = np.outer(*rng.uniform(size=(2, 2)))[None, None]
    arguments = (jnp.asarray(a, jnp.float32) for a in (queries, keys, core))
    _, rows = jax.jit(lambda *a: tucker_top_k(*a, 6))(*arguments)
    first, second = (np.einsum("ne,rge->nrg", queries[:, axis], keys[axis, 0]) for axis in range(2))
    grid = np.einsum("ab,nai,nbj->nij", core[0, 0], first, second).reshape(9, -1)
    np.testing.assert_array_equal(rows[:, 0], np.argsort(-grid, axis=-1)[:, :6])


def test_leading_vectors_give_the_matrix_back_and_keep_their_sign(rng: np.random.Generator) -> None:
    matrices = jnp.asarray(rng.standard_normal((20, 3, 3)), jnp.float32)
    u, values, t = leading(matrices)
    np.testing.assert_allclose(jnp.einsum("nai,ni,nbi->nab", u, values, t), matrices, atol=1e-5)
    assert np.all(np.sum(u[..., 0] + t[..., 0], axis=-1) >= 0.0)
    path = jnp.asarray(rng.uniform(size=(2, 2)) + 0.1 * np.linspace(0, 1, 50)[:, None, None], jnp.float32)
    first = leading(path)[0][:, :, 0]
    assert np.max(np.abs(np.diff(first, axis=0))) < 0.1  # a change of sign would be near 2


def test_tucker_loss_is_that_of_singular_values_over_the_margin() -> None:
    turned = np.array([[0.6, -0.8], [0.8, 0.6]])
    cores = jnp.asarray(np.stack([turned @ np.diag([3.0, 0.5]), np.diag([2.0, 0.1]) @ turned])[:, None], jnp.float32)
    np.testing.assert_allclose(tucker_loss(cores, 0.15), 0.35**2, rtol=1e-5)
    assert tucker_loss(cores[:, :, :1, :1], 0.15) == 0.0


@pytest.mark.parametrize("half_keys, per_axis", [(7, 2), (16, 3), (64, 2), (13, 1)])
def test_virtual_rows_are_shuffled_one_to_one_and_seldom_share_a_key(half_keys: int, per_axis: int) -> None:
    side = half_keys * per_axis
    row, projector = (np.asarray(a) for a in shuffled(jnp.arange(side**2, dtype=jnp.int32), half_keys, per_axis))
    assert len(np.unique(row * per_axis**2 + projector)) == side**2
    assert row.max() == half_keys**2 - 1
    assert projector.max() == per_axis**2 - 1
    order = np.argsort(row * per_axis**2 + projector).reshape(-1, per_axis**2)  # of each row, its virtual rows
    keys = np.stack([order // side, order % side])
    same = keys[..., :, None] == keys[..., None, :]
    if per_axis > 1:
        pairs = same[..., ~np.eye(per_axis**2, dtype=bool)]
        assert np.mean(pairs) < 2 / side  # by chance: 1 / side


def test_scores_are_1_and_outputs_small_at_first(rng: np.random.Generator) -> None:
    d, num_layers = 64, 4
    cfg = config.UltraMem(num_rows=24**2, top_k=8)
    context = Context(d, num_layers, 1e-6, jnp.dtype(jnp.float32), config.Kernels(), (cfg,))
    rngs = nnx.Rngs(params=jax.random.key(0))
    layer, shared = UltraMem(cfg, context, rngs), UltraMem.shared(cfg, context, rngs)
    x, ids = rng.standard_normal((2, 64, d)).astype(np.float32), jnp.ones((2, 64), jnp.int32)
    given = Pass(ids, shared=shared)
    y, aux, _ = layer(jnp.asarray(x), Segments(ids, ids), {}, given)
    assert aux.keys() == {"ultramem_tucker_loss"}
    assert 0.3 < np.var(y) * 2 * num_layers < 3.0
    # Two sets of keys and cores, so that their mean is near 1 only roughly.
    table = shared["memory_0"]
    table.table[...] = jnp.ones_like(table.table[...])
    layer.w_out[...] = jnp.ones_like(layer.w_out[...]) / (cfg.num_heads * cfg.top_k * d // 2)
    y, _, _ = layer(jnp.asarray(x), Segments(ids, ids), {}, given)
    np.testing.assert_allclose(np.mean(y), 1.0, atol=0.3)


def test_first_score_is_the_mean_of_many_draws(rng: np.random.Generator) -> None:
    scores = []
    for _ in range(20):
        queries = rng.standard_normal((4, 2, 8))
        keys = rng.standard_normal((2, 2, 48, 8)) / np.sqrt(np.sum(queries[0, 0] ** 2))
        cores = rng.uniform(size=(2, 2, 2))
        scores += [s for n, _, s in selected(queries[:1, [0, 0]], keys, cores, 8)]
    assert first_score(48, 8, 2, 2) == pytest.approx(np.mean(scores), rel=0.25)


def test_bfloat16_activations_change_little(bfloat16_errors: Any) -> None:
    assert np.median(bfloat16_errors(SMALL)) < 2e-2  # scores are products of two rounded ones


def test_width_that_does_not_divide_into_cores_is_refused() -> None:
    context = Context(9, 1, 1e-6, jnp.dtype(jnp.float32), config.Kernels())
    with pytest.raises(ConfigError, match="value_dim=4: must divide by num_cores=3"):
        UltraMem.shared(config.UltraMem(num_cores=3), context, nnx.Rngs(params=jax.random.key(0)))
