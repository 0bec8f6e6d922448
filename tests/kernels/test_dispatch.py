"""Choice of implementation, errors, and operands that are sharded in every way JAX knows."""

import logging

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hybridlm_kernels import (
    OPS,
    UnsupportedKernel,
    dispatch,
    explain,
    gated_delta_rule,
    gated_linear_attention,
    grouped_matmul,
    linear_scan,
    memory_lookup,
    memory_scores,
    rg_lru,
    short_conv,
)
from hybridlm_kernels.dispatch import PLATFORMS
from hybridlm_kernels.target import Target, target
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 8)), jnp.float32)
W = X[0, :3]
H0 = X[:, 0]
IDS = jnp.ones((4, 9), jnp.int32)
READ = jnp.array([[8, 0, 3], [2, 9, 2]])
Q = X[:, :, None] / jnp.linalg.norm(X, axis=2)[:, :, None, None]  # one head, unit norm
DECAY = -jax.nn.sigmoid(X[:, :, :1])

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
@pytest.mark.parametrize("impl", PLATFORMS)
def test_a_kernel_of_another_device_says_so(op, impl):
    with pytest.raises(UnsupportedKernel, match=f"impl='{impl}': {op} runs on .PU, and this is CPU; use auto"):
        calls(impl)[op]()


def calls(impl):
    return {
        "linear_scan": lambda: linear_scan(X, X, impl=impl),
        "rg_lru": lambda: rg_lru(X, X, X, W[0], impl=impl),
        "short_conv": lambda: short_conv(X, W, impl=impl),
        "gated_linear_attention": lambda: gated_linear_attention(Q, Q, Q, DECAY, impl=impl),
        "gated_delta_rule": lambda: gated_delta_rule(Q, Q, Q, -DECAY, DECAY, impl=impl),
        "grouped_matmul": lambda: grouped_matmul(X[0], X[:, :8], jnp.array([4, 0, 5, 0]), impl=impl),
        "memory_lookup": lambda: memory_lookup(X[0], READ, X[1, :2, :3], impl=impl),
        "memory_scores": lambda: memory_scores(X[0], READ, X[1, :2], impl=impl),
    }


TWO, THREE = (jnp.concatenate([Q] * n, axis=2) for n in (2, 3))
TPU = Target("tpu", "TPU v5 lite")


def shapes(*shape, dtype=jnp.bfloat16, num=2):
    return [jax.ShapeDtypeStruct(shape, dtype)] * num


def abstract_operands(op, dtype):
    """Those of a call that the kernels serve, floating dtype aside."""
    wide = jnp.promote_types(dtype, jnp.float32)
    heads = [jax.ShapeDtypeStruct((2, 1024, 4, 128), dtype)] * 3
    gate = jax.ShapeDtypeStruct((2, 1024, 4), wide)
    rows_of_tiles = [jax.ShapeDtypeStruct((1024, 4, 128), dtype), jax.ShapeDtypeStruct((64, 8), jnp.int32)]
    return {
        "linear_scan": shapes(2, 1024, 256, dtype=dtype),
        "rg_lru": shapes(2, 1024, 256, dtype=dtype, num=3),
        "short_conv": [*shapes(2, 1024, 256, dtype=dtype, num=1), jax.ShapeDtypeStruct((4, 256), wide)],
        "gated_linear_attention": [*heads, gate],
        "gated_delta_rule": [*heads, gate, gate],
        "grouped_matmul": [
            *shapes(1024, 256, dtype=dtype, num=1),
            *shapes(4, 256, 128, dtype=dtype, num=1),
            *shapes(4, dtype=jnp.int32, num=1),
        ],
        "memory_lookup": [*rows_of_tiles, *shapes(64, 8, dtype=dtype, num=1)],
        "memory_scores": [*rows_of_tiles, *shapes(64, 512, dtype=dtype, num=1)],
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_a_device_gets_its_own_kernel_where_that_serves(op):
    operands = abstract_operands(op, jnp.bfloat16)
    on_tpu = explain(op, *operands, target=TPU)
    assert (on_tpu.impl, on_tpu.reasons) == ("pallas_tpu", ("kernel for TPU v5 lite",))
    assert explain(op, *operands, target=Target("cpu", "CPU")).impl == "chunked"


@pytest.mark.parametrize("op", OPS)
def test_what_a_kernel_cannot_do_takes_the_chunked_form(op):
    operands = abstract_operands(op, jnp.float64)
    chosen = explain(op, *operands, target=TPU)
    assert chosen.impl == "chunked" and "float64" in str(chosen)
    with pytest.raises(UnsupportedKernel, match="float64"):
        explain(op, *operands, impl="pallas_tpu", target=TPU)


@pytest.mark.parametrize(
    ("kind", "capability", "refusal"),
    [
        ("NVIDIA A100-SXM4-80GB", 8.0, "needs a Hopper GPU"),
        ("NVIDIA H100 80GB HBM3", 9.0, None),
        ("NVIDIA H200", 9.0, None),
        ("NVIDIA B200", 10.0, None),
        ("AMD Instinct MI300X", None, "needs a Hopper GPU"),
    ],
)
def test_gpu_kernels_serve_from_hopper_on_and_only_by_name(kind, capability, refusal):
    gpu = target("gpu", kind)
    assert gpu.compute_capability == capability
    chosen = explain("linear_scan", *shapes(2, 1024, 256), target=gpu)
    assert chosen.impl == "chunked" and (refusal or "ask for it by name") in str(chosen)
    if refusal is None:
        assert explain("linear_scan", *shapes(2, 1024, 256), impl="pallas_gpu", target=gpu).impl == "pallas_gpu"


@eight_devices
def test_a_kernel_is_not_left_to_the_compiler_to_divide():
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        chosen = explain("linear_scan", X, X, target=TPU)
        assert chosen.impl == "chunked" and "cannot be divided by the compiler over data, tensor" in str(chosen)
        with pytest.raises(UnsupportedKernel, match="make these axes explicit"):
            explain("linear_scan", X, X, impl="pallas_tpu", target=TPU)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        assert explain("linear_scan", X, X, target=TPU).impl == "pallas_tpu"


@eight_devices
@pytest.mark.parametrize("by_name", [True, False])
def test_what_serves_the_whole_but_not_a_shard_is_not_taken(by_name):
    gpu = AbstractDevice("NVIDIA H200", None, "gpu")
    kinds = (AxisType.Explicit,)
    mesh = AbstractMesh((2,), ("tensor",), axis_types=kinds, abstract_device=gpu)
    x = jax.ShapeDtypeStruct(
        (2, 64, 24), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    )
    tier = dispatch.Tier("linear_scan", "pallas_gpu", by_name=by_name)

    def on_shard(x):
        taken.append(tier.on_shard(x, x).impl)
        return x

    taken = []
    with jax.sharding.use_abstract_mesh(mesh):
        assert explain("linear_scan", x, x, impl="pallas_gpu").impl == "pallas_gpu"  # 48 bytes a row
        mapped = jax.shard_map(on_shard, in_specs=x.sharding.spec, out_specs=x.sharding.spec)
        if by_name:
            with pytest.raises(
                UnsupportedKernel, match="needs rows of a multiple of 16 bytes, not 12 .* on each device"
            ):
                jax.eval_shape(mapped, x)
        else:
            jax.eval_shape(mapped, x)
            assert taken == ["chunked"]


def test_auto_equals_every_implementation_that_runs_here():
    for op in OPS:
        for impl in ("reference", "chunked"):
            np.testing.assert_allclose(calls("auto")[op]()[0], calls(impl)[op]()[0], rtol=1e-5, atol=1e-6)


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
        (lambda: gated_delta_rule(X, X, X, DECAY), r"q: shape \(4, 9, 8\) must be \[batch, time, heads, key dim\]"),
        (lambda: gated_delta_rule(Q, Q[..., :4], Q, DECAY), r"k: shape \(4, 9, 1, 4\) must be .* = \(4, 9, 1, 8\)"),
        (lambda: gated_delta_rule(TWO, TWO, THREE, DECAY), "v: shape .* must be .*a multiple of q's 2 heads"),
        (lambda: gated_delta_rule(Q, Q, Q, X), r"beta: shape \(4, 9, 8\) must be .* = \(4, 9, 1\)"),
        (lambda: gated_delta_rule(Q, Q, Q, DECAY, X), r"log_decay: shape \(4, 9, 8\) must be .* without the key dim 8"),
        (lambda: gated_delta_rule(Q, Q, Q, DECAY, s0=Q), "s0: shape .* must be .* = \\(4, 1, 8, 8\\)"),
        (
            lambda: gated_linear_attention(Q, Q, Q, DECAY, chunk_size=48),
            "chunk_size=48: must be one of 16, 32, 64, 128",
        ),
        (lambda: gated_linear_attention(Q, Q, Q, DECAY, precision="best"), "precision='best': must be one of default,"),
    ],
)
def test_a_wrong_call_gets_one_clear_line(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production: the ops' own checks speak
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


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
