"""The GPU kernels, run by Pallas' GPU interpreter on CPU, agree with loops over time in float64.

Letters: b batch, t time, d channels. The interpreter follows the copies, barriers and slots of shared memory, with
garbage beyond the edges of arrays; it knows nothing of registers, approximate instructions or the GPU's scheduling.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import gpu_scan
from hybridlm_kernels.gpu_scan import TARGET_WARPGROUPS, plan
from hybridlm_kernels.linear_scan import pallas_gpu as linear_scan
from hybridlm_kernels.rg_lru import pallas_gpu as rg_lru
from hybridlm_kernels.segments import CONTINUE, PADDING, RESET
from hybridlm_kernels.short_conv import pallas_gpu as short_conv

TOLERANCE = {
    "float32": 2e-6,
    "complex64": 2e-6,
    "bfloat16": 4e-3,
}  # relative L2: rounding of the carries, and of the results
# Whole blocks of four; beyond them older interpreters drop the stores that the copy engine would clip.
WHOLE, RAGGED = (1, 64, 128), (2, 37, 40)
clips = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the interpreter of this JAX drops blocks that are partly out of bounds"
)

Array = np.ndarray
Run = Callable[..., Any]  # calls a function with its GPU kernels interpreted


@pytest.fixture(params=[(WHOLE, False), (WHOLE, True), pytest.param((RAGGED, False), marks=clips)], ids=str)
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """b, t, d; in the second case each block of time is a chunk of its own."""
    shape, is_split = request.param
    monkeypatch.setattr(gpu_scan, "MIN_CHUNK_BLOCKS", 1 if is_split else 1000)
    monkeypatch.setattr(gpu_scan, "GROUP", 4)  # of unrolled tokens: half as many to compile
    return shape


def error(result: Any, expected: Array) -> float:
    return float(np.linalg.norm(exact(result) - expected) / max(np.linalg.norm(expected), 1e-30))


def exact(array: Any) -> Array:
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    values = rng.normal(size=shape)
    return jnp.asarray(values + 1j * rng.normal(size=shape) if dtype == "complex64" else values, dtype)


def random_kinds(rng: np.random.Generator, b: int, t: int) -> jax.Array:
    return jnp.asarray(rng.choice([CONTINUE, RESET, PADDING], p=[0.8, 0.1, 0.1], size=(b, t)), jnp.int8)


def kinds_of(kinds: jax.Array | None, b: int, t: int) -> Array:
    return np.full((b, t, 1), CONTINUE) if kinds is None else np.asarray(kinds)[:, :, None]


def recurrence(decay: Array, added: Array, h: Array, times: list[int]) -> tuple[Array, Array]:
    states = np.zeros(added.shape, np.result_type(decay, added, h))
    for t in times:
        h = decay[:, t] * h + added[:, t]
        states[:, t] = h
    return states, h


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "reverse"), [("float32", False), ("bfloat16", True), ("complex64", False)])
def test_linear_scan_and_its_adjoint_agree_with_a_loop(
    shape: tuple[int, int, int], dtype: str, reverse: bool, rng: np.random.Generator, interpreted: Run
) -> None:
    b, t, d = shape
    wide = "complex64" if dtype == "complex64" else "float32"
    a = rng.uniform(0.5, 1.0, shape)
    a = jnp.asarray(a * np.exp(1j * rng.uniform(-3, 3, shape)) if dtype == "complex64" else a, dtype)
    x, dh, h0, dh_last = (random(rng, s, k) for s, k in [(shape, dtype)] * 2 + [((b, d), wide)] * 2)
    kinds = None if reverse else random_kinds(rng, b, t)
    kind = kinds_of(kinds, b, t)
    h, h_last = interpreted(lambda: linear_scan.forward(a, x, h0, kinds, reverse=reverse))
    da, dx, dh0 = interpreted(
        lambda: linear_scan.adjoint(a, h, h0, dh, dh_last, kinds, reverse=reverse, x_dtype=x.dtype)
    )

    times = list(range(t))[:: -1 if reverse else 1]
    decay = np.where(kind == CONTINUE, exact(a), np.where(kind == RESET, 0, 1))
    states, last = recurrence(decay, np.where(kind == PADDING, 0, exact(x)), exact(h0), times)
    tolerance = TOLERANCE[dtype]
    assert error(h, states) < tolerance
    assert error(h_last, last) < TOLERANCE["float32"]

    u, expected_da, expected_dx = exact(dh_last), np.zeros(shape, states.dtype), np.zeros(shape, states.dtype)
    for i in range(t)[::-1]:
        n, before = times[i], exact(h0) if i == 0 else exact(h)[:, times[i - 1]]
        u = u + exact(dh)[:, n]
        expected_da[:, n] = np.where(kind[:, n] == CONTINUE, u * before, 0)
        expected_dx[:, n] = np.where(kind[:, n] == PADDING, 0, u)
        u = decay[:, n] * u
    assert error(da, expected_da) < tolerance
    assert error(dx, expected_dx) < tolerance
    assert error(dh0, u) < TOLERANCE["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("premultiplied", [False, True])
def test_linear_scan_summary_is_the_scan_from_zero(
    premultiplied: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, interpreted: Run
) -> None:
    monkeypatch.setattr(gpu_scan, "MIN_CHUNK_BLOCKS", 1)
    shape = b, t, d = RAGGED  # nothing of this size is stored
    a = jnp.asarray(rng.uniform(0.9, 1.0, shape), jnp.float32)
    x, kinds = random(rng, shape), random_kinds(rng, b, t)
    kinds = jnp.where(kinds == RESET, CONTINUE, kinds)  # a reset would make the product 0
    total, added = interpreted(lambda: linear_scan.summary(a, x, kinds, reverse=True, premultiplied=premultiplied))
    kind = kinds_of(kinds, b, t)
    decay = np.where(kind == CONTINUE, exact(a), 1)
    value = decay * exact(x) if premultiplied else np.where(kind == PADDING, 0, exact(x))
    assert error(total, decay.prod(axis=1)) < TOLERANCE["float32"]
    assert error(added, recurrence(decay, value, np.zeros((b, d)), list(range(t))[::-1])[1]) < TOLERANCE["float32"]


def test_rg_lru_and_its_adjoint_agree_with_a_loop(
    shape: tuple[int, int, int], rng: np.random.Generator, interpreted: Run
) -> None:
    b, t, d = shape
    dtype = "bfloat16" if shape == RAGGED else "float32"
    x, gate_a, gate_x, dh = (scale * random(rng, shape, dtype) for scale in (1, 4, 4, 1))
    h0, dh_last = random(rng, (b, d)), random(rng, (b, d))
    rate = jnp.asarray(rng.uniform(0, 8, d) * np.where(np.arange(d) % 3 == 0, 1e-4, 1), jnp.float32)
    kinds = None if shape == RAGGED else random_kinds(rng, b, t)
    kind = kinds_of(kinds, b, t)
    h, h_last = interpreted(lambda: rg_lru.forward(x, gate_a, gate_x, rate, h0, kinds))
    dx, dgate_a, dgate_x, drate, dh0 = interpreted(
        lambda: rg_lru.adjoint(x, gate_a, gate_x, rate, h, h0, dh, dh_last, kinds)
    )

    r, i = sigmoid(exact(gate_a)), sigmoid(exact(gate_x))
    a = np.exp(-exact(rate) * r)
    root = np.sqrt(-np.expm1(-2 * exact(rate) * r))
    gain = np.where(kind == CONTINUE, root, np.where(kind == RESET, 1, 0))
    decay = np.where(kind == CONTINUE, a, np.where(kind == RESET, 0, 1))
    states, last = recurrence(decay, gain * i * exact(x), exact(h0), list(range(t)))
    tolerance = TOLERANCE[dtype]
    assert error(h, states) < tolerance
    assert error(h_last, last) < TOLERANCE["float32"]

    u, slopes = exact(dh_last), np.zeros(shape)  # of the log decay
    du = np.zeros(shape)
    for n in range(t)[::-1]:
        u = u + exact(dh)[:, n]
        du[:, n] = u
        before = exact(h)[:, n - 1] if n else exact(h0)
        through_gain = u * i[:, n] * exact(x)[:, n] / np.maximum(2 * root[:, n], 1e-3) * -2 * a[:, n] ** 2
        slopes[:, n] = np.where(kind[:, n] == CONTINUE, a[:, n] * u * before + through_gain, 0)
        u = decay[:, n] * u
    assert error(dx, du * gain * i) < tolerance
    assert error(dgate_x, du * gain * exact(x) * i * (1 - i)) < tolerance
    assert error(dgate_a, -exact(rate) * slopes * r * (1 - r)) < tolerance
    assert error(drate, -(slopes * r).sum((0, 1))) < 1e-5  # a long sum of both signs
    assert error(dh0, u) < TOLERANCE["float32"]


def test_rg_lru_gain_is_accurate_where_the_decay_is_near_one() -> None:
    rate = jnp.asarray(np.geomspace(1e-9, 50, 4001), jnp.float32)
    gates = rg_lru.gates_of(jnp.zeros_like(rate), jnp.zeros_like(rate), rate)
    expected = np.sqrt(-np.expm1(-exact(rate)))  # log a = -rate / 2
    assert np.max(np.abs(exact(gates.gain) / expected - 1)) < 1e-6
    assert rg_lru.gates_of(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1)).gain == 0.0


def test_sigmoids_are_finite_and_accurate_at_any_argument() -> None:
    x = jnp.asarray([-jnp.inf, -1e4, -90.0, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4, jnp.inf], jnp.float32)
    p, q = rg_lru.sigmoids(x, x[::-1])
    expected = [0.0, 0.0, 0.0, *sigmoid(np.array([-30.0, -1.0, 0.0, 1.0, 30.0])), 1.0, 1.0]
    np.testing.assert_allclose(p, expected, rtol=1e-6, atol=1e-17)
    np.testing.assert_allclose(q, expected[::-1], rtol=1e-6, atol=1e-17)
    np.testing.assert_allclose(short_conv.sigmoid(x), expected, rtol=1e-6, atol=1e-17)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("taps", "activation", "dtype", "packed"), [(4, "silu", "float32", True), (1, None, "bfloat16", False)]
)
def test_short_conv_and_its_adjoint_agree_with_a_loop(
    shape: tuple[int, int, int],
    taps: int,
    activation: str | None,
    dtype: str,
    packed: bool,
    rng: np.random.Generator,
    interpreted: Run,
) -> None:
    b, t, d = shape
    held = taps - 1
    x, dy = random(rng, shape, dtype), random(rng, shape, dtype)
    w, halo = random(rng, (taps, d)), random(rng, (b, held, d))
    bias = random(rng, (d,)) if packed else None
    reach = jnp.asarray(rng.integers(-1, taps, (b, t)), jnp.int32) if packed else None
    y = interpreted(lambda: short_conv.forward(x, w, bias, halo, reach, activation=activation))
    dx, dw, dbias, dhalo = interpreted(lambda: short_conv.adjoint(x, w, bias, halo, reach, dy, activation=activation))

    inputs = np.concatenate([exact(halo), exact(x)], axis=1)
    seen = np.full((b, t), held) if reach is None else np.asarray(reach)
    sums = np.zeros(shape) + (0 if bias is None else exact(bias))
    for j in range(taps):
        sums += np.where(seen >= j, 1, 0)[:, :, None] * exact(w)[held - j] * inputs[:, held - j : held - j + t]
    functions = {None: lambda p: p, "silu": jax.nn.silu, "gelu": jax.nn.gelu}
    with jax.enable_x64(True):
        expected, slope = jax.jvp(functions[activation], (jnp.asarray(sums),), (jnp.ones(shape, jnp.float64),))
    g = exact(dy) * exact(slope)
    expected_dx, expected_dw = np.zeros_like(inputs), np.zeros((taps, d))
    for j in range(taps):
        part = np.where(seen >= j, 1, 0)[:, :, None] * g
        expected_dx[:, held - j : held - j + t] += exact(w)[held - j] * part
        expected_dw[held - j] = (part * inputs[:, held - j : held - j + t]).sum((0, 1))
    assert error(y, exact(expected)) < TOLERANCE[dtype]
    assert error(dx, expected_dx[:, held:]) < TOLERANCE[dtype]
    assert error(dw, expected_dw) < 1e-5
    assert error(dhalo, expected_dx[:, :held]) < TOLERANCE["float32"]
    assert dbias is None if bias is None else error(dbias, g.sum((0, 1))) < 1e-5


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", None])
def test_derivatives_of_activations_are_those_of_jax(activation: str | None, rng: np.random.Generator) -> None:
    p = jnp.asarray([-100.0, -30.0, 0.0, 30.0, 100.0, *rng.normal(size=50, scale=4)], jnp.float32)
    functions = {None: lambda p: p, "silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}
    with jax.enable_x64(True):
        wide = jnp.asarray(exact(p))
        expected = jax.jvp(functions[activation], (wide,), (jnp.ones_like(wide),))
    for result, value in zip(short_conv.ACTIVATIONS[activation](p), expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=3e-6, atol=3e-6)


def test_few_sequences_are_split_over_time_and_many_are_not() -> None:
    assert plan((1, 8192, 2560), 12).num_chunks > 1
    assert plan((64, 8192, 2560), 12).num_chunks == 1
    for shape in [(1, 8192, 2560), (1, 13, 40), (3, 1000, 1111), (64, 512, 2560)]:
        division = plan(shape, 12)
        assert (division.num_chunks - 1) * division.chunk_blocks < division.num_blocks, division
        assert division.num_chunks * division.chunk_blocks >= division.num_blocks, division
    b, num_chunks, num_channel_blocks = plan((1, 8192, 2560), 12).grid
    assert TARGET_WARPGROUPS * 0.9 < b * num_chunks * num_channel_blocks < TARGET_WARPGROUPS * 1.2


@pytest.mark.parametrize(
    ("dtype", "d", "compute_capability", "reason"),
    [
        ("float32", 128, None, "needs a Hopper GPU"),
        ("float32", 128, 8.0, "needs a Hopper GPU"),
        ("complex64", 128, 9.0, None),
        ("complex64", 3, 9.0, "16 bytes"),
        ("complex128", 128, 9.0, "complex128"),
        ("float16", 128, 9.0, "float16"),
        ("bfloat16", 36, 9.0, "16 bytes"),
        ("bfloat16", 40, 9.0, None),
        ("float32", 36, 10.0, None),
    ],
)
def test_what_cannot_be_served_has_a_reason(
    dtype: str, d: int, compute_capability: float | None, reason: str | None
) -> None:
    x = jax.ShapeDtypeStruct((1, 8, d), jnp.dtype(dtype))
    refusal = linear_scan.supports(x, x, compute_capability=compute_capability)
    assert (refusal is None) if reason is None else (refusal is not None and reason in refusal)


def test_more_taps_than_registers_are_refused() -> None:
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(1, 8, 128), (9, 128)])
    assert "9 taps" in (short_conv.supports(x, w, compute_capability=9.0) or "")
