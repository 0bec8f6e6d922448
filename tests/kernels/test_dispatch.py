"""Choice of implementation, errors, and operands that are sharded in every way JAX knows."""

import logging

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hybridlm_kernels import IMPLS, OPS, UnsupportedKernel, dispatch, explain, linear_scan, short_conv
from jax.sharding import AxisType, NamedSharding, PartitionSpec

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 8)), jnp.float32)
W = X[0, :3]
H0 = X[:, 0]
IDS = jnp.ones((4, 9), jnp.int32)

eight_devices = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8"
)


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)


def test_explain_gives_choice_and_reason_without_arrays():
    shape = jax.ShapeDtypeStruct((2, 1024, 128), jnp.bfloat16)
    assert explain("linear_scan", shape, shape).impl == "chunked"
    assert "one token" in str(explain("short_conv", jax.ShapeDtypeStruct((2, 1, 128), jnp.bfloat16)))
    assert str(explain("linear_scan", shape, impl="reference")) == "linear_scan: reference (asked for by name)"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl.startswith("pallas")])
def test_a_kernel_that_is_not_there_says_so(op, impl):
    call = {"linear_scan": lambda: linear_scan(X, X, impl=impl), "short_conv": lambda: short_conv(X, W, impl=impl)}[op]
    with pytest.raises(UnsupportedKernel, match=f"impl='{impl}': not implemented for {op}; use auto"):
        call()


def test_auto_equals_every_implementation_that_exists():
    for impl in OPS["linear_scan"]:
        np.testing.assert_allclose(linear_scan(X, X)[0], linear_scan(X, X, impl=impl)[0], rtol=1e-5, atol=1e-6)
    for impl in OPS["short_conv"]:
        np.testing.assert_allclose(short_conv(X, W)[0], short_conv(X, W, impl=impl)[0], rtol=1e-5, atol=1e-6)


def test_the_automatic_choice_is_logged_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="hybridlm_kernels"):
        linear_scan(X, X)
        linear_scan(X, X)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["linear_scan: chunked"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explain("linear_scam"), "op='linear_scam': must be one of .*; did you mean linear_scan?"),
        (lambda: linear_scan(X, X, impl="chunkd"), "impl='chunkd': must be one of auto, .*; did you mean chunked?"),
        (lambda: linear_scan(X[:, :8], X), r"a: shape \(4, 8, 8\) must be \[batch, time, channels\] = \(4, 9, 8\)"),
        (lambda: linear_scan(X[0], X[0]), r"x: shape \(9, 8\) must be \[batch, time, channels\]"),
        (lambda: linear_scan(X[:, :0], X[:, :0]), "no time step"),
        (lambda: linear_scan(X, X.astype(jnp.int32)), "x: dtype int32 must be one of bfloat16,"),
        (lambda: linear_scan(X, X, h0=X), r"h0: shape \(4, 9, 8\) must be \[batch, channels\] = \(4, 8\)"),
        (lambda: linear_scan(X, X, h0=H0 * 1j), "h0: dtype complex64 is complex while a and x are real"),
        (lambda: linear_scan(X, X, segment_ids=IDS[:, :3]), r"segment_ids: shape \(4, 3\) must be \[batch, time\]"),
        (lambda: linear_scan(X, X, segment_ids=IDS * 1.0), "segment_ids: dtype float32 must be an integer type"),
        (lambda: short_conv(X, W[:, :3]), r"w: shape \(3, 3\) must be \[taps, channels\] = \(3, 8\)"),
        (lambda: short_conv(X, W[:0]), "at least one tap"),
        (lambda: short_conv(X, W, bias=W), r"bias: shape \(3, 8\) must be \[channels\] = \(8,\)"),
        (lambda: short_conv(X, W, state=X), r"state: shape \(4, 9, 8\) must be \[batch, taps - 1, channels\]"),
        (lambda: short_conv(X * 1j, W), "x: dtype complex64 must be one of bfloat16,"),
        (lambda: short_conv(X, W, segment_ids=IDS[0]), "segment_ids: shape"),
        (lambda: short_conv(X, W, activation="swish"), "activation='swish': must be None, silu, gelu or relu"),
    ],
)
def test_a_wrong_call_gets_one_clear_line(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production: the ops' own checks speak
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@eight_devices
@pytest.mark.parametrize("op", OPS)
def test_a_sharded_time_axis_is_refused(op):
    x = jax.device_put(X[:, :8], NamedSharding(mesh_of(AxisType.Explicit), PartitionSpec(None, "data")))
    with pytest.raises(ValueError, match="x: its time axis is sharded over 'data'.*shard batch or channels instead"):
        linear_scan(x, x) if op == "linear_scan" else short_conv(x, W)


def both_ops(x: jax.Array, w: jax.Array, h0: jax.Array) -> tuple[jax.Array, ...]:
    def loss(x: jax.Array, w: jax.Array, h0: jax.Array) -> jax.Array:
        y, _ = short_conv(x, w, activation="silu")
        h, _ = linear_scan(jax.nn.sigmoid(x), y, h0=h0)
        return (h**2).sum()

    return jax.grad(loss, (0, 1, 2))(x, w, h0)


def check_gradients(got: tuple[jax.Array, ...]) -> None:
    for one, other in zip(got, both_ops(X, W, H0), strict=True):
        np.testing.assert_allclose(jax.device_get(one), other, rtol=1e-5, atol=1e-5)


@eight_devices
def test_parameters_sharded_over_the_batch_axis_follow_the_activations():
    mesh = mesh_of(AxisType.Explicit)
    specs = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()
    x, w, h0 = (jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((X, W, H0), specs, strict=True))
    with jax.set_mesh(mesh):
        check_gradients(jax.jit(both_ops)(x, w, h0))


@eight_devices
def test_the_mesh_of_the_operands_is_enough():
    x = jax.device_put(X, NamedSharding(mesh_of(AxisType.Explicit), PartitionSpec("data", None, "tensor")))
    h, h_last = jax.jit(linear_scan)(x, x)
    assert jax.typeof(h_last).sharding.spec == PartitionSpec("data", "tensor")
    np.testing.assert_allclose(jax.device_get(h), linear_scan(X, X)[0], rtol=1e-6)


@eight_devices
def test_replicated_activations_with_sharded_parameters():
    mesh = mesh_of(AxisType.Explicit)
    x, h0 = (jax.device_put(v, NamedSharding(mesh, PartitionSpec())) for v in (X, H0))
    w = jax.device_put(W, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    with jax.set_mesh(mesh):
        check_gradients(jax.jit(both_ops)(x, w, h0))


@eight_devices
def test_automatic_axes_are_left_to_the_compiler():
    mesh = mesh_of(AxisType.Auto)
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
    with jax.set_mesh(mesh):
        check_gradients(jax.jit(both_ops)(x, W, H0))


@eight_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inside_shard_map_the_ops_run_on_the_shard(kind):
    mesh = mesh_of(kind)
    specs = PartitionSpec("data", None, "tensor"), PartitionSpec(None, "tensor"), PartitionSpec("data", "tensor")
    with jax.set_mesh(mesh):
        operands = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((X, W, H0), specs, strict=True)]
        mapped = jax.shard_map(both_ops, in_specs=specs, out_specs=specs)
        check_gradients(jax.jit(mapped)(*operands))


@eight_devices
def test_inside_a_shard_map_over_one_axis_the_other_is_still_sharded():
    mesh = mesh_of(AxisType.Explicit)
    specs = PartitionSpec("data", None, "tensor"), PartitionSpec(None, "tensor"), PartitionSpec("data", "tensor")
    manual = PartitionSpec("data"), PartitionSpec(), PartitionSpec("data")
    with jax.set_mesh(mesh):
        operands = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((X, W, H0), specs, strict=True)]
        mapped = jax.shard_map(both_ops, in_specs=manual, out_specs=manual, axis_names={"data"})
        check_gradients(jax.jit(mapped)(*operands))
