"""Routers that begin dense and become sparse, each against its paper's equations in float64.

Letters: n tokens, d model width, x experts, k selectors or trees.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.moe.routers.permutation import nearest_permutation, sinkhorn
from hybridlm.ffns.moe.routers.smooth_step import entropy, smooth_step
from hybridlm.ffns.moe.routing import noise_key

B, T, D = 3, 5, 20
KEY = jax.random.key(5)


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((B, T, D)).astype(np.float32)


def padding(rng: np.random.Generator) -> np.ndarray:
    return rng.random((B, T)) < 0.8


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def told() -> Pass:
    """What layer 0 of a training step is told."""
    return Pass(tokens=jnp.zeros((B, T), jnp.int32), key=KEY, layer=jnp.int32(0))


def step_oracle(z: float, width: float) -> float:
    if abs(z) >= width / 2:
        return float(z > 0)
    return -2 * z**3 / width**3 + 3 * z / (2 * width) + 0.5


def entropy_oracle(p: np.ndarray) -> float:
    return -sum(q * np.log(q) for q in p if q > 0)


def dense_to_sparse_oracle(cfg: config.DenseToSparse, temperature: float, noise: Any = 0.0) -> Callable[..., Any]:
    def gelu(z: np.ndarray) -> np.ndarray:
        return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    activation = {"identity": lambda z: z, "sigmoid": sigmoid, "tanh": np.tanh, "gelu": gelu}[cfg.activation]

    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        logits = (activation(x @ params["gate"]["w"]) + noise) / temperature
        scores = np.array([softmax(row) for row in logits])
        weights = np.zeros_like(scores)
        for n in np.flatnonzero(real):
            order = sorted(range(scores.shape[1]), key=lambda e: -scores[n, e])[: cfg.max_experts]
            for e in order:
                if scores[n, e] > cfg.threshold or e == order[0]:
                    weights[n, e] = scores[n, e]
        if not cfg.balance_loss:
            return weights, {}
        share = (weights > 0).sum(axis=0) / (weights > 0).sum()
        loss = scores.shape[1] * np.sum(share * scores[real].mean(axis=0))
        return weights, {"moe_balance_loss": cfg.balance_loss * loss}

    return oracle


@pytest.mark.parametrize(
    ("cfg", "step", "temperature"),
    [
        (config.DenseToSparse(anneal_steps=40), 0, 2.0),
        (config.DenseToSparse(anneal_steps=40, threshold=0.1), 10, 2.0 - 1.7 / 4),
        (config.DenseToSparse(anneal_steps=40, balance_loss=0.1, max_experts=2), 40, 0.3),
        (config.DenseToSparse(anneal_steps=40, threshold=0.9), 1000, 0.3),
        (config.DenseToSparse(threshold=0.05), None, 0.3),
        (config.DenseToSparse(activation="tanh", anneal_steps=0, threshold=0.1), 0, 0.3),
        (config.DenseToSparse(activation="gelu", start_temperature=4.0, anneal_steps=10), 5, 2.15),
        (config.DenseToSparse(activation="sigmoid", end_temperature=0.1, threshold=0.2), None, 0.1),
    ],
    ids=str,
)
def test_dense_to_sparse_is_its_equations(
    build: Any, agrees: Any, cfg: config.DenseToSparse, step: int | None, temperature: float, rng: np.random.Generator
) -> None:
    agrees(build(cfg, 6), dense_to_sparse_oracle(cfg, temperature), inputs(rng), real=padding(rng), step=step)


def test_gumbel_noise_is_added_in_training_where_there_is_no_activation(
    build: Any, agrees: Any, rng: np.random.Generator
) -> None:
    noise = np.asarray(jax.random.gumbel(noise_key(told()), (B * T, 6)), np.float64)
    plain, activated = (config.DenseToSparse(activation=a, threshold=0.1) for a in ("identity", "tanh"))
    agrees(build(plain, 6), dense_to_sparse_oracle(plain, 2.0, noise), inputs(rng), key=KEY, step=0)
    agrees(build(activated, 6), dense_to_sparse_oracle(activated, 2.0), inputs(rng), key=KEY, step=0)


def test_noise_makes_an_expert_the_best_with_its_softmax_probability(build: Any, rng: np.random.Generator) -> None:
    draws, logits = 20_000, rng.standard_normal(6)
    params = {"gate": {"w": jnp.zeros((D, 6)).at[0].set(logits)}}
    routing, _, _ = build(config.DenseToSparse(), 6)(np.ones((1, draws, D)), params=params, key=KEY, step=0)
    share = np.bincount(np.asarray(routing.experts)[:, 0], minlength=6) / draws
    np.testing.assert_allclose(share, softmax(logits), atol=0.015)  # four standard deviations


def test_fewer_experts_are_left_as_the_temperature_falls(build: Any, rng: np.random.Generator) -> None:
    router, x = build(config.DenseToSparse(anneal_steps=100, threshold=0.05), 6, scale=0.2), inputs(rng)
    counts = [(np.asarray(router(x, step=step)[0].weights) > 0).sum() for step in (0, 50, 100, 200)]
    assert counts[0] > counts[1] > counts[2] == counts[3]
    assert counts[0] > 0.8 * B * T * 6


def test_the_smooth_step_is_its_definition() -> None:
    z = np.linspace(-2, 2, 81)
    for width in (0.5, 1.0, 3.0):
        got = smooth_step(jnp.asarray(z, jnp.float32), width)
        np.testing.assert_allclose(got, [step_oracle(float(a), width) for a in z], atol=1e-6)
        assert (np.asarray(got)[np.abs(z) > width / 2] % 1.0 == 0.0).all()
        slopes = np.asarray(jax.vmap(jax.grad(lambda a, width=width: smooth_step(a, width)))(jnp.asarray(z)))
        inside = np.abs(z) < width / 2
        expected = np.where(inside, -6 * z**2 / width**3 + 3 / (2 * width), 0.0)
        np.testing.assert_allclose(slopes, expected, atol=1e-5)


def test_the_entropy_of_certainty_is_0_with_a_gradient_of_0() -> None:
    value, gradient = jax.value_and_grad(lambda p: entropy(p))(jnp.array([0.0, 1.0, 0.0]))
    assert value == 0.0
    np.testing.assert_array_equal(gradient[np.array([0, 2])], 0.0)
    np.testing.assert_allclose(entropy(jnp.full((2, 4), 0.25)), np.log(4.0), rtol=1e-6)


def dselect_oracle(cfg: config.DSelectK, x: int) -> Callable[..., Any]:
    bits = int(np.ceil(np.log2(x)))

    def oracle(params: Any, tokens: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        z = (tokens @ params["w_code"] + params["b_code"]).reshape(-1, cfg.k, bits)
        mix = tokens @ params["w_mix"] + params["b_mix"]
        weights, entropies = np.zeros((len(tokens), x)), []
        for n in np.flatnonzero(real):
            for i in range(cfg.k):
                s = [step_oracle(z[n, i, j], cfg.smooth_step) for j in range(bits)]
                r = np.zeros(x)
                for e, code in enumerate(itertools.product((0, 1), repeat=bits)):
                    p = np.prod([s[j] if bit else 1 - s[j] for j, bit in enumerate(code)])
                    r[e if e < x else e - 2 ** (bits - 1)] += p
                weights[n] += softmax(mix[n])[i] * r
                entropies.append(entropy_oracle(r))
        losses = {"moe_entropy_loss": cfg.entropy_loss * float(np.mean(entropies))} if cfg.entropy_loss else {}
        return weights, losses

    return oracle


@pytest.mark.parametrize("x", [2, 3, 5, 8])
def test_dselect_is_its_equations(build: Any, agrees: Any, x: int, rng: np.random.Generator) -> None:
    for cfg in (config.DSelectK(smooth_step=4.0), config.DSelectK(k=1, entropy_loss=0.0)):
        agrees(build(cfg, x, scale=0.2), dselect_oracle(cfg, x), inputs(rng), real=padding(rng))


@pytest.mark.parametrize("x", [3, 6, 8])
def test_dselect_has_at_most_k_experts_once_codes_are_binary(build: Any, x: int, rng: np.random.Generator) -> None:
    router = build(config.DSelectK(k=2, smooth_step=1e-3), x)
    routing, losses, _ = router(inputs(rng))
    chosen = (np.asarray(routing.experts) < x).sum(axis=1)
    assert chosen.min() >= 1 and chosen.max() == 2
    np.testing.assert_allclose(np.sum(routing.weights, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(losses["moe_entropy_loss"], 0.0, atol=1e-9)


def comet_oracle(cfg: config.Comet, x: int, orders: np.ndarray) -> Callable[..., Any]:
    """`orders` [k, leaf, expert]."""

    def leaf_probabilities(steps: np.ndarray, node: int = 0, p: float = 1.0) -> dict[int, float]:
        if node >= x - 1:
            return {node - (x - 1): p}
        left = leaf_probabilities(steps, 2 * node + 1, p * steps[node])
        return left | leaf_probabilities(steps, 2 * node + 2, p * (1 - steps[node]))

    def oracle(params: Any, tokens: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        nodes = (tokens @ params["w_node"]).reshape(-1, cfg.k, x - 1)
        bonus = (tokens @ params["w_leaf"] + params["b_leaf"]).reshape(-1, cfg.k, x)
        weights, entropies = np.zeros((len(tokens), x)), []
        for n in np.flatnonzero(real):
            v = np.zeros((cfg.k, x))
            for i in range(cfg.k):
                p = leaf_probabilities(np.array([step_oracle(z, cfg.smooth_step) for z in nodes[n, i]]))
                v[i] = [p[leaf] * np.exp(bonus[n, i, leaf]) for leaf in range(x)]
                entropies.append(entropy_oracle(np.array(list(p.values()))))
            v /= v.sum()
            q = sum(v[i] @ orders[i] for i in range(cfg.k))
            weights[n] = q / q.sum()
        losses = {"moe_entropy_loss": cfg.entropy_loss * float(np.mean(entropies))} if cfg.entropy_loss else {}
        return weights, losses

    return oracle


def sinkhorn_oracle(scores: np.ndarray, steps: int) -> np.ndarray:
    p = np.exp(scores - scores.max(axis=(1, 2), keepdims=True))
    for _ in range(steps):
        p /= p.sum(axis=2, keepdims=True)
        p /= p.sum(axis=1, keepdims=True)
    return p


@pytest.mark.parametrize("x", [2, 3, 6, 8])
def test_comet_without_a_search_is_its_equations(build: Any, agrees: Any, x: int, rng: np.random.Generator) -> None:
    for cfg in (config.Comet(search_steps=0, smooth_step=4.0), config.Comet(k=1, search_steps=0, entropy_loss=0.0)):
        orders = np.tile(np.eye(x), (cfg.k, 1, 1))
        agrees(build(cfg, x, scale=0.2), comet_oracle(cfg, x, orders), inputs(rng), real=padding(rng))


@pytest.mark.parametrize(("key", "step", "temperature"), [(KEY, 0, 2.0), (KEY, 50, 0.2), (None, 25, 2.0 / 10**0.5)])
def test_comet_searches_by_sinkhorn_at_a_falling_temperature(
    build: Any, agrees: Any, key: Any, step: int, temperature: float, rng: np.random.Generator
) -> None:
    """Gradients reach the scores of the orders; noise is for training alone."""
    cfg = config.Comet(search_steps=100, smooth_step=4.0, start_temperature=2.0, end_temperature=0.02)
    noise = 0.0 if key is None else np.asarray(jax.random.gumbel(told().layer_key(), (2, 6, 6)), np.float64)

    def oracle(params: Any, tokens: np.ndarray, real: np.ndarray) -> Any:
        orders = sinkhorn_oracle((params["order"] + noise) / temperature, cfg.sinkhorn_steps)
        return comet_oracle(cfg, 6, orders)(params, tokens, real)

    agrees(build(cfg, 6, scale=0.2), oracle, inputs(rng), real=padding(rng), key=key, step=step)


def test_comet_ends_its_search_with_permutations(build: Any, rng: np.random.Generator) -> None:
    """From the last step of the search on they stay, and without a step they are what they then were."""
    router, x = build(config.Comet(search_steps=100, smooth_step=1e-3), 6), inputs(rng)
    during = router.dense(router(x, key=KEY, step=99)[0])
    after = [router.dense(router(x, key=key, step=step)[0]) for key, step in ((KEY, 100), (KEY, 500), (None, None))]
    assert not np.array_equal(during, after[0])
    np.testing.assert_array_equal(after[0], after[1])
    np.testing.assert_array_equal(after[0], after[2])
    assert (np.asarray(after[0]) > 0).sum(axis=1).max() == 2  # a leaf of each tree

    def objective(params: Any) -> jax.Array:
        return jnp.sum(jnp.square(router.dense(router(x, params=params, key=KEY, step=100)[0])))

    np.testing.assert_array_equal(jax.grad(objective)(router.params)["order"], 0.0)


def test_trees_order_their_leaves_each_in_its_own_way(build: Any) -> None:
    """Tokens that all go to the first leaf meet the expert that the tree's order gives it."""
    cfg = config.Comet(k=2, search_steps=10)
    router = build(cfg, 4)
    orders = jnp.stack([jnp.eye(4)[jnp.array(to)] for to in ([2, 0, 3, 1], [1, 2, 0, 3])])
    params = jax.tree.map(jnp.zeros_like, router.params) | {"order": orders}
    params["w_node"] = jnp.full_like(params["w_node"], 1.0)  # to the left everywhere
    weights = router.dense(router(np.ones((1, 1, D)), params=params)[0])
    np.testing.assert_allclose(weights, [[0.0, 0.5, 0.5, 0.0]])


def test_sinkhorn_makes_rows_and_columns_sum_to_1(rng: np.random.Generator) -> None:
    scores = rng.standard_normal((3, 7, 7))
    got = np.exp(sinkhorn(jnp.asarray(scores, jnp.float32), 30))
    np.testing.assert_allclose(got, sinkhorn_oracle(scores, 30), rtol=1e-4)
    np.testing.assert_allclose(got.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(got.sum(axis=2), 1.0, rtol=1e-4)


def test_the_nearest_permutation_is_a_greedy_matching(rng: np.random.Generator) -> None:
    scores = rng.standard_normal((4, 9, 9)).astype(np.float32)
    expected = np.zeros_like(scores)
    for i, matrix in enumerate(scores.copy()):
        for _ in range(9):
            row, column = np.unravel_index(np.argmax(matrix), matrix.shape)
            expected[i, row, column] = 1.0
            matrix[row], matrix[:, column] = -np.inf, -np.inf
    got = np.asarray(nearest_permutation(jnp.asarray(scores)))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got.sum(axis=1), 1.0)
    np.testing.assert_array_equal(got.sum(axis=2), 1.0)


def test_rounding_gives_a_permutation_back(rng: np.random.Generator) -> None:
    permutation = np.eye(8, dtype=np.float32)[rng.permutation(8)][None]
    noisy = permutation + 0.3 * rng.random((1, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(nearest_permutation(sinkhorn(jnp.asarray(noisy) / 0.01, 20)), permutation)
