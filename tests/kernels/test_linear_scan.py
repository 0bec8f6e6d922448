"""linear_scan against a token-by-token float64 oracle with a hand-derived gradient. Sizes are odd on purpose."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import linear_scan
from hybridlm_kernels.linear_scan.chunked import adjoint_in_chunks, chunk_length, scan_in_chunks
from hybridlm_kernels.segments import token_kinds
from jax.sharding import AxisType, NamedSharding, PartitionSpec

B, T, D = 5, 37, 3
FORWARD_TOLERANCE, GRADIENT_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-4, 1e-2  # relative L2, against float64

SEGMENTS = np.zeros((B, T), np.int32)
SEGMENTS[0] = 1
SEGMENTS[1, 3:20], SEGMENTS[1, 22:30] = 1, 2  # padding before, between and after
SEGMENTS[2] = np.arange(1, T + 1)  # one-token documents
SEGMENTS[3, :9], SEGMENTS[3, 9:10], SEGMENTS[3, 10:17], SEGMENTS[3, 20:25] = 1, 2, 1, 1  # an id comes back
# row 4 is padding alone

implementations = pytest.mark.parametrize("impl", ["reference", "chunked"])
directions = pytest.mark.parametrize("reverse", [False, True])


def scan_oracle(a, x, h0, ids, reverse=False):
    """h, h_last and a function from their cotangents to those of a, x and h0."""
    a, x, h0 = (np.asarray(v, np.result_type(v.dtype, np.float64)) for v in (a, x, h0))
    dtype = np.result_type(a, x, h0)
    h, order = np.zeros(x.shape, dtype), list(range(x.shape[1]))[:: -1 if reverse else 1]
    before, kept, h_last = np.zeros(x.shape, dtype), np.ones(x.shape, dtype), np.zeros(h0.shape, dtype)
    for row in range(x.shape[0]):
        state, last_id = h0[row].astype(dtype), 0
        for t in order:
            if ids[row, t] != 0:
                fresh = last_id not in (0, ids[row, t])
                before[row, t] = 0 if fresh else state
                kept[row, t] = 0 if fresh else a[row, t]
                state, last_id = a[row, t] * before[row, t] + x[row, t], ids[row, t]
            h[row, t] = state
        h_last[row] = state

    def vjp(dh, dh_last):
        da, dx, u = np.zeros(x.shape, dtype), np.zeros(x.shape, dtype), np.array(dh_last, dtype)
        for t in order[::-1]:
            u = u + dh[:, t]
            real = (ids[:, t] != 0)[:, None]
            da[:, t], dx[:, t] = np.where(real, u * before[:, t], 0), np.where(real, u, 0)
            u = kept[:, t] * u
        return da, dx, u

    return h, h_last, vjp


def distance(got, want) -> float:
    got, want = np.asarray(got), np.asarray(want)
    got = got.astype(np.result_type(got.dtype, np.float64) if got.dtype.kind in "fc" else np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def scan_inputs(seed=0, dtype=np.float32, shape=(B, T, D)):
    rng = np.random.default_rng(seed)
    a = rng.uniform(0.3, 1.0, shape)
    x, h0, dh, dh_last = (rng.normal(size=s) for s in (shape, (shape[0], shape[2]), shape, (shape[0], shape[2])))
    if np.dtype(dtype).kind == "c":
        a = a * np.exp(1j * rng.uniform(-3, 3, shape))
        x, h0, dh, dh_last = (v + 1j * rng.normal(size=v.shape) for v in (x, h0, dh, dh_last))
    return tuple(v.astype(dtype) for v in (a, x, h0, dh, dh_last))


def check_against_oracle(a, x, h0, dh, dh_last, ids, forward=FORWARD_TOLERANCE, gradient=GRADIENT_TOLERANCE, **options):
    @jax.jit
    def values_and_gradients(a, x, h0, dh, dh_last):
        f = partial(linear_scan, segment_ids=None if ids is None else jnp.asarray(ids), **options)
        (h, h_last), vjp = jax.vjp(lambda a, x, h0: f(a, x, h0=h0), a, x, h0)
        return h, h_last, vjp((dh.astype(h.dtype), dh_last.astype(h_last.dtype)))

    h, h_last, gradients = values_and_gradients(a, x, h0, dh, dh_last)
    all_real = np.ones(x.shape[:2], np.int32)
    want_h, want_last, want_vjp = scan_oracle(a, x, h0, all_real if ids is None else ids, options.get("reverse", False))
    assert distance(h, want_h) < forward
    assert distance(h_last, want_last) < forward
    for got, want in zip(gradients, want_vjp(dh, dh_last), strict=True):
        assert distance(got, want if np.iscomplexobj(got) else want.real) < gradient


@implementations
@directions
@pytest.mark.parametrize("ids", [None, SEGMENTS], ids=["one document", "packed"])
def test_values_and_gradients_equal_the_oracle(impl, reverse, ids):
    check_against_oracle(*scan_inputs(), ids, impl=impl, reverse=reverse)


@implementations
@directions
@pytest.mark.parametrize("t", [1, 2, 5, 64, 97])
def test_any_number_of_tokens_serves(impl, reverse, t):
    rng = np.random.default_rng(t)
    ids = np.sort(rng.integers(0, 4, (2, t)), axis=1).astype(np.int32)
    check_against_oracle(*scan_inputs(1, shape=(2, t, 4)), ids, impl=impl, reverse=reverse)


@implementations
@directions
def test_complex_recurrences_equal_the_oracle(impl, reverse):
    check_against_oracle(*scan_inputs(2, np.complex64), SEGMENTS, impl=impl, reverse=reverse)


@implementations
def test_real_decay_of_a_complex_state_gets_a_real_gradient(impl):
    a, *rest = scan_inputs(3, np.complex64)
    check_against_oracle(np.abs(a), *rest, SEGMENTS, impl=impl)


@implementations
@pytest.mark.parametrize("log_decay", [0.0, -150.0])
def test_extreme_decays_equal_the_oracle(impl, log_decay):
    a, *rest = scan_inputs(4)
    check_against_oracle(np.full_like(a, np.exp(log_decay)), *rest, SEGMENTS, impl=impl)


@implementations
def test_bfloat16_is_within_a_hundredth_and_carries_float32(impl):
    a, x, h0, dh, dh_last = (jnp.asarray(v, jnp.bfloat16) for v in scan_inputs(5))
    as_numpy = [np.asarray(v, np.float32) for v in (a, x, h0, dh, dh_last)]
    (h, h_last), vjp = jax.vjp(lambda *args: linear_scan(*args[:2], h0=args[2], impl=impl), a, x, h0)
    want_h, want_last, want_vjp = scan_oracle(*as_numpy[:3], np.ones((B, T)))
    assert h.dtype == jnp.bfloat16 and h_last.dtype == jnp.float32
    assert distance(h, want_h) < BFLOAT16_TOLERANCE
    assert distance(h_last, want_last) < FORWARD_TOLERANCE  # one rounding of the output is all that bfloat16 costs
    for got, want in zip(vjp((dh, dh_last.astype(jnp.float32))), want_vjp(*as_numpy[3:]), strict=True):
        assert got.dtype == jnp.bfloat16
        assert distance(got, want) < BFLOAT16_TOLERANCE


@implementations
def test_float32_decay_with_bfloat16_input_gives_float32_states(impl):
    a, x, h0, *_ = scan_inputs(6)
    h, _ = linear_scan(jnp.asarray(a), jnp.asarray(x, jnp.bfloat16), h0=jnp.asarray(h0), impl=impl)
    grads = jax.grad(lambda x: linear_scan(jnp.asarray(a), x, impl=impl)[0].sum())(jnp.asarray(x, jnp.bfloat16))
    assert h.dtype == jnp.float32 and grads.dtype == jnp.bfloat16


@implementations
def test_float64_is_computed_in_float64(impl):
    with jax.enable_x64(True):
        check_against_oracle(*scan_inputs(7, np.float64), SEGMENTS, forward=1e-13, gradient=1e-13, impl=impl)


@implementations
@directions
def test_two_halves_joined_by_the_state_equal_the_whole(impl, reverse):
    a, x, h0, *_ = map(jnp.asarray, scan_inputs(8))
    halves = [slice(0, 16), slice(16, None)][:: -1 if reverse else 1]
    whole, whole_last = linear_scan(a, x, h0=h0, impl=impl, reverse=reverse)
    state, parts = h0, []
    for half in halves:
        h, state = linear_scan(a[:, half], x[:, half], h0=state, impl=impl, reverse=reverse)
        parts.append(h)
    np.testing.assert_allclose(jnp.concatenate(parts[:: -1 if reverse else 1], 1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, whole_last, rtol=1e-5, atol=1e-6)


@implementations
def test_packed_documents_equal_the_documents_alone(impl):
    a, x, _, dh, _ = map(jnp.asarray, scan_inputs(9))
    documents = [(slice(0, 7), 4), (slice(7, 8), 9), (slice(11, 37), 2)]
    ids = np.zeros((B, T), np.int32)
    for where, name in documents:
        ids[:, where] = name

    @jax.jit
    def states_and_gradients(a, x, dh, ids):
        h, vjp = jax.vjp(lambda a, x: linear_scan(a, x, segment_ids=ids, impl=impl)[0], a, x)
        return h, *vjp(dh)

    packed = states_and_gradients(a, x, jnp.where(ids[:, :, None] != 0, dh, 0), jnp.asarray(ids))
    for where, _ in documents:
        alone = states_and_gradients(a[:, where], x[:, where], dh[:, where], None)
        for got, want in zip(packed, alone, strict=True):
            np.testing.assert_allclose(got[:, where], want, rtol=1e-5, atol=1e-6)


@implementations
def test_padding_alone_returns_the_initial_state(impl):
    a, x, h0, *_ = map(jnp.asarray, scan_inputs(10))
    h, h_last = linear_scan(a, x, h0=h0, segment_ids=jnp.zeros((B, T), jnp.int32), impl=impl)
    np.testing.assert_array_equal(h_last, h0)
    np.testing.assert_array_equal(h, np.broadcast_to(h0[:, None], h.shape))


@pytest.mark.parametrize("chunk", [1, 5, 8, 37])
@directions
def test_parallel_chunks_equal_the_oracle(chunk, reverse):
    """The form that accelerators take; on CPU the op itself runs one chunk."""
    a, x, h0, dh, dh_last = map(jnp.asarray, scan_inputs(11))
    kinds = token_kinds(jnp.asarray(SEGMENTS), reverse)[:, :, None]
    forward = jax.jit(partial(scan_in_chunks, chunk=chunk, reverse=reverse))
    adjoint = jax.jit(partial(adjoint_in_chunks, chunk=chunk, reverse=reverse, x_dtype=x.dtype))
    h, h_last = forward(a, x, h0, kinds)
    gradients = adjoint(a, h, h0, dh, dh_last, kinds)
    want_h, want_last, want_vjp = scan_oracle(*map(np.asarray, (a, x, h0)), SEGMENTS, reverse)
    assert max(distance(h, want_h), distance(h_last, want_last)) < FORWARD_TOLERANCE
    for got, want in zip(gradients, want_vjp(np.asarray(dh), np.asarray(dh_last)), strict=True):
        assert distance(got, want) < GRADIENT_TOLERANCE


def test_chunks_divide_the_sequence_where_they_can():
    assert [chunk_length(t) for t in (1, 32, 2048, 4096)] == [1, 32, 32, 64]
    assert chunk_length(2053) == 32  # a prime is filled up


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_training_lowers_for_an_absent_accelerator(platform):
    a = jax.ShapeDtypeStruct((2, 256, 128), jnp.bfloat16)
    gradient = jax.grad(lambda a, x: linear_scan(a, x)[0].astype(jnp.float32).sum(), (0, 1))
    assert "while" in jax.jit(gradient).trace(a, a).lower(lowering_platforms=(platform,)).as_text()


@implementations
def test_transformations_compose(impl):
    a, x, *_ = (jnp.asarray(v)[None].repeat(2, 0) for v in scan_inputs(12))

    def loss(a, x):
        def layer(y, _):
            h, h_last = linear_scan(a, y, impl=impl)
            return h, h_last.sum()

        y, extra = jax.lax.scan(jax.checkpoint(layer), x, length=2)
        return (y**2).sum() + extra.sum()

    together = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(a, x)
    alone = jax.jit(jax.grad(loss, (0, 1)))(a[1], x[1])
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_allclose(got[1], want, rtol=2e-5, atol=1e-4)


@pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
@pytest.mark.parametrize("state_spec", [("data", "tensor"), (None, None)], ids=["sharded state", "replicated state"])
def test_sharded_batch_and_channels_equal_one_device_and_gather_nothing(state_spec):
    shape = (4, 37, 16)
    a, x, h0, dh, dh_last = map(jnp.asarray, scan_inputs(13, shape=shape))
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, shape[:2]), axis=1).astype(np.int32))

    def values_and_gradients(a, x, h0, ids, dh, dh_last):
        out, vjp = jax.vjp(lambda a, x, h0: linear_scan(a, x, h0=h0, segment_ids=ids), a, x, h0)
        return *out, *vjp((dh, dh_last))

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    wide = ("data", None, "tensor")
    specs = (wide, wide, state_spec, ("data", None), wide, ("data", "tensor"))
    want = values_and_gradients(a, x, h0, ids, dh, dh_last)
    placed = [
        jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec)))
        for v, spec in zip((a, x, h0, ids, dh, dh_last), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(values_and_gradients).lower(*placed).compile()
        got, text = compiled(*placed), compiled.as_text()
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(jax.device_get(one), other, rtol=1e-5, atol=1e-6)
    assert jax.typeof(got[0]).sharding.spec == PartitionSpec(*wide)
    gathered = [line for line in text.splitlines() if "all-gather(" in line]
    # the gradient of a replicated state is replicated, [4, 16]; nothing with time in it may be gathered
    assert not (gathered if state_spec[0] else [line for line in gathered if re.search(r"= \w+\[[^\]]*\b37\b", line)])
    assert "all-to-all" not in text
