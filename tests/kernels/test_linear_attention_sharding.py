"""Heads, batch and time cut over devices equal one device, gradients too, and nothing with time in it is gathered.

Letters: b batch, t time, h query-key heads, Hv value heads, k key dim, v value dim.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import UnsupportedKernel, gated_delta_rule, gated_linear_attention
from jax.sharding import AxisType, NamedSharding, PartitionSpec

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
TOLERANCE = 1e-5  # relative L2; another order of float32 sums alone
B, T, H, HV, K, V = 4, 52, 2, 4, 8, 12

IDS = np.zeros((B, T), np.int32)
IDS[0] = 1  # one document on all devices
IDS[1, 3:20], IDS[1, 20:21], IDS[1, 24:47] = 1, 2, 3  # borders inside a stretch and at its edge
IDS[2, 27:33] = 5  # whole devices of padding before and after
# row 3 is padding alone

PARTS = {"q": "b t h", "k": "b t h", "v": "b t h", "beta": "b t h", "log_decay": "b t h", "s0": "b h"}


def operands(per_channel):
    rng = np.random.default_rng(0)
    q, k, v, s0 = (rng.normal(size=shape) for shape in ((B, T, H, K), (B, T, H, K), (B, T, HV, V), (B, HV, K, V)))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(0, 2, (B, T, HV))
    g = -rng.uniform(0, 0.5, (B, T, HV, K) if per_channel else (B, T, HV))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, beta, g, s0)]


def call(delta, ids, q, k, v, beta, g, s0, axis=None):
    options = {"s0": s0, "segment_ids": ids, "chunk_size": 16, "sequence_axis": axis}
    if delta:
        return gated_delta_rule(q, k, v, beta, g, **options)
    return gated_linear_attention(q, k, v, g, **options)


def values_and_gradients(delta, ids, *arrays):
    out, vjp = jax.vjp(partial(call, delta, ids), *arrays)
    mask = (ids != 0)[:, :, None, None]  # outputs at padding mean nothing
    weight = jnp.cos(jnp.arange(T * V, dtype=jnp.float32)).reshape(T, 1, V)
    return out[0] * mask, out[1], vjp((out[0] * 0 + weight * mask, jnp.sin(out[1])))


def placed(mesh, array, letters, axes):
    spec = PartitionSpec(*(axes.get(letter) for letter in letters.split()))
    return jax.device_put(array, NamedSharding(mesh, spec))


def explicit_mesh(**axes):
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes), devices=jax.devices()[:count]
    )


def assert_close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.linalg.norm(one - other) <= TOLERANCE * np.linalg.norm(other) + 1e-6


def assert_cut_equals_whole(delta, per_channel, mesh, axes):
    arrays, ids = operands(per_channel), jnp.asarray(IDS)
    want = jax.jit(partial(values_and_gradients, delta))(ids, *arrays)
    with jax.set_mesh(mesh):
        parts = [placed(mesh, x, letters, axes) for x, letters in zip(arrays, PARTS.values(), strict=True)]
        run = jax.jit(partial(values_and_gradients, delta))
        compiled = run.lower(placed(mesh, ids, "b t", axes), *parts).compile()
        assert_close(compiled(placed(mesh, ids, "b t", axes), *parts), want)
    return compiled.as_text()


slow = pytest.mark.slow
CUTS = [
    pytest.param(delta, per_channel, num, marks=() if (delta, per_channel, num) in first else slow)
    for first in [{(True, False, 4), (False, True, 2)}]
    for delta in (False, True)
    for per_channel in (False, True)
    for num in (1, 2, 4)
]


@pytest.mark.parametrize(("delta", "per_channel", "num"), CUTS)
def test_a_cut_sequence_equals_one_device(delta, per_channel, num):
    text = assert_cut_equals_whole(delta, per_channel, explicit_mesh(context=num), {"t": "context"})
    for line in text.splitlines():
        if "all-gather(" in line or "all-to-all(" in line:
            for shape in re.findall(r"\w+\[([\d,]+)\]", line.split(" all-")[0]):
                assert not {str(T), str(T // num)} & set(shape.split(",")), line


def test_batch_and_heads_need_no_communication():
    text = assert_cut_equals_whole(True, False, explicit_mesh(data=2, tensor=2), {"b": "data", "h": "tensor"})
    for collective in ("all-gather(", "all-to-all(", "collective-permute("):
        assert collective not in text


@slow
def test_batch_time_and_heads_together():
    axes = {"b": "data", "t": "context", "h": "tensor"}
    assert_cut_equals_whole(True, False, explicit_mesh(data=2, context=2, tensor=2), axes)


def test_inside_shard_map_the_axis_is_named():
    arrays = operands(per_channel=False)
    want = call(True, None, *arrays)
    long, whole = PartitionSpec(None, "context"), PartitionSpec()
    mapped = jax.shard_map(
        partial(call, True, None, axis="context"),
        mesh=jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]),
        in_specs=(long,) * 5 + (whole,),
        out_specs=(long, whole),
    )
    assert_close(jax.jit(mapped)(*arrays), want)


def test_the_oracle_is_not_cut():
    mesh = explicit_mesh(context=2)
    q, k, v, beta, *_ = (placed(mesh, x, "b t", {"t": "context"}) for x in operands(per_channel=False))
    with jax.set_mesh(mesh), pytest.raises(UnsupportedKernel, match="impl='reference': gated_delta_rule does not cut"):
        gated_delta_rule(q, k, v, beta, impl="reference")


@slow
def test_key_dim_on_a_mesh_axis_is_gathered_first():
    mesh = explicit_mesh(tensor=2)
    arrays = operands(per_channel=False)
    q = jax.device_put(arrays[0], NamedSharding(mesh, PartitionSpec(None, None, None, "tensor")))
    with jax.set_mesh(mesh):
        got = call(True, None, q, *(placed(mesh, x, "b", {}) for x in arrays[1:]))
    assert_close(got, call(True, None, *arrays))
