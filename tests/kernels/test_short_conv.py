"""short_conv against an oracle that walks the documents one by one in float64. Sizes are odd on purpose."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import short_conv
from hybridlm_kernels.short_conv.activations import ACTIVATIONS
from hybridlm_kernels.short_conv.chunked import sums_by_tap, sums_in_one_pass
from jax.sharding import AxisType, NamedSharding, PartitionSpec

B, T, D, W = 6, 23, 5, 4
FORWARD_TOLERANCE, GRADIENT_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-4, 1e-2  # relative L2, against float64

SEGMENTS = np.zeros((B, T), np.int32)
SEGMENTS[0] = 1
SEGMENTS[1, 5:7], SEGMENTS[1, 9:16], SEGMENTS[1, 16:18] = 1, 2, 3  # padding around, a short last document
SEGMENTS[2] = np.arange(1, T + 1)  # one-token documents
SEGMENTS[3, :6], SEGMENTS[3, 6:8], SEGMENTS[3, 8:] = 1, 2, 1  # an id comes back
SEGMENTS[4, T - 2 :] = 3  # fewer tokens than taps, after padding
# row 5 is padding alone

implementations = pytest.mark.parametrize("impl", ["reference", "chunked"])


def activate(name, z):
    """The activation and its derivative; a complex step is exact to rounding."""
    formulas = {
        None: lambda z: z,
        "silu": lambda z: z / (1 + np.exp(-z)),
        "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
        "relu": lambda z: np.where(z.real > 0, z, 0),
    }
    return formulas[name](z), formulas[name](z + 1e-30j).imag / 1e-30


def conv_oracle(x, w, bias, state, ids, activation):
    """y, the new state and a function from dy and dstate to the cotangents of x, w, bias and state."""
    x, w, bias, state = (np.asarray(v, np.float64) for v in (x, w, bias, state))
    taps, before = w.shape[0], np.broadcast_to(bias, x.shape).copy()
    new_state, reads, held = state.copy(), [], []  # reads: (row, t, tap, source); a source is ("x" or "state", time)
    for row in range(x.shape[0]):
        window, last_id = [("state", i) for i in range(taps - 1)], 0
        for t in np.flatnonzero(ids[row]):
            window = [None] * (taps - 1) if last_id not in (0, ids[row, t]) else window
            window, last_id = [*window, ("x", t)], ids[row, t]
            reads += [(row, t, tap, source) for tap, source in enumerate(window) if source]
            window = window[1:]
        held += [(row, i, source) for i, source in enumerate(window)]
    value = {"x": x, "state": state}
    for row, t, tap, (name, time) in reads:
        before[row, t] += w[tap] * value[name][row, time]
    for row, i, source in held:
        new_state[row, i] = value[source[0]][row, source[1]] if source else 0
    y, slope = activate(activation, before)

    def vjp(dy, dstate):
        dy = dy * slope
        grads, dw = {"x": np.zeros_like(x), "state": np.zeros_like(state)}, np.zeros_like(w)
        for row, t, tap, (name, time) in reads:
            grads[name][row, time] += w[tap] * dy[row, t]
            dw[tap] += dy[row, t] * value[name][row, time]
        for row, i, source in held:
            if source:
                grads[source[0]][row, source[1]] += dstate[row, i]
        return grads["x"], dw, dy.sum((0, 1)), grads["state"]

    return y, new_state, vjp


def distance(got, want) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30))


def conv_inputs(seed, t=T, taps=W, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = (B, t, D), (taps, D), (D,), (B, taps - 1, D), (B, t, D), (B, taps - 1, D)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def check_against_oracle(inputs, ids, impl, activation=None, forward=FORWARD_TOLERANCE, gradient=GRADIENT_TOLERANCE):
    *operands, dy, dstate = inputs
    segment_ids = None if ids is None else jnp.asarray(ids)

    @jax.jit
    def values_and_gradients(operands, cotangents):
        def f(x, w, bias, state):
            options = {"segment_ids": segment_ids, "activation": activation, "impl": impl}
            return short_conv(x, w, bias=bias, state=state, **options)

        out, vjp = jax.vjp(f, *operands)
        return *out, vjp(cotangents)

    y, new_state, gradients = values_and_gradients(operands, (dy, dstate))
    real = np.ones(operands[0].shape[:2], np.int32) if ids is None else ids
    want_y, want_state, want_vjp = conv_oracle(*operands, real, activation)
    assert distance(y, want_y) < forward
    assert distance(new_state, want_state) < forward
    for got, want in zip(gradients, want_vjp(dy, dstate), strict=True):
        assert distance(got, want) < gradient


@implementations
@pytest.mark.parametrize("ids", [None, SEGMENTS], ids=["one document", "packed"])
def test_values_and_gradients_equal_the_oracle(impl, ids):
    check_against_oracle(conv_inputs(0), ids, impl)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_the_oracle(activation):
    check_against_oracle(conv_inputs(0), SEGMENTS, "chunked", activation)


@implementations
@pytest.mark.parametrize(("t", "taps"), [(1, 4), (2, 4), (3, 4), (9, 1), (1, 1), (17, 2)])
def test_any_number_of_tokens_and_taps_serves(impl, t, taps):
    ids = np.sort(np.random.default_rng(t).integers(0, 3, (B, t)), axis=1).astype(np.int32)
    check_against_oracle(conv_inputs(1, t, taps), ids, impl, "silu")
    check_against_oracle(conv_inputs(1, t, taps), None, impl, "silu")


@implementations
def test_the_last_weight_is_the_current_token(impl):
    x = jnp.asarray(conv_inputs(2)[0])
    now = jnp.zeros((W, D)).at[-1].set(1)
    np.testing.assert_array_equal(short_conv(x, now, impl=impl)[0], x)


@implementations
def test_token_by_token_with_the_state_equals_the_whole(impl):
    x, w, bias, state, *_ = map(jnp.asarray, conv_inputs(3, t=7))
    ids = np.ones((B, 7), np.int32)  # one document a row: one token's id cannot tell two apart
    ids[1, :2], ids[2, 5:], ids[3, :6], ids[4] = 0, 0, 0, 0
    convolve = jax.jit(partial(short_conv, activation="silu", impl=impl))
    whole, whole_state = convolve(x, w, bias=bias, state=state, segment_ids=ids)
    for t in range(7):
        now = slice(t, t + 1)
        y, state = convolve(x[:, now], w, bias=bias, state=state, segment_ids=ids[:, now])
        np.testing.assert_allclose(y, whole[:, now], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(state, whole_state)


@implementations
def test_packed_documents_equal_the_documents_alone(impl):
    x, w, bias, _, dy, _ = map(jnp.asarray, conv_inputs(4))
    documents = [(slice(0, 7), 4), (slice(7, 8), 9), (slice(10, 23), 2)]
    ids = np.zeros((B, T), np.int32)
    for where, name in documents:
        ids[:, where] = name

    @jax.jit
    def outputs_and_gradients(x, dy, ids):
        f = partial(short_conv, bias=bias, segment_ids=ids, activation="silu", impl=impl)
        y, vjp = jax.vjp(lambda x, w: f(x, w)[0], x, w)
        return y, *vjp(dy)

    y, dx, dw = outputs_and_gradients(x, jnp.where(ids[:, :, None] != 0, dy, 0), jnp.asarray(ids))
    alone = [outputs_and_gradients(x[:, where], dy[:, where], None) for where, _ in documents]
    for (where, _), (alone_y, alone_dx, _) in zip(documents, alone, strict=True):
        np.testing.assert_allclose(y[:, where], alone_y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx[:, where], alone_dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, sum(each[2] for each in alone), rtol=1e-4, atol=1e-5)


@implementations
def test_padding_alone_returns_the_state_it_got(impl):
    x, w, _, state, *_ = map(jnp.asarray, conv_inputs(5))
    _, new_state = short_conv(x, w, state=state, segment_ids=jnp.zeros((B, T), jnp.int32), impl=impl)
    np.testing.assert_array_equal(new_state, state)


@implementations
def test_bfloat16_is_within_a_hundredth_and_holds_float32(impl):
    inputs = [np.asarray(jnp.asarray(v, jnp.bfloat16), np.float32) for v in conv_inputs(6)]
    x, w, bias, state, *_ = (jnp.asarray(v, jnp.bfloat16) for v in inputs)
    y, new_state = short_conv(x, w, bias=bias, state=state, activation="silu", impl=impl)
    want_y, want_state, _ = conv_oracle(*inputs[:4], np.ones((B, T)), "silu")
    assert y.dtype == jnp.bfloat16 and new_state.dtype == jnp.float32
    assert distance(y, want_y) < BFLOAT16_TOLERANCE
    assert distance(new_state, want_state) == 0


@implementations
def test_float64_is_computed_in_float64(impl):
    with jax.enable_x64(True):
        inputs = conv_inputs(7, dtype=np.float64)
        check_against_oracle(inputs, SEGMENTS, impl, "gelu", forward=1e-13, gradient=1e-13)


def test_both_forms_of_the_weight_gradient_agree():
    """Accelerators take one, CPU the other."""
    x, _, _, _, dy, _ = map(jnp.asarray, conv_inputs(8))
    masks = [jnp.asarray(np.random.default_rng(j).random((B, T, 1)) < (np.arange(T) >= j)[:, None]) for j in range(W)]
    for allowed in (None, masks):
        by_tap, in_one_pass = (form(dy, x, allowed, reach=W) for form in (sums_by_tap, sums_in_one_pass))
        np.testing.assert_allclose(by_tap, in_one_pass, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_training_lowers_for_an_absent_accelerator(platform):
    x, w = jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4, 128), jnp.float32)
    gradient = jax.grad(lambda x, w: short_conv(x, w, activation="silu")[0].astype(jnp.float32).sum(), (0, 1))
    assert "while" not in jax.jit(gradient).trace(x, w).lower(lowering_platforms=(platform,)).as_text()


@implementations
def test_transformations_compose(impl):
    x, w, *_ = (jnp.asarray(v)[None].repeat(2, 0) for v in conv_inputs(9))

    def loss(x, w):
        def layer(y, _):
            return short_conv(y, w, segment_ids=jnp.asarray(SEGMENTS), activation="silu", impl=impl)[0], None

        return (jax.lax.scan(jax.checkpoint(layer), x, length=2)[0] ** 2).sum()

    together = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, w)
    for got, want in zip(together, jax.jit(jax.grad(loss, (0, 1)))(x[1], w[1]), strict=True):
        np.testing.assert_allclose(got[1], want, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
@pytest.mark.parametrize("bias_spec", [("tensor",), (None,)], ids=["sharded bias", "replicated bias"])
def test_sharded_batch_and_channels_equal_one_device_and_gather_nothing(bias_spec):
    rng = np.random.default_rng(10)
    shapes = (4, 23, 16), (4, 16), (16,), (4, 3, 16), (4, 23, 16)
    x, w, bias, state, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (4, 23)), axis=1).astype(np.int32))

    def values_and_gradients(x, w, bias, state, dy, ids):
        def f(x, w, bias, state):
            return short_conv(x, w, bias=bias, state=state, segment_ids=ids, activation="silu")

        (y, new_state), vjp = jax.vjp(f, x, w, bias, state)
        return y, new_state, *vjp((dy, jnp.ones_like(new_state)))

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    wide = ("data", None, "tensor")
    specs = (wide, (None, "tensor"), bias_spec, wide, wide, ("data", None))
    want = values_and_gradients(x, w, bias, state, dy, ids)
    placed = [
        jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec)))
        for v, spec in zip((x, w, bias, state, dy, ids), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(values_and_gradients).lower(*placed).compile()
        got, text = compiled(*placed), compiled.as_text()
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(jax.device_get(one), other, rtol=1e-4, atol=1e-5)
    assert jax.typeof(got[3]).sharding.spec == PartitionSpec(None, "tensor")
    gathered = [line for line in text.splitlines() if "all-gather(" in line]
    # the gradient of a replicated bias is replicated, [16]; nothing with time in it may be gathered
    assert not (gathered if bias_spec[0] else [line for line in gathered if "23" in line])
    assert "all-to-all" not in text
