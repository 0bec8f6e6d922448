"""The TPU kernels of linear_scan and rg_lru, interpreted, against token loops in float64. Sizes are odd on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import tpu_scan
from hybridlm_kernels.linear_scan import pallas_tpu as linear_scan
from hybridlm_kernels.rg_lru import pallas_tpu as rg_lru
from hybridlm_kernels.segments import PADDING, RESET, token_kinds
from jax.experimental.pallas import tpu as pltpu

B, T, D = 3, 71, 40
FORWARD_TOLERANCE, GRADIENT_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-4, 1e-2  # relative L2, against float64

SEGMENTS = np.ones((B, T), np.int32)
SEGMENTS[0, 40:] = np.arange(2, T - 38)  # one-token documents
SEGMENTS[1, :3], SEGMENTS[1, 15:20], SEGMENTS[1, 20:50], SEGMENTS[1, 65:] = 0, 0, 2, 0  # padding all around
SEGMENTS[2] = 0

directions = pytest.mark.parametrize("reverse", [False, True])


@pytest.fixture
def small_blocks(monkeypatch):
    """32 rows a block, so that few tokens cross groups, blocks and a ragged end. For [B, T, D] alone: jit remembers."""
    monkeypatch.setattr(tpu_scan, "MAX_ROWS", 32)
    monkeypatch.setattr(tpu_scan, "SLOTS", 1)


def kinds_of(ids, reverse=False):
    return None if ids is None else token_kinds(jnp.asarray(ids), reverse)


def scan_oracle(a, x, h0, kinds, dh, dh_last, reverse):
    """h, the last state and the cotangents of a, x and h0."""
    double = np.complex128 if any(map(np.iscomplexobj, (a, x))) else np.float64
    kinds = np.zeros(x.shape[:2]) if kinds is None else np.asarray(kinds)
    order = list(range(x.shape[1]))[:: -1 if reverse else 1]
    state, u = h0.astype(double), dh_last.astype(double)
    h, before, da, dx = (np.zeros(x.shape, double) for _ in range(4))
    kept = np.ones(x.shape, double)
    for t in order:
        real = kinds[:, t, None] != PADDING
        before[:, t] = np.where(kinds[:, t, None] == RESET, 0, state)
        kept[:, t] = np.where(kinds[:, t, None] == RESET, 0, np.where(real, a[:, t], 1))
        state = np.where(real, a[:, t] * before[:, t] + x[:, t], state)
        h[:, t] = state
    for t in order[::-1]:
        real = kinds[:, t, None] != PADDING
        u = u + dh[:, t]
        da[:, t], dx[:, t] = np.where(real, u * before[:, t], 0), np.where(real, u, 0)
        u = kept[:, t] * u
    return h, state, da if np.iscomplexobj(a) else da.real, dx if np.iscomplexobj(x) else dx.real, u


def scan_inputs(rng, *, complex_a=False, complex_x=False, shape=(B, T, D)):
    a = rng.uniform(0.3, 1.0, shape)
    x, h0, dh, dh_last = (rng.normal(size=s) for s in (shape, shape[::2], shape, shape[::2]))
    if complex_a:
        a = a * np.exp(1j * rng.uniform(-3, 3, shape))
    if complex_x:
        x = x + 1j * rng.normal(size=shape)
    if complex_a or complex_x:
        h0, dh, dh_last = (v + 1j * rng.normal(size=v.shape) for v in (h0, dh, dh_last))
    return a, x, h0, dh, dh_last


def single(array, dtype=jnp.float32):
    return jnp.asarray(array, jnp.complex64 if np.iscomplexobj(array) else dtype)


def distance(got, want):
    got = np.asarray(got)
    assert got.shape == want.shape and (got.dtype.kind == "c") == (want.dtype.kind == "c")
    got = got.astype(want.dtype)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def check_scan(inputs, ids, reverse, dtype=jnp.float32, loose=1.0, interpret=True):
    a, x, h0, dh, dh_last = inputs
    kinds = kinds_of(ids, reverse)
    a32, x32, dh32 = (single(v, dtype) for v in (a, x, dh))
    h, last = linear_scan.forward(a32, x32, single(h0), kinds, reverse=reverse, interpret=interpret)
    da, dx, dh0 = linear_scan.adjoint(
        a32, h, single(h0), dh32, single(dh_last), kinds, reverse=reverse, x_dtype=x32.dtype, interpret=interpret
    )
    assert (da.dtype, dx.dtype) == (a32.dtype, x32.dtype)
    rounded = (np.asarray(v).astype(np.result_type(w.dtype)) for v, w in ((a32, a), (x32, x), (dh32, dh)))
    a, x, dh = rounded
    want = scan_oracle(a, x, h0, kinds, dh, dh_last, reverse)
    for got, value in zip((h, last), want[:2], strict=True):
        assert distance(got, value) < FORWARD_TOLERANCE * loose
    for got, value in zip((da, dx, dh0), want[2:], strict=True):
        assert distance(got, value) < GRADIENT_TOLERANCE * max(1.0, loose / 10)


@directions
@pytest.mark.parametrize("ids", [None, SEGMENTS], ids=["one document", "packed"])
def test_scan_and_adjoint_equal_the_oracle(rng, small_blocks, reverse, ids):
    check_scan(scan_inputs(rng), ids, reverse)


@directions
def test_complex_scan_and_adjoint_equal_the_oracle(rng, small_blocks, reverse):
    check_scan(scan_inputs(rng, complex_a=True, complex_x=True), SEGMENTS, reverse)


@pytest.mark.parametrize("complex_a", [False, True], ids=["complex x", "complex a"])
def test_one_real_operand_gets_a_real_gradient(rng, small_blocks, complex_a):
    check_scan(scan_inputs(rng, complex_a=complex_a, complex_x=not complex_a), SEGMENTS, False)


@directions
def test_bfloat16_operands_keep_a_float32_state(rng, small_blocks, reverse):
    # 1e-2 where h is rounded, and what is made of it
    check_scan(scan_inputs(rng), SEGMENTS, reverse, jnp.bfloat16, loose=BFLOAT16_TOLERANCE / FORWARD_TOLERANCE)


@pytest.mark.parametrize("t, d", [(1, 5), (16, 128), (17, 130), (600, 3)])
def test_any_number_of_tokens_and_channels_serves(rng, t, d):
    check_scan(scan_inputs(rng, shape=(2, t, d)), None, False)


def test_channels_are_split_into_blocks(rng, monkeypatch):
    monkeypatch.setattr(tpu_scan, "MAX_LANES", 128)
    check_scan(scan_inputs(rng, shape=(1, 33, 300)), None, True)


@pytest.mark.parametrize("log_decay", [0.0, -150.0])
def test_extreme_decays_equal_the_oracle(rng, small_blocks, log_decay):
    a, *rest = scan_inputs(rng)
    check_scan((np.full_like(a, np.exp(log_decay)), *rest), SEGMENTS, False)


@directions
def test_nothing_at_padding_reaches_a_result(rng, small_blocks, reverse):
    a, x, h0, dh, dh_last = map(single, scan_inputs(rng))
    kinds, padding = kinds_of(SEGMENTS, reverse), (SEGMENTS == 0)[:, :, None]

    def results(garbage):
        bad_a, bad_x = jnp.where(padding, garbage, a), jnp.where(padding, garbage, x)
        h, last = linear_scan.forward(bad_a, bad_x, h0, kinds, reverse=reverse, interpret=True)
        gradients = linear_scan.adjoint(
            bad_a, h, h0, dh, dh_last, kinds, reverse=reverse, x_dtype=jnp.float32, interpret=True
        )
        summary = linear_scan.summary(bad_a, bad_x, kinds, reverse=reverse, premultiplied=False, interpret=True)
        return h, last, *gradients, *summary

    for dirty, clean in zip(results(jnp.nan), results(0.5), strict=True):
        np.testing.assert_array_equal(dirty, clean)


@directions
@pytest.mark.parametrize("complex_a", [False, True], ids=["real", "complex"])
def test_summaries_say_what_all_of_time_does(rng, small_blocks, reverse, complex_a):
    a, x, h0, dh, dh_last = scan_inputs(rng, complex_a=complex_a, complex_x=complex_a)
    kinds = kinds_of(SEGMENTS, reverse)
    _, last, _, _, dh0 = scan_oracle(a, x, h0, kinds, dh, dh_last, reverse)
    decay, added = linear_scan.summary(
        single(a), single(x), kinds, reverse=reverse, premultiplied=False, interpret=True
    )
    assert distance(decay * single(h0) + added, last) < FORWARD_TOLERANCE
    decay, added = linear_scan.summary(
        single(a), single(dh), kinds, reverse=not reverse, premultiplied=True, interpret=True
    )
    assert distance(decay * single(dh_last) + added, dh0) < GRADIENT_TOLERANCE


@jax.custom_jvp
def bounded_sqrt(y):
    return jnp.sqrt(y)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / jnp.maximum(2 * root, 1e-3)


def rg_lru_loop(x, gate_a, gate_x, rate, h0, kinds):
    """The paper's equations, token by token."""

    def step(state, token):
        x_t, gate_a_t, gate_x_t, kind = token
        resets, log_a = kind[:, None] == RESET, -rate * jax.nn.sigmoid(gate_a_t)
        gain = jnp.where(resets, 1.0, bounded_sqrt(-jnp.expm1(2 * log_a)))
        new = jnp.where(resets, 0.0, jnp.exp(log_a) * state) + gain * jax.nn.sigmoid(gate_x_t) * x_t
        state = jnp.where(kind[:, None] == PADDING, state, new)
        return state, state

    state, h = jax.lax.scan(step, h0, tuple(jnp.moveaxis(v, 1, 0) for v in (x, gate_a, gate_x, kinds)))
    return jnp.moveaxis(h, 0, 1), state


def check_rg_lru(
    inputs, ids, dtype=jnp.float32, forward=FORWARD_TOLERANCE, gradient=GRADIENT_TOLERANCE, interpret=True
):
    *tokens, rate, h0, dh, dh_last = inputs
    kinds = kinds_of(ids)
    tokens, dh = [single(v, dtype) for v in tokens], single(dh, dtype)
    rate, h0, dh_last = map(single, (rate, h0, dh_last))
    h, last = rg_lru.forward(*tokens, rate, h0, kinds, interpret=interpret)
    gradients = rg_lru.adjoint(*tokens, rate, h, h0, dh, dh_last, kinds, interpret=interpret)
    decay, added = rg_lru.summary(*tokens, rate, kinds, interpret=interpret)
    back_decay, back_added = rg_lru.adjoint_summary(tokens[1], rate, dh, kinds, interpret=interpret)
    assert all(g.dtype == dtype for g in (h, *gradients[:3]))
    with jax.enable_x64(True):
        known = jnp.zeros(h.shape[:2]) if kinds is None else kinds
        doubles = [jnp.asarray(np.asarray(v), jnp.float64) for v in (*tokens, rate, h0)]
        want, vjp = jax.vjp(lambda *v: rg_lru_loop(*v, known), *doubles)
        want_gradients = vjp(tuple(jnp.asarray(np.asarray(v), jnp.float64) for v in (dh, dh_last)))
        want, want_gradients = jax.tree.map(np.asarray, (want, want_gradients))
    for got, value in zip((h, last, decay * h0 + added), (*want, want[1]), strict=True):
        assert distance(got, value) < forward
    carried = back_decay * dh_last + back_added
    for got, value in zip((*gradients, carried), (*want_gradients, want_gradients[-1]), strict=True):
        assert distance(got, value) < gradient


def rg_lru_inputs(rng, shape=(B, T, D)):
    x, gate_a, gate_x, dh = rng.normal(size=(4, *shape))
    rate = rng.uniform(0.01, 8.0, shape[-1])
    h0, dh_last = rng.normal(size=(2, *shape[::2]))
    return x, gate_a, gate_x, rate, h0, dh, dh_last


@pytest.mark.parametrize("ids", [None, SEGMENTS], ids=["one document", "packed"])
def test_rg_lru_and_its_gradient_equal_the_papers_loop(rng, small_blocks, ids):
    check_rg_lru(rg_lru_inputs(rng), ids)


def test_bfloat16_rg_lru_equals_the_papers_loop(rng, small_blocks):
    check_rg_lru(rg_lru_inputs(rng), SEGMENTS, jnp.bfloat16, BFLOAT16_TOLERANCE, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 1e-3, 0.03, 150.0])
def test_gain_is_exact_from_a_frozen_to_a_forgetful_state(rng, rate):
    x, gate_a, gate_x, _, *rest = rg_lru_inputs(rng, (2, 19, D))
    check_rg_lru((x, gate_a, gate_x, np.full(D, rate), *rest), None)


def test_rg_lru_ignores_what_stands_at_padding(rng, small_blocks):
    *tokens, rate, h0, dh, dh_last = map(single, rg_lru_inputs(rng))
    kinds, padding = kinds_of(SEGMENTS), (SEGMENTS == 0)[:, :, None]

    def results(garbage):
        bad = [jnp.where(padding, garbage, v) for v in tokens]
        h, last = rg_lru.forward(*bad, rate, h0, kinds, interpret=True)
        return h, last, *rg_lru.adjoint(*bad, rate, h, h0, dh, dh_last, kinds, interpret=True)

    for dirty, clean in zip(results(jnp.nan), results(0.5), strict=True):
        np.testing.assert_array_equal(dirty, clean)


@pytest.mark.parametrize("op", ["linear_scan", "rg_lru"])
def test_blocks_are_visited_in_order_and_without_races(rng, small_blocks, op):
    """As on a TPU of two cores: uninitialised memory is NaN, and reads outside an array are errors."""
    try:
        interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
        if op == "linear_scan":
            check_scan(scan_inputs(rng, shape=(1, 64, 128)), None, False, interpret=interpret)
        else:
            check_rg_lru(rg_lru_inputs(rng, (1, 64, 128)), SEGMENTS[1:2, :64], interpret=interpret)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("dtype", ["float16", "float64", "complex128"])
def test_unsupported_dtypes_are_refused_with_the_ones_that_serve(dtype):
    operand = jax.ShapeDtypeStruct((1, 8, 8), dtype) if dtype == "float16" else np.zeros((1, 8, 8), dtype)
    assert linear_scan.supports(operand, operand) == f"takes bfloat16, float32, complex64, not {dtype}"
    assert rg_lru.supports(operand, operand, operand) == f"takes bfloat16, float32, not {dtype}"
