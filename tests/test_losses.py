"""Token losses against float64 softmax by hand, whole and in chunks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import losses
from hybridlm.losses import Head, token_losses

B, T, D, V = 2, 23, 6, 11


def oracle(x: Any, w: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """-log p(target) and log Z, one token at a time in float64."""
    nll, log_z = np.zeros(targets.shape), np.zeros(targets.shape)
    for b, t in np.ndindex(*targets.shape):
        y = np.asarray(x[b, t], np.float64) @ np.asarray(w, np.float64)
        log_z[b, t] = y.max() + np.log(np.sum(np.exp(y - y.max())))
        nll[b, t] = log_z[b, t] - y[targets[b, t]]
    return nll, log_z


def oracle_gradients(
    x: Any, w: Any, targets: Any, dnll: Any, dlog_z: Any, soft_cap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of sum(dnll * nll + dlog_z * log_z) in x and w, one token at a time in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    dx, dw = np.zeros(x.shape), np.zeros(w.shape)
    for b, t in np.ndindex(*targets.shape):
        y = x[b, t] @ w
        slope = np.ones_like(y)
        if soft_cap is not None:
            slope = 1 / np.cosh(y / soft_cap) ** 2
            y = soft_cap * np.tanh(y / soft_cap)
        p = np.exp(y - y.max())
        dy = slope * ((dnll[b, t] + dlog_z[b, t]) * p / p.sum() - dnll[b, t] * (np.arange(len(y)) == targets[b, t]))
        dx[b, t], dw = w @ dy, dw + np.outer(x[b, t], dy)
    return dx, dw


def operands(rng: np.random.Generator, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, w = rng.standard_normal((B, T, D)), scale * rng.standard_normal((D, V))
    return x.astype(np.float32), w.astype(np.float32), rng.integers(0, V, (B, T), dtype=np.int32)


def run(x: Any, w: Any, targets: Any) -> Any:
    return token_losses(Head(w, tied=False), x, jnp.asarray(targets))


def jitted(function: Any) -> Any:
    """Traced anew: what `jax.jit` remembers of a function does not know that the chunk's size was patched."""
    return jax.jit(lambda *args: function(*args))


@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 22, 23, 1000])
def test_chunks_equal_the_oracle(tokens_per_chunk: int, rng: np.random.Generator, monkeypatch: Any) -> None:
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", tokens_per_chunk * V)
    x, w, targets = operands(rng)
    got = jitted(run)(x, w, targets)
    for array, want in zip(got, oracle(x, w, targets), strict=True):
        assert (array.shape, array.dtype) == ((B, T), jnp.float32)
        np.testing.assert_allclose(array, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens_per_chunk", [7, 1000])
def test_gradients_equal_the_oracle(
    tokens_per_chunk: int, tied: bool, soft_cap: float | None, rng: np.random.Generator, monkeypatch: Any
) -> None:
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", tokens_per_chunk * V)
    x, w, targets = operands(rng)
    dnll, dlog_z = rng.standard_normal((2, B, T)).astype(np.float32)

    def objective(x: Any, w: Any) -> Any:
        head = Head(w.T if tied else w, tied, soft_cap)
        nll, log_z = token_losses(head, x, jnp.asarray(targets))
        return jnp.sum(dnll * nll + dlog_z * log_z)

    got = jitted(jax.grad(objective, argnums=(0, 1)))(x, w)
    for a, b in zip(got, oracle_gradients(x, w, targets, dnll, dlog_z, soft_cap), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_of_chunks_is_that_of_the_whole(rng: np.random.Generator, monkeypatch: Any) -> None:
    x, w, targets = operands(rng)
    weight = rng.integers(0, 2, (B, T)).astype(np.float32)

    def objective(x: Any, w: Any) -> Any:
        nll, log_z = run(x, w, targets)
        return jnp.sum(weight * (nll + 0.1 * log_z**2))

    whole = jitted(jax.grad(objective, argnums=(0, 1)))(x, w)
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 7 * V)
    chunked = jitted(jax.grad(objective, argnums=(0, 1)))(x, w)
    for a, b in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # A token of weight 0 moves nothing.
    np.testing.assert_array_equal(np.asarray(chunked[0])[weight == 0], 0.0)


def test_gradient_is_probability_minus_target(rng: np.random.Generator) -> None:
    x, w, targets = operands(rng)
    logits = (x @ w).astype(np.float32)
    identity = Head(jnp.eye(V), tied=True)
    got = jax.jit(jax.grad(lambda y: jnp.sum(token_losses(identity, y, jnp.asarray(targets))[0])))(logits)
    exact = np.exp(logits.astype(np.float64))
    want = exact / exact.sum(-1, keepdims=True) - np.eye(V)[targets]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_large_logits_stay_finite_and_exact(rng: np.random.Generator) -> None:
    x, w, targets = operands(rng, scale=1e4)
    got = jitted(run)(x, w, targets)
    for array, want in zip(got, oracle(x, w, targets), strict=True):
        np.testing.assert_allclose(array, want, rtol=1e-5, atol=1e-1)  # logits near 1e5: a unit is 0.008
