"""Divergences of a student from a teacher against float64 by hand, whole and in chunks, on one device and on meshes.

Letters: b batch, t time, d model width, e model width of the teacher, v vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from hybridlm import config, divergences
from hybridlm.divergences import Divergence, token_divergences
from hybridlm.losses import Head
from hybridlm.sharding import make_mesh, spec

B, T, D, E, V = 2, 23, 6, 5, 11
KINDS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl", temperature=2.0),
    Divergence("jsd", beta=0.5),
    Divergence("jsd", beta=0.1, temperature=0.7),
]


def name_of(divergence: Divergence) -> str:
    return f"{divergence.kind}-{divergence.beta}-{divergence.temperature}"


def log_softmax(y: Any) -> Any:
    y = y - y.max(axis=-1, keepdims=True)
    return y - np.log(np.sum(np.exp(y), axis=-1, keepdims=True))


def kl(a: Any, b: Any) -> Any:
    return np.sum(np.exp(a) * (a - b), axis=-1)


def oracle(divergence: Divergence, y: Any, z: Any) -> Any:
    """Of the student's logits y and the teacher's z, in float64."""
    log_q, log_p = (log_softmax(a / divergence.temperature) for a in (y, z))
    match divergence.kind:
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
        case "jsd":
            beta = divergence.beta
            log_m = np.log(beta * np.exp(log_p) + (1 - beta) * np.exp(log_q))
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def oracle_of_features(divergence: Divergence, soft_cap: float | None, x: Any, w: Any, z: Any, u: Any) -> Any:
    x, w, z, u = (np.asarray(a, np.float64) for a in (x, w, z, u))
    y = x @ w
    return oracle(divergence, y if soft_cap is None else soft_cap * np.tanh(y / soft_cap), z @ u)


def operands(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    shapes = (B, T, D), (D, V), (B, T, E), (E, V)
    x, w, z, u = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, w, z, u


@pytest.mark.parametrize("divergence", KINDS, ids=name_of)
@pytest.mark.parametrize("tokens_per_chunk", [7, 1000])
def test_values_and_gradients_equal_the_oracle(
    tokens_per_chunk: int, divergence: Divergence, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients against central differences of 1e-6 in float64; the student's head is tied, the teacher's is not."""
    monkeypatch.setattr(divergences, "LOGITS_PER_CHUNK", tokens_per_chunk * 2 * V)
    soft_cap = 2.0
    x, w, z, u = operands(rng)
    cotangent = rng.standard_normal((B, T)).astype(np.float32)

    def run(x: Any, w: Any, z: Any, u: Any) -> Any:
        values = token_divergences(divergence, Head(w.T, tied=True, soft_cap=soft_cap), x, Head(u, tied=False), z)
        return jnp.sum(values * cotangent), values

    grads, values = jax.jit(lambda *args: jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True)(*args))(x, w, z, u)
    np.testing.assert_allclose(values, oracle_of_features(divergence, soft_cap, x, w, z, u), rtol=1e-5, atol=1e-6)
    for i, (operand, grad) in enumerate(zip((x, w), grads, strict=False)):
        wide = [np.asarray(a, np.float64) for a in (x, w, z, u)]
        want = np.zeros(operand.shape)
        for at in np.ndindex(*operand.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = operand.astype(np.float64)
                moved[at] += step
                args = [*wide[:i], moved, *wide[i + 1 :]]
                ends.append(np.sum(oracle_of_features(divergence, soft_cap, *args) * cotangent))
            want[at] = (ends[0] - ends[1]) / 2e-6
        assert np.linalg.norm(grad - want) < 1e-4 * np.linalg.norm(want)
    for grad in grads[2:]:  # the teacher's
        np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("divergence", KINDS, ids=name_of)
def test_of_equals_it_is_zero_and_so_is_its_gradient(divergence: Divergence, rng: np.random.Generator) -> None:
    x, w, _, _ = operands(rng)

    def run(x: Any, w: Any) -> Any:
        values = token_divergences(divergence, Head(w, tied=False), x, Head(w, tied=False), x)
        return jnp.sum(values), values

    (dx, dw), values = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(x, w)
    assert max(np.abs(a).max() for a in (values, dx, dw)) < 1e-6  # float32 at probabilities near 1


@pytest.mark.parametrize("divergence", KINDS[1:3], ids=name_of)
def test_probabilities_that_underflow_stay_finite(divergence: Divergence, rng: np.random.Generator) -> None:
    x, w, z, u = operands(rng)

    def run(x: Any, w: Any, z: Any, u: Any) -> Any:
        return jnp.sum(token_divergences(divergence, Head(200 * w, tied=False), x, Head(300 * u, tied=False), z))

    value, dx = jax.jit(jax.value_and_grad(run))(x, w, z, u)
    want = np.sum(oracle_of_features(divergence, None, x, 200 * w, z, 300 * u)) if divergence.kind != "jsd" else None
    assert np.isfinite(dx).all()
    if want is None:
        assert 0 <= value <= B * T * np.log(2) * 1.001  # what the JSD of two certain distributions is at most
    else:
        np.testing.assert_allclose(value, want, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sharded_equals_unsharded(tied: bool, rng: np.random.Generator) -> None:
    """Over batch, embedding and vocabulary, whatever the other head is."""
    b, t, d, e, v = 4, 6, 8, 4, 16
    shapes = (b, t, d), (v, d) if tied else (d, v), (b, t, e), (e, v) if tied else (v, e)
    x, w, z, u = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)

    def run(x: Any, w: Any, z: Any, u: Any) -> Any:
        values = token_divergences(KINDS[3], Head(w, tied=tied), x, Head(u, tied=not tied), z)
        return jnp.sum(values**2), values

    differentiate = jax.grad(run, argnums=(0, 1), has_aux=True)
    want = jax.jit(differentiate)(x, w, z, u)
    devices = make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(devices):
        heads = [("vocab", None) if is_tied else ("embed", "logits") for is_tied in (tied, not tied)]
        axes = (("sequences", "time"), heads[0], ("sequences", "time"), heads[1])
        placed = [
            jax.device_put(a, NamedSharding(devices, spec(*names))) for a, names in zip((x, w, z, u), axes, strict=True)
        ]
        got = jax.jit(lambda *args: differentiate(*args))(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
