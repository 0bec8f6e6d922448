"""The TPU kernels of linear attention with a decay per key channel, interpreted, against token loops in float64.

Letters: b batch, t time, h query-key heads, r value heads per query-key head, k key dim, v value dim, c chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels.bench import oracles
from hybridlm_kernels.linear_attention import tpu_per_channel
from jax.experimental.pallas import tpu as pltpu

# Most of the time goes into compiling what its tests share.
pytestmark = pytest.mark.xdist_group("linear_attention_pallas_tpu_channels")

FORWARD_TOLERANCE, GRADIENT_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-4, 1e-2  # relative L2, against float64
FORGET = -(2.0**17)  # the decay of a document's first token
NAMES = ("o", "s_last", "dq", "dk", "dv", "dbeta", "dg", "ds0")

# h, r, t, k, v, c: value heads that share keys; several key heads; a chunk of 128
GROUPED, WIDE_VALUES, WIDE_KEYS = (1, 2, 192, 64, 64, 64), (2, 1, 128, 64, 128, 32), (1, 1, 128, 128, 64, 128)


def keys(rng, kind, shape):
    k = rng.normal(size=shape)
    match kind:
        case "identical":
            k = np.broadcast_to(k[:, :, :1], shape)
        case "correlated":
            k = 0.9**0.5 * rng.normal(size=(*shape[:2], 1, shape[3])) + 0.1**0.5 * k
        case "period 8":
            k = np.tile(k[:, :, :8], (1, 1, shape[2] // 8, 1))
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


def decays(rng, kind, shape):
    """g [b, h r, t, k]."""
    t = shape[2]
    g = -np.exp(rng.normal(-3, 2, shape))  # from 0.9999 to e^-10
    match kind:
        case "none":
            g = 0 * g
        case "all":
            g = np.full(shape, -150.0)
        case "channels":
            g[..., ::3], g[..., 1::3] = 0.0, -150.0
        case "tokens":
            g = rng.choice([0.0, -1e-3, -150.0], shape)
        case "documents":  # inside a chunk, at its border, one token each
            g[:, :, [5, 64, *range(90, 99), t - 1]] = FORGET
        case "padding":
            g[:, :, 40:70], g[:, :, 70], g[:, :, t - 3 :] = 0.0, FORGET, 0.0
    return g


def inputs(rng, shape, *, kind="random", beta=None, decay="mild", erases=True):
    """q, k, v, beta, g, s0, do, ds of the oracle."""
    h, r, t, key, value, _ = shape
    q, v = rng.normal(size=(1, h, t, key)), rng.normal(size=(1, h * r, t, value))
    k, g = keys(rng, kind, q.shape), decays(rng, decay, (1, h * r, t, key))
    beta = rng.uniform(0, 1, v.shape[:3]) if beta is None else np.full(v.shape[:3], beta)
    if decay == "padding":
        for x in (q, k, v, beta):
            x[:, :, 40:70], x[:, :, t - 3 :] = 0.0, 0.0
    s0, do, ds = (rng.normal(size=s) for s in ((1, h * r, key, value), v.shape, (1, h * r, key, value)))
    return q, k, v, beta if erases else None, g, s0, do, ds


@partial(jax.jit, static_argnames=("chunk", "precision", "interpret"))
def kernels(q, k, v, beta, g, s0, do, ds, *, chunk, precision, interpret=True):
    """The outputs and cotangents in the order of NAMES."""
    static = {"scale": scale_of(q), "chunk": chunk, "precision": precision, "interpret": interpret}
    o, last, states = tpu_per_channel.forward(q, k, v, beta, g, s0, save=True, **static)
    return o, last, *tpu_per_channel.adjoint(q, k, v, beta, g, states, do, ds, **static)


def scale_of(q):
    return q.shape[-1] ** -0.5


def distance(got, want):
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def errors(operands, chunk, dtype=jnp.float32, interpret=True):
    """Relative error of each of NAMES that exists."""
    wide = {0, 1, 2, 6}  # q, k, v, do
    operands = [
        None if x is None else jnp.asarray(x, dtype if i in wide else jnp.float32) for i, x in enumerate(operands)
    ]
    precision = "default" if dtype == jnp.bfloat16 else "highest"
    got = kernels(*operands, chunk=chunk, precision=precision, interpret=interpret)
    assert [got[i].dtype for i in (0, 2, 3, 4)] == [dtype] * 4
    exact = [None if x is None else np.asarray(x, np.float64) for x in operands]
    want = oracles.linear_attention(*exact, scale_of(exact[0]))
    return {n: distance(x, y) for n, x, y in zip(NAMES, got, want, strict=True) if y is not None}


def check(found, forward_tolerance=FORWARD_TOLERANCE):
    for name, error in found.items():
        assert error < (GRADIENT_TOLERANCE if name.startswith("d") else forward_tolerance), found


@pytest.mark.parametrize("erases", [False, True], ids=["gated_linear_attention", "gated_delta_rule"])
@pytest.mark.parametrize("decay", ["mild", "none", "all", "channels", "tokens", "documents", "padding"])
def test_kernels_equal_the_oracle_at_any_decay(rng, decay, erases):
    check(errors(inputs(rng, GROUPED, decay=decay, erases=erases), GROUPED[-1]))


@pytest.mark.parametrize("decay", ["none", "mild", "documents"])
@pytest.mark.parametrize("kind", ["identical", "correlated", "period 8"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_that_are_alike_do_no_harm(rng, kind, beta, decay):
    # Each token multiplies what lies along its key by 1 - beta |k|^2: at beta 2, float32's rounding of |k|^2 adds up.
    tolerance = max(FORWARD_TOLERANCE, 2 * GROUPED[2] * 2.0**-24) if beta == 2 else FORWARD_TOLERANCE
    check(errors(inputs(rng, GROUPED, kind=kind, beta=beta, decay=decay), GROUPED[-1]), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("erases", [False, True], ids=["gated_linear_attention", "gated_delta_rule"])
@pytest.mark.parametrize("shape", [WIDE_VALUES, WIDE_KEYS], ids=["k 64, v 128", "k 128, v 64, one chunk"])
def test_keys_and_values_may_differ_in_width(rng, shape, erases):
    check(errors(inputs(rng, shape, decay="documents", erases=erases), shape[-1]))


@pytest.mark.parametrize("erases", [False, True], ids=["gated_linear_attention", "gated_delta_rule"])
@pytest.mark.parametrize("decay", ["mild", "tokens", "documents"])
def test_bfloat16_products_are_good_to_a_percent(rng, decay, erases):
    found = errors(inputs(rng, GROUPED, decay=decay, erases=erases), GROUPED[-1], jnp.bfloat16)
    assert max(found.values()) < BFLOAT16_TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["identical", "correlated", "period 8"])
def test_bfloat16_products_stand_keys_that_are_alike(rng, kind):
    # Nothing decays, beta 2 flips the sign along a key at every token: 3e-2 measured, and over 1 with one pass alone
    found = errors(inputs(rng, GROUPED, kind=kind, beta=2.0, decay="none"), GROUPED[-1], jnp.bfloat16)
    assert max(found.values()) < 6e-2, found


def test_kernels_have_no_races(rng):
    shape = (1, 1, 32, 64, 64, 16)
    check(errors(inputs(rng, shape), 16, interpret=pltpu.InterpretParams(detect_races=True)))
