"""A sequence cut over 2, 4 and 8 devices equals one device, gradients too, and gathers nothing with time in it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import UnsupportedKernel, linear_scan, rg_lru, short_conv
from jax.sharding import AxisType, NamedSharding, PartitionSpec

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
TOLERANCE = 1e-5  # relative L2; other order of float32 sums alone
B, T, D = 4, 48, 6
cuts = pytest.mark.parametrize("num", [1, 2, 4, 8])

IDS = np.zeros((B, T), np.int32)
IDS[0] = 1  # one document on all devices
IDS[1, 3:20], IDS[1, 20:21], IDS[1, 24:47] = 1, 2, 3  # borders inside a stretch and at its edge
IDS[2, 26:31] = 5  # whole devices of padding before and after
# row 3 is padding alone


def operands(op):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, gate, other, state = normal(B, T, D), normal(B, T, D), normal(B, T, D), normal(B, D)
    match op:
        case "linear_scan":
            return (jax.nn.sigmoid(gate), x, state)
        case "complex linear_scan":
            return (jax.nn.sigmoid(gate) * jnp.exp(1j * other), x + 1j * gate, state + 0.5j)
        case "rg_lru":
            return (x, gate, other, normal(D), state)
        case "short_conv":
            return (x, normal(4, D), normal(D), normal(B, 3, D))


def call(op, ids, with_state, reverse, *arrays, axis=None):
    match op:
        case "linear_scan" | "complex linear_scan":
            a, x, h0 = arrays
            h0 = h0 if with_state else None
            return linear_scan(a, x, h0=h0, segment_ids=ids, reverse=reverse, sequence_axis=axis)
        case "rg_lru":
            *rest, h0 = arrays
            return rg_lru(*rest, h0=h0 if with_state else None, segment_ids=ids, sequence_axis=axis)
        case "short_conv":
            x, w, bias, state = arrays
            state = state if with_state else None
            return short_conv(x, w, bias=bias, state=state, segment_ids=ids, activation="silu", sequence_axis=axis)


def values_and_gradients(op, ids, with_state, reverse, *arrays):
    out, vjp = jax.vjp(partial(call, op, ids, with_state, reverse), *arrays)
    mask = 1.0 if ids is None else (ids != 0)[:, :, None]  # outputs at padding mean nothing
    weight = jnp.cos(jnp.arange(T * D, dtype=jnp.float32)).reshape(T, D)
    cotangents = (out[0] * 0 + weight * mask).astype(out[0].dtype), jnp.sin(out[1].real).astype(out[1].dtype)
    return out[0] * mask, out[1], vjp(cotangents)


def place(mesh, array):
    """Time over `context`, everything else on every device."""
    spec = PartitionSpec(None, "context") if array.ndim > 1 and array.shape[1] == T else PartitionSpec()
    return jax.device_put(array, NamedSharding(mesh, spec))


def assert_close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.linalg.norm(one - other) <= TOLERANCE * np.linalg.norm(other) + 1e-6


@cuts
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "with state"])
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["one document", "packed"])
@pytest.mark.parametrize("op", ["linear_scan", "complex linear_scan", "reverse linear_scan", "rg_lru", "short_conv"])
def test_a_cut_sequence_equals_one_device(op, packed, with_state, num):
    reverse, op = op.startswith("reverse"), op.removeprefix("reverse ")
    arrays, ids = operands(op), jnp.asarray(IDS) if packed else None
    want = jax.jit(partial(values_and_gradients, op, ids, with_state, reverse))(*arrays)
    mesh = jax.make_mesh((num,), ("context",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:num])
    with jax.set_mesh(mesh):
        cut = jax.jit(lambda ids, *arrays: values_and_gradients(op, ids, with_state, reverse, *arrays))
        placed = [None if v is None else place(mesh, v) for v in (ids, *arrays)]
        compiled = cut.lower(*placed).compile()
        assert_close(compiled(*placed), want)
    for line in compiled.as_text().splitlines():
        if "all-gather(" in line or "all-to-all(" in line:
            shape = re.search(r"= \w+\[([\d,]*)\]", line)
            assert shape and str(T) not in shape[1].split(","), line


def test_one_all_gather_passes_the_states_on():
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        a, x = (place(mesh, v) for v in operands("linear_scan")[:2])
        text = jax.jit(linear_scan).lower(a, x).compile().as_text()
    assert len(re.findall(r" all-gather\(", text)) == 1
    assert "collective-permute" not in text and "all-reduce" not in text


def test_a_mesh_of_batch_time_and_channels_equals_one_device():
    arrays, ids = operands("rg_lru"), jnp.asarray(IDS)
    want = values_and_gradients("rg_lru", ids, True, False, *arrays)
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    specs = [("data", "context")] + [("data", "context", "tensor")] * 3 + [("tensor",), ("data", "tensor")]
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec)))
            for v, spec in zip((ids, *arrays), specs, strict=True)
        ]
        got = jax.jit(lambda ids, *v: call("rg_lru", ids, True, False, *v))(*placed)
        gradients = jax.jit(
            jax.grad(lambda v, ids: (call("rg_lru", ids, True, False, *v)[0] ** 2 * (ids != 0)[:, :, None]).sum())
        )(tuple(placed[1:]), placed[0])
    masked = jax.grad(lambda v: (call("rg_lru", ids, True, False, *v)[0] ** 2 * (ids != 0)[:, :, None]).sum())(arrays)
    assert_close(jax.device_get(got[1]), want[1])
    assert_close(jax.device_get(gradients), masked)


@pytest.mark.parametrize("op", ["linear_scan", "rg_lru", "short_conv"])
def test_inside_shard_map_the_axis_is_named(op):
    arrays = operands(op)
    want = call(op, None, True, False, *arrays)
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    long = PartitionSpec(None, "context")
    specs = tuple(long if v.ndim > 1 and v.shape[1] == T else PartitionSpec() for v in arrays)
    mapped = jax.shard_map(
        partial(call, op, None, True, False, axis="context"),
        mesh=mesh,
        in_specs=specs,
        out_specs=(long, PartitionSpec()),
    )
    assert_close(jax.jit(mapped)(*arrays), want)


def test_the_oracle_is_not_cut():
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    x = place(mesh, operands("linear_scan")[1])
    with jax.set_mesh(mesh), pytest.raises(UnsupportedKernel, match="impl='reference': linear_scan does not cut"):
        linear_scan(x, x, impl="reference")


def test_stretches_shorter_than_the_taps_are_refused():
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Explicit,))
    x, w, *_ = operands("short_conv")
    x = jax.device_put(x[:, :16], NamedSharding(mesh, PartitionSpec(None, "context")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="x: 2 tokens per device must be at least taps - 1 = 3"):
        short_conv(x, w)
