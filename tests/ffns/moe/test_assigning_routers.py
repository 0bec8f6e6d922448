"""Routers where a token does not choose for itself: experts choose, its id does, or the layer before.

Letters: b batch, t time, n tokens (b t), d model width, x experts, k experts per token.
"""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config
from hybridlm.ffns.moe.routers.hashed import hashed_experts

B, T, D, X = 3, 9, 20, 4
KEY = jax.random.key(11)


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((B, T, D)).astype(np.float32)


def padding(rng: np.random.Generator) -> np.ndarray:
    real = rng.random((B, T)) < 0.7
    real[0] = [True, False] + [False] * (T - 2)  # fewer tokens than an expert may take
    return real


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 2.7, 4.0])
def test_expert_choice_is_its_equations(build: Any, agrees: Any, factor: float, rng: np.random.Generator) -> None:
    cfg = config.ExpertChoice(capacity_factor=factor, leaks_future=True)

    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        scores = softmax(x @ params["gate"]["w"])
        weights = np.zeros_like(scores)
        for b in range(B):
            tokens = [n for n in range(b * T, (b + 1) * T) if real[n]]
            for e in range(X):
                for n in sorted(tokens, key=lambda n: -scores[n, e])[: math.ceil(factor * T / X)]:
                    weights[n, e] = scores[n, e]
        return weights, {}

    agrees(build(cfg, X), oracle, inputs(rng), real=padding(rng), key=KEY)


@pytest.mark.parametrize(("factor", "k"), [(0.5, 1), (1.0, 1), (2.0, 2), (2.7, 3), (9.0, 4)])
def test_outside_training_tokens_take_their_best_experts(
    build: Any, agrees: Any, factor: float, k: int, rng: np.random.Generator
) -> None:
    cfg = config.ExpertChoice(capacity_factor=factor, leaks_future=True)

    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        scores = softmax(x @ params["gate"]["w"])
        kept = np.argsort(np.argsort(-scores, axis=1), axis=1) < k
        return np.where(kept & real[:, None], scores, 0.0), {}

    agrees(build(cfg, X), oracle, inputs(rng), real=padding(rng))


def test_expert_choice_is_in_balance_where_all_tokens_are_real(build: Any, rng: np.random.Generator) -> None:
    router = build(config.ExpertChoice(leaks_future=True), X, scale=2.0)
    routing, _, _ = router(inputs(rng), key=KEY)
    counts = np.bincount(np.asarray(routing.experts).reshape(-1), minlength=X + 1)[:X]
    np.testing.assert_array_equal(counts, B * math.ceil(2.0 * T / X))


def test_one_token_at_a_time_is_routed_alone(build: Any, rng: np.random.Generator) -> None:
    router, x = build(config.ExpertChoice(leaks_future=True), X), inputs(rng)
    together = router.dense(router(x)[0]).reshape(B, T, X)
    for t in range(T):
        alone = router.dense(router(x[:, t : t + 1])[0])
        np.testing.assert_allclose(alone, together[:, t], rtol=1e-6)
        np.testing.assert_array_equal(alone, router.dense(router(x[:, t : t + 1], key=KEY)[0]))


def fmix32(h: int) -> int:
    """The finaliser of MurmurHash3 in Python integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ (h >> shift)) * factor % 2**32
    return h


def hash_oracle(token: int, layer: int, k: int, x: int) -> list[int]:
    def combined(h: int, value: int) -> int:
        return fmix32((h * 0x9E3779B1 + fmix32((value + 0x9E3779B1) % 2**32)) % 2**32)

    left, chosen = list(range(x)), []
    for j in range(k):
        chosen.append(left.pop(combined(combined(token, layer), j) % len(left)))
    return chosen


def test_hashes_are_those_of_python(build: Any, rng: np.random.Generator) -> None:
    ids = rng.integers(0, 260_000, (B, T)).astype(np.int32)
    for k, layer in ((1, 0), (3, 5), (7, 31)):
        routing, losses, _ = build(config.HashRouter(k=k), 7)(inputs(rng), ids=ids, layer=layer)
        assert losses == {}
        expected = [hash_oracle(int(token), layer, k, 7) for token in ids.reshape(-1)]
        np.testing.assert_array_equal(routing.experts, expected)
        np.testing.assert_allclose(routing.weights, 1.0 / k)


def chi_squared(counts: np.ndarray) -> float:
    """Its mean is one less than the number of counts, its standard deviation about sqrt(2) times the root of that."""
    expected = counts.sum() / counts.size
    return float(np.sum(np.square(counts - expected)) / expected)


@pytest.mark.parametrize(("k", "x"), [(1, 64), (2, 60), (8, 64)])
def test_a_vocabulary_is_spread_evenly_over_experts(k: int, x: int) -> None:
    vocabulary = jnp.arange(50_000, dtype=jnp.int32)
    experts = np.asarray(hashed_experts(vocabulary, 3, k, x))
    assert all(len(set(row)) == k for row in experts)
    for j in range(k):
        counts = np.bincount(experts[:, j], minlength=x)
        assert chi_squared(counts) < x + 5 * np.sqrt(2 * x)


def test_layers_hash_independently() -> None:
    """All pairs of experts in two layers are as frequent."""
    vocabulary = jnp.arange(50_000, dtype=jnp.int32)
    first, second = (np.asarray(hashed_experts(vocabulary, layer, 1, 16))[:, 0] for layer in (0, 1))
    pairs = np.bincount(16 * first + second, minlength=256)
    assert chi_squared(pairs) < 256 + 5 * np.sqrt(2 * 256)


def chain(layers: list[Any], x: list[np.ndarray], params: list[Any] | None = None) -> tuple[list[Any], list[Any]]:
    """The routings and losses of layers that hand the carry on."""
    carry, routings, losses = layers[0].init_carry(B, T), [], []
    for i, (router, tokens) in enumerate(zip(layers, x, strict=True)):
        routing, loss, carry = router(tokens, params=None if params is None else params[i], carry=carry)
        routings.append(routing)
        losses.append(loss)
    return routings, losses


def test_a_layer_goes_by_the_choice_of_the_one_before(build: Any, rng: np.random.Generator) -> None:
    layers = [build(config.PreGated(router=config.TopK(k=2)), X) for _ in range(3)]
    plain = [build(config.TopK(k=2), X) for _ in range(3)]
    x = [inputs(rng) for _ in layers]
    routings, losses = chain(layers, x)
    own = [p(tokens, params=router.params["router"]) for p, tokens, router in zip(plain, x, layers, strict=True)]
    for used, expected in zip(routings, (own[0], own[0], own[1]), strict=True):
        np.testing.assert_array_equal(used.experts, expected[0].experts)
        np.testing.assert_allclose(used.weights, expected[0].weights, rtol=1e-6)
    for loss, (_, expected, _) in zip(losses, own, strict=True):
        assert loss.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(loss[name], value, rtol=1e-6)


def test_the_first_layer_is_trained_through_what_the_second_does(build: Any, rng: np.random.Generator) -> None:
    inner = config.TopK(k=2, balance_loss=0.0, z_loss=0.0)
    layers, x = [build(config.PreGated(router=inner), X) for _ in range(2)], [inputs(rng) for _ in range(2)]
    cotangent = rng.standard_normal((B * T, X))

    def second_layer(params: list[Any]) -> jax.Array:
        routings, _ = chain(layers, x, params)
        return jnp.sum(layers[0].dense(routings[1]) * cotangent)

    def alone(params: Any) -> jax.Array:
        plain = build(inner, X)
        return jnp.sum(plain.dense(plain(x[0], params=params)[0]) * cotangent)

    first, second = jax.grad(second_layer)([router.params for router in layers])
    expected = jax.grad(alone)(layers[0].params["router"])["gate"]["w"]
    np.testing.assert_allclose(first["router"]["gate"]["w"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(second["router"]["gate"]["w"], 0.0)


def test_the_carry_of_a_wrapped_gate_comes_along(build: Any) -> None:
    cfg = config.PreGated(router=config.GShardTop2(gate=config.RecurrentGate(state_dim=12)))
    router = build(cfg, X)
    carry = router.init_carry(B, T)
    shapes = {name: (a.shape, a.dtype.name) for name, a in carry.items()}
    assert shapes == {
        "pregate_experts": ((B, T, 2), "int32"),
        "pregate_weights": ((B, T, 2), "float32"),
        "pregate_ready": ((), "int32"),
        "router_state_12": ((B, T, 12), "float32"),
    }
    assert set(router.shared) == {"router_gru_12"}
    assert Counter(np.asarray(carry["pregate_experts"]).reshape(-1).tolist()) == {X: B * T * 2}
    _, _, after = router(np.ones((B, T, D), np.float32))
    assert {name: (a.shape, a.dtype.name) for name, a in after.items()} == shapes


def test_a_carry_keeps_its_shape_in_and_outside_training(build: Any, rng: np.random.Generator) -> None:
    router = build(config.PreGated(router=config.ExpertChoice(leaks_future=True, capacity_factor=1.0)), X)
    for key in (KEY, None):
        routing, _, carry = router(inputs(rng), key=key)
        assert routing.experts.shape == (B * T, X) and carry["pregate_experts"].shape == (B, T, X)
