"""The TPU kernels of linear attention with one decay per head, interpreted, against a token loop in float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import UnsupportedKernel, gated_delta_rule, gated_linear_attention, interpret_pallas
from hybridlm_kernels.bench import oracles
from hybridlm_kernels.dispatch import Tier
from hybridlm_kernels.linear_attention import _Options, _serving, pallas_tpu, tpu_blocks, tpu_per_head
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Most of the time goes into compiling what its tests share.
pytestmark = pytest.mark.xdist_group("linear_attention_pallas_tpu")

FORWARD_TOLERANCE, GRADIENT_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-4, 1e-2  # relative L2, against float64
RESET = -(2.0**17)
SCALE = 0.3
NAMES = ("o", "last state", "dq", "dk", "dv", "dbeta", "dg", "ds0")


def inputs(rng, shape, keys="random", beta=None, decay="mild"):
    b, h, r, t, key, value = shape
    q, k = rng.normal(size=(2, b, h, t, key))
    match keys:
        case "identical":
            k = np.ones_like(k)
        case "correlated":  # 0.9 between any two
            k = 3 * rng.normal(size=(b, h, 1, key)) + k
        case "periodic":
            k = np.tile(k[:, :, :8], (1, 1, t // 8, 1))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, do = rng.normal(size=(2, b, h * r, t, value))
    s0, ds = rng.normal(size=(2, b, h * r, key, value))
    gates = (b, h * r, t)
    betas = rng.uniform(0, 1, gates) if beta is None else np.full(gates, beta)
    g = -rng.exponential(0.2, gates)
    match decay:
        case "none":
            g = np.zeros(gates)
        case "steep":
            g = np.full(gates, -150.0)
        case "mixed":
            g = np.where(rng.uniform(size=gates) < 0.1, -150.0, g)
        case "documents":  # whose borders are in a chunk and between chunks, some of one token
            g[:, :, [3, 64, 65, 66, 67, 100, 127, 128, 160]] = RESET
        case "one-token documents":
            g[:] = RESET
        case "padding":
            for at in (slice(0, 5), slice(50, 70), slice(120, None)):
                k[:, :, at], betas[:, :, at], g[:, :, at] = 0, 0, 0
            g[:, :, 70] = RESET
    return q, k, v, betas, g, s0, do, ds


def errors(operands, *, erases=True, chunk=64, dtype=jnp.float32, precision="highest", interpret: Any = True):
    """The relative error of every result, by name."""
    q, k, v, beta, g, s0, do, ds = (jnp.asarray(x, jnp.float32) for x in operands)
    q, k, v, do = (x.astype(dtype) for x in (q, k, v, do))
    beta = beta if erases else None
    static = {"scale": SCALE, "chunk": chunk, "precision": precision, "interpret": interpret}
    o, last, states = pallas_tpu.forward(q, k, v, beta, g, s0, save=True, **static)
    assert states is not None
    gradients = pallas_tpu.adjoint(q, k, v, beta, g, states, do, ds, **static)
    assert [x.dtype for x in (o, *gradients[:3])] == [dtype] * 4
    given = (q, k, v, beta, g, s0, do, ds)
    want = oracles.linear_attention(*(x if x is None else np.asarray(x, np.float64) for x in given), SCALE)
    found = zip(NAMES, (o, last, *gradients), want, strict=True)
    return {name: distance(x, y) for name, x, y in found if y is not None}


def distance(got, want):
    assert got.shape == want.shape
    got = np.asarray(jnp.asarray(got, jnp.float32), np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def check(found, forward=FORWARD_TOLERANCE, gradient=GRADIENT_TOLERANCE):
    bad = {name: x for name, x in found.items() if not x < (forward if name in NAMES[:2] else gradient)}
    assert not bad


DELTA = (2, 1, 1, 192, 128, 64)  # b, h, r, t, k, v


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"keys": "identical", "beta": 2.0, "decay": "none"},
        {"keys": "identical", "beta": 1.0},
        {"keys": "correlated", "beta": 2.0},
        {"keys": "correlated", "beta": 1.0, "decay": "none"},
        {"keys": "periodic", "beta": 2.0, "decay": "none"},
        {"keys": "periodic", "beta": 1.0, "decay": "documents"},
        {"decay": "steep"},
        {"decay": "mixed"},
        {"decay": "documents", "beta": 2.0},
        {"decay": "padding"},
    ],
    ids=str,
)
def test_delta_rule_equals_the_oracle(rng, case):
    check(errors(inputs(rng, DELTA, **case)))


def test_one_token_documents_see_nothing_but_themselves(rng):
    operands = inputs(rng, DELTA, decay="one-token documents")
    found = errors(operands)
    # Nothing decays by anything: the oracle's dg and ds0 are 0, and so are ours.
    assert found.pop("dg") == found.pop("ds0") == 0
    check(found)


@pytest.mark.parametrize("decay", ["mild", "documents"])
@pytest.mark.parametrize("erases", [True, False], ids=["delta rule", "linear attention"])
def test_two_value_heads_share_a_key_head(rng, erases, decay):
    check(errors(inputs(rng, (1, 1, 2, 256, 64, 128), decay=decay), erases=erases, chunk=128))


@pytest.mark.parametrize("decay", ["none", "steep", "mixed", "documents", "padding"])
def test_linear_attention_equals_the_oracle(rng, decay):
    check(errors(inputs(rng, (1, 2, 1, 192, 64, 64), decay=decay), erases=False))


@pytest.mark.slow
def test_wide_values_and_large_groups_are_cut_to_fit(rng, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "WIDEST", 64)
    monkeypatch.setattr(pallas_tpu, "MOST_PER_GROUP", 2)
    check(errors(inputs(rng, (1, 2, 2, 64, 64, 128), decay="mixed")))  # four of half a value head per query head


@pytest.mark.slow
def test_wide_heads_of_one_chunk_equal_the_oracle(rng):
    check(errors(inputs(rng, (1, 1, 1, 64, 256, 256)), erases=False))


@pytest.mark.parametrize(
    "case, forward, gradient",
    [
        ({}, BFLOAT16_TOLERANCE, BFLOAT16_TOLERANCE),
        ({"decay": "mixed"}, BFLOAT16_TOLERANCE, BFLOAT16_TOLERANCE),
        ({"keys": "correlated", "decay": "documents"}, BFLOAT16_TOLERANCE, 2 * BFLOAT16_TOLERANCE),
        ({"keys": "periodic", "beta": 2.0}, BFLOAT16_TOLERANCE, 2 * BFLOAT16_TOLERANCE),
        # Every token undoes what the last one did, so that results are a small rest of large terms.
        ({"keys": "identical", "beta": 2.0, "decay": "none"}, 0.1, 1.0),
    ],
    ids=str,
)
def test_bfloat16_rounds_no_more_than_its_operands(rng, case, forward, gradient):
    found = errors(inputs(rng, (1, 1, 1, 256, 128, 128), **case), chunk=128, dtype=jnp.bfloat16, precision="default")
    check(found, forward, gradient)


def test_bfloat16_linear_attention_rounds_no_more_than_its_operands(rng):
    operands = inputs(rng, (1, 1, 1, 256, 128, 128), decay="documents")
    found = errors(operands, erases=False, chunk=128, dtype=jnp.bfloat16, precision="default")
    check(found, BFLOAT16_TOLERANCE, BFLOAT16_TOLERANCE)


@pytest.mark.slow
def test_three_products_are_closer_than_one(rng):
    operands = inputs(rng, (1, 1, 1, 64, 64, 64), keys="correlated")
    check(errors(operands, precision="high"), 1e-4, 1e-4)  # with one product each, 3e-3


def test_three_products_stay_precise_behind_forgotten_documents(rng):
    """The sums of decays, of which differences are taken, reach 104 times the number of documents in a chunk."""
    operands = list(inputs(rng, DELTA))
    operands[4] = np.where(rng.uniform(size=operands[4].shape) < 0.3, RESET, operands[4])
    check(errors(operands, precision="high"), 1e-4, 1e-4)


def public(op, impl, ids, *operands, **options):
    """[b, t, ...] operands through the public operation: o, the last state and gradients."""
    q, k, v, beta, g, s0, do, ds = operands
    masked = do * (ids != 0)[:, :, None, None]  # outputs at padding mean nothing

    def call(q, k, v, beta, g, s0):
        shared = {"s0": s0, "segment_ids": ids, "impl": impl, **options}
        if op == "gated_delta_rule":
            return gated_delta_rule(q, k, v, beta, g, **shared)
        return gated_linear_attention(q, k, v, g, **shared)

    (o, last), vjp = jax.vjp(call, q, k, v, beta, g, s0)
    return o * (ids != 0)[:, :, None, None], last, *vjp((masked, ds))


@pytest.fixture
def public_operands(rng):
    """Two sequences whose 75 tokens fill no chunk, packed; two value heads to a key head."""
    *by_time, s0, do, ds = inputs(rng, (2, 1, 2, 75, 64, 64))
    operands = (*(x.swapaxes(1, 2) for x in by_time), s0, do.swapaxes(1, 2), ds)
    ids = np.ones((2, 75), np.int32)
    ids[0, :3], ids[0, 30:31], ids[0, 31:], ids[1, 60:] = 0, 2, 3, 0
    return jnp.asarray(ids), [jnp.asarray(x, jnp.float32) for x in operands]


@pytest.mark.parametrize("decay", ["per head", pytest.param("per channel", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", ["gated_linear_attention", "gated_delta_rule"])
def test_the_public_operation_through_the_kernels_equals_the_reference(op, decay, public_operands):
    ids, operands = public_operands
    if decay == "per channel":
        operands[4] = operands[4][..., None] * jnp.linspace(0.0, 2.0, 64)
    with interpret_pallas():
        got = public(op, "pallas_tpu", ids, *operands, chunk_size=64)
    for x, y in zip(got, public(op, "reference", ids, *operands), strict=True):
        assert distance(x, np.asarray(y, np.float64)) < GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("op", ["gated_linear_attention", "gated_delta_rule"])
def test_a_sequence_cut_over_devices_runs_the_kernels_on_each(op, public_operands, monkeypatch):
    # The interpreter makes constants that vary over no device, which operands that do may not meet. Unchecked, the
    # cotangents of what all devices hold are divided among them or added up: the states' are left out.
    monkeypatch.setattr(jax, "shard_map", partial(jax.shard_map, check_vma=False))
    ids, operands = public_operands
    ids, operands = ids[:, :74], [x[:, :74] if x.shape[1] == 75 else x for x in operands]
    operands[-1] = jnp.zeros_like(operands[-1])
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])

    def place(x):
        spec = PartitionSpec(None, "context") if x.shape[1] == 74 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh), interpret_pallas():
        run = jax.jit(lambda ids, *x: public(op, "pallas_tpu", ids, *x, chunk_size=64))
        got = jax.device_get(run(place(ids), *map(place, operands)))
    for x, y in zip(got[:-1], public(op, "reference", ids, *operands)[:-1], strict=True):
        assert distance(x, np.asarray(y, np.float64)) < GRADIENT_TOLERANCE


def test_a_chunk_that_the_kernels_do_not_have_is_refused_or_left_to_the_chunked_form(public_operands):
    ids, operands = public_operands
    refusal = "impl='pallas_tpu': gated_delta_rule chunk_size=32: must be 64 or 128; use auto"
    with interpret_pallas(), pytest.raises(UnsupportedKernel, match=refusal):
        public("gated_delta_rule", "pallas_tpu", ids, *operands, chunk_size=32)
    q, *_ = operands
    options = _Options(scale=1.0, chunk=32, precision="highest")
    taken = _serving(Tier("gated_delta_rule", "pallas_tpu", by_name=False), options, q, q, q, q[..., 0], erases=True)
    assert taken.impl == "chunked"


def test_chunks_do_not_race(rng):
    """A wrong order of the grid, or a scratch used before it is written, shows here and not in plain interpretation."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=0)
    operands = inputs(rng, (1, 1, 1, 128, 64, 64))
    found = errors(operands, erases=False, dtype=jnp.bfloat16, precision="default", interpret=params)
    check(found, BFLOAT16_TOLERANCE, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize(
    "c, precision, tolerance", [(16, "high", 2e-6), (64, "high", 2e-4), (128, "high", 2e-4), (64, "highest", 2e-6)]
)
def test_inverse_equals_that_in_float64(rng, c, precision, tolerance):
    keys = rng.normal(size=(3, c, 32))
    keys[1] = 1.0
    keys[2] += 3 * rng.normal(size=(1, 32))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    matrices = 2.0 * np.einsum("nik,njk->nij", keys, keys)  # beta 2; what is not below the diagonal is ignored
    matrices = matrices.astype(np.float32)

    def kernel(a, x):
        for i, y in enumerate(tpu_blocks.inverse([a[j] for j in range(3)], precision)):
            x[i] = y

    like = jax.ShapeDtypeStruct(matrices.shape, jnp.float32)
    found = pl.pallas_call(kernel, out_shape=like, interpret=True)(jnp.asarray(matrices))
    want = np.linalg.inv(np.eye(c) + np.tril(matrices.astype(np.float64), -1))
    for x, y in zip(found, want, strict=True):
        assert distance(x, y) < tolerance


@pytest.mark.parametrize(
    "key, value, heads, reason",
    [(96, 128, 4, "key dim 96: must be 64, 128 or 256"), (128, 320, 4, "value dim 320: must be 64, 128 or a multiple")],
)
def test_what_the_kernels_cannot_serve_is_named(key, value, heads, reason):
    q = jax.ShapeDtypeStruct((1, 256, 4, key), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((1, 256, heads, value), jnp.bfloat16)
    g = jax.ShapeDtypeStruct((1, 256, heads), jnp.float32)
    assert reason in (pallas_tpu.supports(q, q, v, g) or "")


def test_float64_is_not_served():
    x = np.zeros((1, 64, 1, 64))
    assert pallas_tpu.supports(x, x, x, x[..., 0]) == "takes bfloat16, float32, not float64"


def test_the_heads_of_a_step_fit_its_memory(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 16, 256, 128), jnp.bfloat16)
    monkeypatch.setattr(tpu_per_head, "target_of", lambda _: type("Target", (), {"kind": "TPU v4"}))
    each = tpu_blocks.VMEM_BUDGET // 5
    assert tpu_per_head.heads_per_step(q, q, each) == 4  # the divisor of 16 below 5
    assert tpu_per_head.heads_per_step(q, q, 1) == 8  # both cores of a chip have some
