"""rg_lru against a token-by-token float64 loop with a hand-derived gradient. Sizes are odd on purpose."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hybridlm_kernels import UnsupportedKernel, rg_lru
from hybridlm_kernels.rg_lru import bounded_sqrt, decay_and_root

B, T, D = 4, 37, 5
FORWARD_TOLERANCE, GRADIENT_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-4, 1e-2  # relative L2, against float64

IDS = np.zeros((B, T), np.int32)
IDS[0] = 1
IDS[1, 3:20], IDS[1, 22:30] = 1, 2  # padding before, between and after
IDS[2] = np.arange(1, T + 1)  # one-token documents
# row 3 is padding alone

implementations = pytest.mark.parametrize("impl", ["reference", "chunked"])


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def oracle(x, gate_a, gate_x, decay, h0, ids, first):
    """h, h_last and a function from their cotangents to those of x, gate_a, gate_x, decay and h0, all float64."""
    x, gate_a, gate_x, decay, h0 = (np.asarray(v, np.float64) for v in (x, gate_a, gate_x, decay, h0))
    rate = 8 * np.log1p(np.exp(decay))
    r, i = sigmoid(gate_a), sigmoid(gate_x)
    a = np.exp(-rate * r)
    root = np.sqrt(-np.expm1(-2 * rate * r))
    h, before, h_last = np.zeros(x.shape), np.zeros(x.shape), np.zeros(h0.shape)
    for row in range(x.shape[0]):
        state = h0[row]
        for t in range(x.shape[1]):
            before[row, t] = 0 if first[row, t] else state
            if ids[row, t] != 0:
                state = a[row, t] * before[row, t] + (1 if first[row, t] else root[row, t]) * i[row, t] * x[row, t]
            h[row, t] = state
        h_last[row] = state

    def vjp(dh, dh_last):
        dx, dga, dgx, drate = np.zeros(x.shape), np.zeros(x.shape), np.zeros(x.shape), np.zeros(decay.shape)
        dh0 = np.zeros(h0.shape)
        for row in range(x.shape[0]):
            u = np.array(dh_last[row], np.float64)
            for t in range(x.shape[1])[::-1]:
                u = u + dh[row, t]
                if ids[row, t] == 0:
                    continue
                at = row, t
                gain = 1 if first[at] else root[at]
                dx[at], dgx[at] = u * gain * i[at], u * gain * x[at] * i[at] * (1 - i[at])
                dlog_a = u * before[at] * a[at]
                if not first[at]:
                    dlog_a = dlog_a - u * i[at] * x[at] * 2 * a[at] ** 2 / np.maximum(2 * root[at], 1e-3)
                dga[at] = -dlog_a * rate * r[at] * (1 - r[at])
                drate += -dlog_a * r[at]
                u = np.zeros_like(u) if first[at] else a[at] * u
            dh0[row] = u
        return dx, dga, dgx, drate * 8 * sigmoid(decay), dh0

    return h, h_last, vjp


def first_tokens(ids, with_state):
    first = np.zeros(ids.shape, bool)
    for row in range(ids.shape[0]):
        last = 0
        for t in range(ids.shape[1]):
            if ids[row, t] != 0:
                first[row, t] = ids[row, t] != last if last or not with_state else False
                last = ids[row, t]
    return first


def inputs(seed=0, shape=(B, T, D)):
    rng = np.random.default_rng(seed)
    b, t, d = shape
    sizes = (shape, shape, shape, (d,), (b, d), shape, (b, d))
    return tuple(rng.normal(size=size).astype(np.float32) for size in sizes)


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def check(operands, dh, dh_last, ids, first, forward=FORWARD_TOLERANCE, gradient=GRADIENT_TOLERANCE, **options):
    *arrays, h0 = operands
    all_real = np.ones(dh.shape[:2], np.int32)

    @jax.jit
    def values_and_gradients(operands, dh, dh_last):
        run = partial(rg_lru, segment_ids=None if ids is None else jnp.asarray(ids), **options)
        out, vjp = jax.vjp(lambda *v: run(*v[:4], h0=v[4] if h0 is not None else None), *operands)
        return *out, vjp((dh.astype(out[0].dtype), dh_last.astype(out[1].dtype)))

    h, h_last, gradients = values_and_gradients(tuple(operands), dh, dh_last)
    state = np.zeros(dh_last.shape) if h0 is None else h0
    want_h, want_last, vjp = oracle(*arrays, state, all_real if ids is None else ids, first)
    assert distance(h, want_h) < forward
    assert distance(h_last, want_last) < forward
    for got, want in zip(gradients, vjp(dh, dh_last), strict=True):
        if got is not None:
            assert distance(got, want) < gradient


@implementations
@pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "packed"])
@pytest.mark.parametrize("with_state", [False, True])
def test_values_and_gradients_equal_the_oracle(impl, ids, with_state):
    *operands, dh, dh_last = inputs()
    operands[4] = operands[4] if with_state else None
    first = first_tokens(np.ones((B, T), np.int32) if ids is None else ids, with_state)
    check(operands, dh, dh_last, ids, first, impl=impl)


@implementations
def test_positions_say_where_documents_begin(impl):
    *operands, dh, dh_last = inputs(1)
    ids = np.ones((B, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    positions[1:, 11:] -= 11  # the same id, and another document
    positions[2] += 5  # row 2 goes on with the state
    check(operands, dh, dh_last, ids, positions == 0, impl=impl, positions=jnp.asarray(positions))


@implementations
def test_two_halves_joined_by_the_state_equal_the_whole(impl):
    x, gate_a, gate_x, decay, *_ = map(jnp.asarray, inputs(2))
    whole, last = rg_lru(x, gate_a, gate_x, decay, impl=impl)
    parts, state = [], None
    for half in (slice(0, 16), slice(16, None)):
        h, state = rg_lru(x[:, half], gate_a[:, half], gate_x[:, half], decay, h0=state, impl=impl)
        parts.append(h)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)


@implementations
def test_bfloat16_input_gives_bfloat16_states_and_carries_float32(impl):
    x, gate_a, gate_x, decay, *_ = inputs(3)
    half = jnp.asarray(x, jnp.bfloat16)
    h, h_last = rg_lru(half, gate_a, gate_x, decay, impl=impl)
    exact = np.asarray(half, np.float32)
    want, want_last, _ = oracle(
        exact, gate_a, gate_x, decay, np.zeros((B, D)), np.ones((B, T)), first_tokens(np.ones((B, T), int), False)
    )
    assert h.dtype == jnp.bfloat16 and h_last.dtype == jnp.float32
    assert distance(h, want) < BFLOAT16_TOLERANCE
    assert distance(h_last, want_last) < FORWARD_TOLERANCE


def test_gradient_is_finite_and_exact_near_a_decay_of_one():
    def root(log_softplus):
        # softplus(L) is about exp(L) here, so that a = 1 - 4 exp(L) down to exactly 1 in float32.
        return decay_and_root(jnp.zeros(()), 8 * jax.nn.softplus(log_softplus))[1]

    points = np.array([-5.0, -10.0, -12.0, -60.0, -200.0], np.float32)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(root)))(points)
    # 1 - a^2 = -expm1(-8 softplus(L)); its root's slope in L, by hand.
    squared = -np.expm1(-8 * np.log1p(np.exp(points.astype(np.float64))))
    inside = 8 * np.exp(points.astype(np.float64)) / (1 + np.exp(points.astype(np.float64))) * (1 - squared)
    np.testing.assert_allclose(values, np.sqrt(squared), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(slopes[:3], inside[:3] / (2 * np.sqrt(squared[:3])), rtol=1e-5)
    assert np.all(np.isfinite(slopes))


def test_root_has_a_bounded_slope():
    slopes = jax.vmap(jax.grad(bounded_sqrt))(jnp.array([0.0, 1e-12, 1e-4, 1.0]))
    np.testing.assert_allclose(slopes, [1000.0, 1000.0, 50.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_a": np.zeros((B, T, D + 1))}, r"gate_a: shape \(4, 37, 6\) must be \[batch, time, channels\]"),
        ({"decay": np.zeros((B, D))}, r"decay: shape \(4, 5\) must be \[channels\] = \(5,\)"),
        ({"x": np.zeros((B, 0, D))}, "no time step"),
        ({"gate_x": np.zeros((B, T, D), np.int32)}, "gate_x: dtype int32 must be one of bfloat16,"),
        ({"h0": np.zeros((B, T, D))}, r"h0: shape \(4, 37, 5\) must be \[batch, channels\]"),
        ({"positions": np.zeros((B, 3), np.int32)}, r"positions: shape \(4, 3\) must be \[batch, time\]"),
        ({"segment_ids": np.ones((B, T))}, "segment_ids: dtype float64 must be an integer type"),
        ({"impl": "pallas_tpu"}, "impl='pallas_tpu': rg_lru runs on TPU, and this is CPU; use auto"),
    ],
)
def test_a_wrong_call_gets_one_clear_line(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    x, gate_a, gate_x, decay, *_ = inputs()
    call = {"x": x, "gate_a": gate_a, "gate_x": gate_x, "decay": decay} | change
    expected = UnsupportedKernel if "impl" in change else ValueError
    with pytest.raises(expected, match=message) as error, jax.enable_x64(True):
        rg_lru(**call)
    assert "\n" not in str(error.value)
