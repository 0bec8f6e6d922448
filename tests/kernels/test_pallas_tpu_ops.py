"""The operations through their TPU kernels, interpreted: gradients, states, packing, sharding, cut sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import interpret_pallas, linear_scan, rg_lru, short_conv
from jax.sharding import AxisType, NamedSharding, PartitionSpec

B, T, D = 2, 40, 128
TOLERANCE = 1e-5  # relative L2, against the chunked implementation: float32 sums in another order
OPS = ["linear_scan", "complex linear_scan", "rg_lru", "short_conv"]

IDS = np.ones((B, T), np.int32)
IDS[0, :3], IDS[0, 17:18], IDS[0, 18:31], IDS[0, 36:] = 0, 2, 3, 0


def operands(op):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, gate, other = normal(B, T, D), normal(B, T, D), normal(B, T, D)
    match op:
        case "linear_scan":
            return jax.nn.sigmoid(gate), x, normal(B, D)
        case "complex linear_scan":
            return jax.nn.sigmoid(gate) * jnp.exp(1j * other), x + 1j * gate, normal(B, D) + 0.5j
        case "rg_lru":
            return x, gate, other, normal(D), normal(B, D)
        case _:
            return x, normal(4, D), normal(D), normal(B, 3, D)


def values_and_gradients(op, impl, ids, *arrays):
    def call(*arrays):
        if op.endswith("linear_scan"):
            return linear_scan(*arrays[:2], h0=arrays[2], segment_ids=ids, impl=impl)
        if op == "rg_lru":
            return rg_lru(*arrays[:4], h0=arrays[4], segment_ids=ids, impl=impl)
        x, w, bias, state = arrays
        return short_conv(x, w, bias=bias, state=state, segment_ids=ids, activation="silu", impl=impl)

    (y, last), vjp = jax.vjp(call, *arrays)
    mask = (ids != 0)[:, :, None]
    weight = (jnp.cos(jnp.arange(T * D, dtype=jnp.float32)).reshape(T, D) * mask).astype(y.dtype)
    return y * mask, last, vjp((weight + 0 * y, jnp.sin(last.real).astype(last.dtype)))


def assert_close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.linalg.norm(one - other) <= TOLERANCE * np.linalg.norm(other)


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_equals_the_chunked_form(op):
    arrays, ids = operands(op), jnp.asarray(IDS)
    with interpret_pallas():
        got = values_and_gradients(op, "pallas_tpu", ids, *arrays)
    assert_close(got, values_and_gradients(op, "chunked", ids, *arrays))


@pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
@pytest.mark.parametrize("op", ["linear_scan", "rg_lru", "short_conv"])
def test_under_a_mesh_of_batch_time_and_channels_the_kernel_runs_on_the_shard(op):
    arrays, ids = operands(op), jnp.asarray(IDS)
    want = values_and_gradients(op, "chunked", ids, *arrays)
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Explicit,) * 3)

    def place(array):
        axes = {B: "data", T: "context", D: "tensor"}
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*(axes.get(size) for size in array.shape))))

    with jax.set_mesh(mesh), interpret_pallas():
        run = jax.jit(lambda ids, *arrays: values_and_gradients(op, "pallas_tpu", ids, *arrays))
        got = run(place(ids), *map(place, arrays))
    assert_close(jax.device_get(got), want)
