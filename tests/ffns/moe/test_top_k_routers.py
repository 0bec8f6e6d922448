"""Routers that take the best experts, each against its paper's equations in float64.

Letters: n tokens, d model width, x experts, k experts per token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.moe.routing import noise_key, report_load

B, T, D, X = 3, 5, 20, 8
KEY = jax.random.key(3)
DRAWS = 20_000
"""Of noise: a share is then within 1 % of its probability, at four standard deviations."""


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((B, T, D)).astype(np.float32)


def padding(rng: np.random.Generator) -> np.ndarray:
    return rng.random((B, T)) < 0.8


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def best(scores: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


def switch_loss(scores: np.ndarray, choices: list[list[int]], tokens: np.ndarray) -> float:
    """x sum_e f_e P_e: f the share of all choices, P the mean score over `tokens` (their indices)."""
    x = scores.shape[1]
    total = sum(len(choices[n]) for n in tokens)
    loss = 0.0
    for e in range(x):
        chosen = sum(e in choices[n] for n in tokens)
        loss += x * chosen / total * np.mean([scores[n, e] for n in tokens])
    return loss


SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": softmax,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}


def top_k_oracle(cfg: config.TopK) -> Callable[..., Any]:
    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        logits = x @ params["gate"]["w"]
        scores = np.array([SCORES[cfg.score](row) for row in logits])
        weights = np.zeros_like(scores)
        choices: list[list[int]] = [[] for _ in x]
        for n in np.flatnonzero(real):
            preference = scores[n] + params.get("balance_bias", 0.0)
            groups = preference.reshape(cfg.num_groups, -1)
            m = cfg.top_groups or cfg.num_groups
            affinity = np.array([np.sort(g)[::-1][: max(cfg.k // m, 1)].sum() for g in groups])
            per_group = groups.shape[1]
            allowed = [e for g in best(affinity, m) for e in range(g * per_group, (g + 1) * per_group)]
            choices[n] = sorted(allowed, key=lambda e: -preference[e])[: cfg.k]
            for e in choices[n]:
                norm = sum(scores[n, i] for i in choices[n]) if cfg.renormalize else 1.0
                weights[n, e] = cfg.scale * scores[n, e] / norm
        shares = scores / scores.sum(axis=1, keepdims=True)
        tokens, losses = np.flatnonzero(real), {}
        if cfg.balance_loss:
            losses["moe_balance_loss"] = cfg.balance_loss * switch_loss(shares, choices, tokens)
        if cfg.sequence_balance_loss:
            sequences = [tokens[tokens // T == b] for b in range(B)]
            per_sequence = [switch_loss(shares, choices, s) for s in sequences if len(s)]
            losses["moe_sequence_balance_loss"] = cfg.sequence_balance_loss * np.mean(per_sequence)
        if cfg.z_loss:
            z = [np.log(np.sum(np.exp(logits[n]))) ** 2 for n in tokens]
            losses["moe_z_loss"] = cfg.z_loss * np.mean(z)
        return weights, losses

    return oracle


@pytest.mark.parametrize(
    "cfg",
    [
        config.TopK(),
        config.TopK(k=1, renormalize=False, score="sigmoid"),
        config.TopK(k=3, renormalize=False),
        config.TopK(k=X, score="sigmoid", scale=2.5),
        config.TopK(k=4, score="sqrt_softplus", sequence_balance_loss=1e-2, balance_loss=0.0),
        config.TopK(k=4, score="sigmoid", bias_balance=True, num_groups=4, top_groups=2, z_loss=0.0),
        config.TopK(k=3, num_groups=2, top_groups=2, sequence_balance_loss=1e-2),
        config.TopK(k=1, score="softmax", num_groups=4, top_groups=3),
    ],
    ids=lambda cfg: f"{cfg.score}-{cfg.k}-of-{cfg.num_groups}-groups",
)
def test_top_k_is_its_equations(build: Any, agrees: Any, cfg: config.TopK, rng: np.random.Generator) -> None:
    agrees(build(cfg, X), top_k_oracle(cfg), inputs(rng), real=padding(rng))


def test_quotients_of_scores_survive_their_underflow(build: Any, rng: np.random.Generator) -> None:
    """Logits near -300, where every sigmoid is 0 in float32."""
    for score, power in (("sigmoid", 1.0), ("sqrt_softplus", 0.5)):
        router = build(config.TopK(k=X, score=score), X)
        logits = rng.standard_normal(X) - 300.0
        x = np.zeros((1, 1, D), np.float32)
        x[0, 0, 0] = 1.0
        params = {"gate": {"w": jnp.zeros((D, X)).at[0].set(logits)}}
        routing, _, _ = router(x, params=params)
        np.testing.assert_allclose(router.dense(routing)[0], softmax(power * logits), rtol=1e-4)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_gradient_of_the_balance_bias_is_the_excess_of_load(
    build: Any, microbatches: int, rng: np.random.Generator
) -> None:
    cfg = config.TopK(k=3, score="sigmoid", bias_balance=True)
    router = build(cfg, X)
    x, real = rng.standard_normal((4, T, D)).astype(np.float32), rng.random((4, T)) < 0.8

    def objective(params: Any, x: Any, real: Any) -> jax.Array:
        routing, losses, _ = router(x, real, params=params)
        return 1e-3 * jnp.sum(jnp.square(routing.weights)) + sum(losses.values())

    parts = zip(np.split(x, microbatches), np.split(real, microbatches), strict=True)
    gradients = [jax.grad(objective)(router.params, *part)["balance_bias"] for part in parts]
    experts = np.asarray(router(x, real)[0].experts)
    counts = np.array([(experts == e).sum() for e in range(X)])
    assert counts.sum() == 3 * real.sum()
    np.testing.assert_allclose(sum(gradients), counts - counts.mean(), rtol=1e-6)


def test_reporting_a_load_leaves_weights_and_their_gradients_alone(rng: np.random.Generator) -> None:
    weights, bias, excess = rng.random((6, 2)), rng.random(4), np.array([2.0, -1.0, 0.5, -1.5])
    value, back = jax.vjp(report_load, *(jnp.asarray(a, jnp.float32) for a in (weights, bias, excess)))
    np.testing.assert_array_equal(value, weights.astype(np.float32))
    d_weights, d_bias, d_excess = back(2.0 * value)
    np.testing.assert_array_equal(d_weights, 2.0 * value)
    np.testing.assert_array_equal(d_bias, excess)
    np.testing.assert_array_equal(d_excess, 0.0)


def test_the_balance_bias_selects_and_is_in_no_weight(build: Any, rng: np.random.Generator) -> None:
    router, x = build(config.TopK(k=2, score="sigmoid", bias_balance=True), X), inputs(rng)
    bias = jnp.zeros(X).at[jnp.array([2, 5])].set(10.0)
    routing, _, _ = router(x, params=router.params | {"balance_bias": bias})
    assert set(np.asarray(routing.experts).reshape(-1)) == {2, 5}
    logits = x.reshape(-1, D) @ np.asarray(router.params["gate"]["w"], np.float64)
    scores = SCORES["sigmoid"](logits)
    np.testing.assert_allclose(router.dense(routing)[:, 2], scores[:, 2] / (scores[:, 2] + scores[:, 5]), rtol=1e-5)


def switch_oracle(cfg: config.Switch, jitter: np.ndarray | float) -> Callable[..., Any]:
    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        logits = (x * jitter) @ params["gate"]["w"]
        scores = np.array([softmax(row) for row in logits])
        choices = [best(row, 1) for row in scores]
        weights = np.zeros_like(scores)
        tokens = np.flatnonzero(real)
        for n in tokens:
            weights[n, choices[n][0]] = scores[n, choices[n][0]]
        losses = {"moe_balance_loss": cfg.balance_loss * switch_loss(scores, choices, tokens)}
        if cfg.z_loss:
            losses["moe_z_loss"] = cfg.z_loss * np.mean([np.log(np.sum(np.exp(logits[n]))) ** 2 for n in tokens])
        return weights, losses

    return oracle


def test_switch_is_its_equations(build: Any, agrees: Any, rng: np.random.Generator) -> None:
    for cfg in (config.Switch(), config.Switch(z_loss=0.01)):
        agrees(build(cfg, X), switch_oracle(cfg, 1.0), inputs(rng), real=padding(rng))


def test_switch_multiplies_its_input_by_noise_in_training(build: Any, agrees: Any, rng: np.random.Generator) -> None:
    cfg = config.Switch(jitter=0.2)
    jitter = jax.random.uniform(noise_key(told()), (B * T, D), minval=0.8, maxval=1.2)
    oracle = switch_oracle(cfg, np.asarray(jitter, np.float64))
    agrees(build(cfg, X), oracle, inputs(rng), real=padding(rng), key=KEY)


def test_jitter_is_uniform(build: Any) -> None:
    """Of two experts with the logits u and 0, log(p_1 / p_2) is the noise u."""
    router = build(config.Switch(jitter=0.25), 2)
    x = np.ones((1, DRAWS, D), np.float32)
    params = {"gate": {"w": jnp.zeros((D, 2)).at[0, 0].set(1.0)}}
    p = np.asarray(router(x, params=params, key=KEY)[0].weights)[:, 0].astype(float)
    u = np.log(p / (1 - p))
    assert u.min() > 0.75 - 1e-5 and u.max() < 1.25 + 1e-5
    assert stats.kstest(u, stats.uniform(0.75, 0.5).cdf).pvalue > 1e-3


def gshard_oracle(cfg: config.GShardTop2, drawn: np.ndarray) -> Callable[..., Any]:
    """`drawn` in [0, 1) decides upon the second expert."""

    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        scores = np.array([softmax(row) for row in x @ params["gate"]["w"]])
        weights = np.zeros_like(scores)
        choices: list[list[int]] = [[] for _ in x]
        for n in np.flatnonzero(real):
            first, second = best(scores[n], 2)
            choices[n] = [first]
            norm = scores[n, first] + scores[n, second]
            weights[n, first] = scores[n, first] / norm
            if 2 * scores[n, second] / norm > drawn[n]:
                weights[n, second] = scores[n, second] / norm
        loss = switch_loss(scores, choices, np.flatnonzero(real))
        return weights, {"moe_balance_loss": cfg.balance_loss * loss}

    return oracle


def test_gshard_is_its_algorithm(build: Any, agrees: Any, rng: np.random.Generator) -> None:
    cfg = config.GShardTop2()
    agrees(build(cfg, X), gshard_oracle(cfg, np.zeros(B * T)), inputs(rng), real=padding(rng))
    drawn = np.asarray(jax.random.uniform(noise_key(told()), (B * T,)), np.float64)
    agrees(build(cfg, X, scale=0.6), gshard_oracle(cfg, drawn), inputs(rng), real=padding(rng), key=KEY)


def test_the_second_expert_is_taken_with_twice_its_weight(build: Any) -> None:
    """Two experts with the logits 1.5 and 0."""
    router = build(config.GShardTop2(), 2)
    params = {"gate": {"w": jnp.zeros((D, 2)).at[0, 0].set(1.5)}}
    weights = np.asarray(router.dense(router(np.ones((1, DRAWS, D)), params=params, key=KEY)[0]))
    second = 1 / (1 + np.exp(1.5))
    np.testing.assert_allclose((weights[:, 1] > 0).mean(), 2 * second, atol=0.015)
    np.testing.assert_allclose(weights[:, 0], 1 - second, rtol=1e-5)
    np.testing.assert_allclose(weights[weights[:, 1] > 0, 1], second, rtol=1e-5)


def adaptive_oracle(cfg: config.AdaptiveTopK) -> Callable[..., Any]:
    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        scores = np.array([softmax(row) for row in x @ params["gate"]["w"]])
        weights = np.zeros_like(scores)
        alone = []
        for n in np.flatnonzero(real):
            first, second = best(scores[n], 2)
            weights[n, first] = scores[n, first]
            if scores[n, first] - scores[n, second] <= cfg.threshold:
                weights[n, second] = scores[n, second]
            else:
                alone.append(first)
        mean = scores[real].mean(axis=0)
        assert 0 < len(alone) < real.sum()
        loss = X * sum(alone.count(e) / len(alone) * mean[e] for e in range(X))
        return weights, {"moe_balance_loss": cfg.balance_loss * loss}

    return oracle


def test_adaptive_gating_is_its_equations(build: Any, agrees: Any, rng: np.random.Generator) -> None:
    cfg = config.AdaptiveTopK(threshold=0.15)
    agrees(build(cfg, X), adaptive_oracle(cfg), inputs(rng), real=padding(rng))


def noisy_oracle(cfg: config.NoisyTopK, noise: np.ndarray | None) -> Callable[..., Any]:
    def squared_variation(values: np.ndarray) -> float:
        return values.var() / values.mean() ** 2

    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        clean = x @ params["gate"]["w"]
        scale = np.log1p(np.exp(x @ params["w_noise"])) + 0.01
        h = clean if noise is None else clean + noise * scale
        weights, load = np.zeros_like(h), np.zeros(X)
        for n in np.flatnonzero(real):
            chosen = best(h[n], cfg.k)
            weights[n, chosen] = softmax(h[n, chosen])
            for e in range(X):
                if noise is None:
                    load[e] += e in chosen
                else:
                    others = np.sort(np.delete(h[n], e))[::-1]
                    load[e] += stats.norm.cdf((clean[n, e] - others[cfg.k - 1]) / scale[n, e])
        return weights, {
            "moe_importance_loss": cfg.importance_loss * squared_variation(weights.sum(axis=0)),
            "moe_load_loss": cfg.load_loss * squared_variation(load),
        }

    return oracle


@pytest.mark.parametrize("k", [1, 3, X - 1])
def test_noisy_gating_is_its_equations(build: Any, agrees: Any, k: int, rng: np.random.Generator) -> None:
    cfg = config.NoisyTopK(k=k)
    noise = np.asarray(jax.random.normal(noise_key(told()), (B * T, X)), np.float64)
    agrees(build(cfg, X), noisy_oracle(cfg, None), inputs(rng), real=padding(rng))
    agrees(build(cfg, X), noisy_oracle(cfg, noise), inputs(rng), real=padding(rng), key=KEY)


def test_the_load_is_the_expected_number_of_tokens(build: Any) -> None:
    """Two experts, one of which is taken with probability Phi((a_1 - a_2) / sqrt(s_1^2 + s_2^2))."""
    router = build(config.NoisyTopK(k=1, importance_loss=0.0, load_loss=1.0), 2)
    logits, raw_scale = np.array([0.4, -0.3]), np.array([0.2, 1.1])
    params = {"gate": {"w": jnp.zeros((D, 2)).at[0].set(logits)}, "w_noise": jnp.zeros((D, 2)).at[0].set(raw_scale)}
    x = np.zeros((1, DRAWS, D), np.float32)
    x[:, :, 0] = 1.0
    routing, losses, _ = router(x, params=params, key=KEY)
    scale = np.log1p(np.exp(raw_scale)) + 0.01
    p = stats.norm.cdf((logits[0] - logits[1]) / np.sqrt(np.sum(scale**2)))
    np.testing.assert_allclose((np.asarray(routing.experts) == 0).mean(), p, atol=0.015)
    np.testing.assert_allclose(losses["moe_load_loss"], np.square(2 * p - 1), rtol=0.05)


def told() -> Pass:
    """What layer 0 of a training step is told."""
    return Pass(tokens=jnp.zeros((B, T), jnp.int32), key=KEY, layer=jnp.int32(0))
