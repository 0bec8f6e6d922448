"""The TPU kernels of short_conv, interpreted, against plain float64 loops. Sizes are odd on purpose."""

import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels.short_conv import pallas_tpu
from jax.experimental.pallas import tpu as pltpu

FORWARD_TOLERANCE, GRADIENT_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-4, 1e-2  # relative L2, against float64


def act(name, v):
    """The activation and its slope."""
    if name == "silu":
        s = 1 / (1 + np.exp(-v))
        return v * s, s * (1 + v * (1 - s))
    if name == "gelu":
        c = np.sqrt(2 / np.pi)
        th = np.tanh(c * (v + 0.044715 * v**3))
        return 0.5 * v * (1 + th), 0.5 * (1 + th) + 0.5 * v * (1 - th**2) * c * (1 + 3 * 0.044715 * v**2)
    if name == "relu":
        return np.maximum(v, 0), (v > 0).astype(float)
    return v, np.ones_like(v)


def oracle(x, w, bias, halo, reach, dy, activation):
    x, w, halo, dy = (np.asarray(v, np.float64) for v in (x, w, halo, dy))
    taps, held = w.shape[0], halo.shape[1]
    inputs = np.concatenate([halo, x], axis=1)
    dinputs, dw, dbias, y = np.zeros_like(inputs), np.zeros_like(w), np.zeros(w.shape[1]), np.zeros_like(x)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            last = taps - 1 if reach is None else min(taps - 1, reach[row, t])
            total = np.zeros(w.shape[1]) if bias is None else np.asarray(bias, np.float64)
            for j in range(last + 1):
                total = total + w[taps - 1 - j] * inputs[row, held + t - j]
            y[row, t], slope = act(activation, total)
            dtotal = dy[row, t] * slope
            dbias += dtotal
            for j in range(last + 1):
                dw[taps - 1 - j] += dtotal * inputs[row, held + t - j]
                dinputs[row, held + t - j] += dtotal * w[taps - 1 - j]
    return y, (dinputs[:, held:], dw, dbias, dinputs[:, :held])


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def operands(rng, b, t, d, taps, dtype=jnp.float32):
    x, dy = (jnp.asarray(rng.normal(size=(b, t, d)), dtype) for _ in range(2))
    w, bias, halo = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((taps, d), (d,), (b, taps - 1, d)))
    return x, w, bias, halo, dy


@pytest.mark.parametrize(
    ("shape", "taps", "packed", "activation"),
    [
        ((2, 37, 130), 4, True, "silu"),
        ((1, 600, 128), 4, False, None),  # several blocks of time, the last one cut
        ((1, 1, 20), 3, False, "gelu"),
        ((2, 48, 128), 1, True, "relu"),
        ((1, 70, 300), 9, True, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_oracle(rng, shape, taps, packed, activation, with_bias):
    x, w, bias, halo, dy = operands(rng, *shape, taps)
    bias = bias if with_bias else None
    reach = rng.integers(-1, taps, size=shape[:2]).astype(np.int32) if packed else None
    want_y, want = oracle(x, w, bias, halo, reach, dy, activation)
    sees = None if reach is None else jnp.asarray(reach)
    y = pallas_tpu.forward(x, w, bias, halo, sees, activation=activation, interpret=True)
    assert distance(y, want_y) < FORWARD_TOLERANCE
    gradients = pallas_tpu.adjoint(x, w, bias, halo, sees, dy, activation=activation, interpret=True)
    for got, wanted in zip(gradients, want, strict=True):
        if got is not None:
            assert distance(got, wanted) < GRADIENT_TOLERANCE
    assert with_bias == (gradients[2] is not None)


def test_bfloat16_is_within_a_hundredth(rng):
    x, w, bias, halo, dy = operands(rng, 2, 40, 128, 4, jnp.bfloat16)
    want_y, want = oracle(x.astype(jnp.float32), w, bias, halo, None, dy.astype(jnp.float32), "silu")
    y = pallas_tpu.forward(x, w, bias, halo, None, activation="silu", interpret=True)
    assert y.dtype == jnp.bfloat16
    assert distance(y.astype(jnp.float32), want_y) < BFLOAT16_TOLERANCE
    dx, *rest = pallas_tpu.adjoint(x, w, bias, halo, None, dy, activation="silu", interpret=True)
    for got, wanted in zip((dx.astype(jnp.float32), *rest), want, strict=True):
        assert distance(got, wanted) < BFLOAT16_TOLERANCE


def test_no_race_and_nothing_read_that_was_not_written(rng):
    x, w, bias, halo, dy = operands(rng, 1, 40, 128, 4)
    reach = jnp.asarray(rng.integers(-1, 4, size=(1, 40)), jnp.int32)
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    want_y, want = oracle(x, w, bias, halo, np.asarray(reach), dy, None)
    y = pallas_tpu.forward(x, w, bias, halo, reach, activation=None, interpret=strict)
    assert distance(y, want_y) < FORWARD_TOLERANCE
    gradients = pallas_tpu.adjoint(x, w, bias, halo, reach, dy, activation=None, interpret=strict)
    for got, wanted in zip(gradients, want, strict=True):
        assert distance(got, wanted) < GRADIENT_TOLERANCE


def test_what_the_kernels_cannot_do_is_said():
    x = jnp.zeros((1, 8, 128))
    assert pallas_tpu.supports(x, jnp.zeros((4, 128))) is None
    assert "float16" in (pallas_tpu.supports(x.astype(jnp.float16), jnp.zeros((4, 128))) or "")
    assert "at most 9 taps, not 10" in (pallas_tpu.supports(x, jnp.zeros((10, 128))) or "")
