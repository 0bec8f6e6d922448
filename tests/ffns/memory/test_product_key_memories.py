"""ProductKeyMemory, MemoryPlus and PEER against a comparison with every row, in float64.

Letters: n tokens, d model width, h heads, e query width, r half keys of an axis, k rows per head, v row width.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm import config
from hybridlm.mixers.base import Segments

PKM = config.ProductKeyMemory(num_rows=64, top_k=5, num_heads=3, key_dim=6)
CASES = {
    "memory, batch norm": PKM,
    "memory, layer norm": config.ProductKeyMemory(num_rows=49, top_k=7, num_heads=2, key_dim=4, query_norm="layer"),
    "memory, no norm": config.ProductKeyMemory(num_rows=25, top_k=2, num_heads=2, key_dim=4, query_norm="none"),
    "memory plus": config.MemoryPlus(num_rows=36, top_k=4, num_heads=2, value_dim=10),
    "memory plus, normed": config.MemoryPlus(num_rows=36, top_k=4, num_heads=2, key_dim=8, qk_norm=True),
    "experts": config.PEER(num_rows=64, top_k=4, num_heads=2, key_dim=6),
}
cases = pytest.mark.parametrize("cfg", [pytest.param(cfg, id=name) for name, cfg in CASES.items()])


def oracle(
    cfg: Any, params: Any, tables: dict[str, np.ndarray], x: np.ndarray, real: np.ndarray, training: bool
) -> tuple[np.ndarray, dict[str, float]]:
    rows, weights = found(cfg, params["retrieval"], x, real, training)
    y = np.zeros((len(x), x.shape[1] if isinstance(cfg, config.PEER) else next(iter(tables.values())).shape[1]))
    for n, head, place in np.ndindex(rows.shape):
        row, weight = rows[n, head, place], weights[n, head, place]
        if isinstance(cfg, config.PEER):
            down, up = (tables[name] for name in sorted(tables))
            y[n] += weight * gelu(down[row] @ x[n]) * up[row]
        else:
            y[n] += weight * next(iter(tables.values()))[row]
    y *= real[:, None]
    if isinstance(cfg, config.MemoryPlus):
        gate = x @ params["gate"]["w"]
        y = (y * gate / (1 + np.exp(-gate))) @ params["down"]["w"]
    return y, {}


def found(cfg: Any, params: Any, x: np.ndarray, real: np.ndarray, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and softmax weights [n, h, k], by comparing each query with every row."""
    queries = (x @ params["w_query"]).reshape(len(x), cfg.num_heads, -1)
    norm, keys = params.get("query_norm", {}), params["keys"]
    if getattr(cfg, "qk_norm", False):
        queries = rms_norm(queries.reshape(*queries.shape[:2], 2, -1), norm["norm"]["scale"]).reshape(queries.shape)
        keys = rms_norm(keys, params["key_norm"]["scale"])
    elif getattr(cfg, "query_norm", "none") != "none":
        mean, variance = {
            "layer": (queries.mean(-1, keepdims=True), queries.var(-1, keepdims=True)),
            "batch": (queries[real].mean(0), queries[real].var(0))
            if training
            else (norm.get("running_mean"), norm.get("running_variance")),
        }[cfg.query_norm]
        queries = (queries - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]
    first, second = np.split(queries, 2, axis=-1)
    grid = np.einsum("nhe,hie->nhi", first, keys[0])[..., None] + np.einsum("nhe,hje->nhj", second, keys[1])[:, :, None]
    scores = grid.reshape(*grid.shape[:2], -1)
    rows = np.argsort(-scores, axis=-1)[..., : cfg.top_k]
    best = np.exp(np.take_along_axis(scores, rows, axis=-1))
    return rows, best / best.sum(-1, keepdims=True)


def rms_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * (1 + scale)


def gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


@cases
def test_layer_equals_a_comparison_with_every_row(cfg: config.Memory, build: Any, agrees: Callable[..., None]) -> None:
    agrees(build(cfg), oracle)


def test_in_training_queries_are_normed_over_the_real_tokens(build: Any, agrees: Callable[..., None]) -> None:
    agrees(build(PKM), oracle, training=True)


@pytest.mark.parametrize("num_tables", [None, 1])
def test_layers_read_a_table_of_their_own_or_share_one(
    num_tables: int | None, build: Any, agrees: Callable[..., None]
) -> None:
    agrees(build(config.MemoryPlus(num_rows=36, top_k=3, num_heads=2, num_tables=num_tables), 2), oracle)


def test_running_statistics_move_towards_those_of_the_batch(build: Any, rng: np.random.Generator) -> None:
    built = build(PKM)
    x, real = rng.standard_normal((8, 5, 12)).astype(np.float32), np.arange(5) < np.arange(1, 9)[:, None]
    ids = real.astype(np.int32)
    (d_params, _), _ = built.gradients(x, Segments(ids, ids), np.zeros((1, *x.shape), np.float32), training=True)
    params, gradient = (tree["layers"][0]["retrieval"] for tree in (built.params, d_params))
    queries = (x[real] @ params["w_query"]).reshape(-1, 3, 6)
    for name, value in (("running_mean", queries.mean(0)), ("running_variance", queries.var(0))):
        moved = params["query_norm"][name] - np.asarray(gradient["query_norm"][name])
        np.testing.assert_allclose(moved, value, atol=1e-5)


def test_term_that_moves_running_statistics_is_zero(build: Any, rng: np.random.Generator) -> None:
    x, ids = rng.standard_normal((8, 5, 12)).astype(np.float32), np.ones((8, 5), np.int32)
    _, [aux] = build(PKM)(x, Segments(ids, ids), training=True)
    assert {name: float(value) for name, value in aux.items()} == {"memory_statistics_loss": 0.0}


@cases
def test_bfloat16_activations_change_little(cfg: config.Memory, bfloat16_errors: Any) -> None:
    # Where the last of the k rows is another one, a token differs by more than rounding: so the median over tokens.
    assert np.median(bfloat16_errors(cfg)) < 1e-2


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), pytest.param((2, 2, 2, 1), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["memory, batch norm", "memory plus, normed", "experts"])
def test_mesh_gives_what_one_device_gives(
    name: str, shape: tuple[int, ...], build: Any, same_on_a_mesh: Callable[..., None]
) -> None:
    cfg = CASES[name]
    if isinstance(cfg, config.MemoryPlus):
        cfg = config.MemoryPlus(num_rows=64, top_k=4, num_heads=2, key_dim=8, qk_norm=True)
    same_on_a_mesh(build(cfg), shape, training=True)


def test_gradient_of_a_shared_table_is_the_sum_over_layers(build: Any, rng: np.random.Generator) -> None:
    built = build(config.MemoryPlus(num_rows=36, top_k=3, num_heads=2), 2)
    x, ids = rng.standard_normal((8, 5, 12)).astype(np.float32), np.ones((8, 5), np.int32)
    cotangent = rng.standard_normal((2, *x.shape)).astype(np.float32)

    def of_table(cotangent: np.ndarray) -> np.ndarray:
        (d_params, _), _ = built.gradients(x, Segments(ids, ids), cotangent)
        return np.asarray(jax.tree.leaves(d_params["shared"])[0])

    first, second = np.zeros_like(cotangent), np.zeros_like(cotangent)
    first[0], second[1] = cotangent[0], cotangent[1]
    np.testing.assert_allclose(of_table(cotangent), of_table(first) + of_table(second), atol=1e-5)
