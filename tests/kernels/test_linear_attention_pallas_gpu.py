"""The GPU kernels of linear attention, run by Pallas' GPU interpreter on CPU, agree with loops over time in float64.

Letters: b batch, t time, h query-key heads, r value heads per query head, k key dim, v value dim. The interpreter
follows copies, barriers and products of blocks; it knows nothing of registers, layouts or what runs asynchronously.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels.bench import oracles, static_gpu
from hybridlm_kernels.linear_attention import pallas_gpu
from hybridlm_kernels.linear_attention.gpu_prepare import gates, prepare

Array = np.ndarray
Run = Callable[..., Any]  # calls a function with its GPU kernels interpreted
RESET = -(2.0**17)
NAMES = ("o", "s_last", "dq", "dk", "dv", "dbeta", "dg", "ds0")
TOLERANCE = 1e-2  # relative L2: the states, scores and u are multiplied as bfloat16


def exact(x: Any) -> Array:
    return np.asarray(x, np.float64)


def error(result: Any, expected: Array) -> float:
    return float(np.linalg.norm(exact(result) - expected) / max(np.linalg.norm(expected), 1e-30))


def errors(
    interpreted: Run,
    rng: np.random.Generator,
    k: Array,
    v_dim: int,
    beta: Array | None,
    g: Array,
    *,
    precision: str = "default",
) -> dict[str, Array]:
    """Relative errors [b, h] of all outputs and gradients for keys [b, h, t, k] and gates [b, h r, t]."""
    b, h, t, k_dim = k.shape
    heads, scale = g.shape[1], 0.3
    group = heads // h
    present = np.any(k != 0, axis=-1, keepdims=True)  # padding has no query and no value either
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in (present * rng.normal(size=k.shape), k))
    shape = (b, heads, t, v_dim)
    v, do = jnp.asarray(present.repeat(group, 1) * rng.normal(size=(2, *shape)), jnp.bfloat16)
    s0, ds_last = jnp.asarray(rng.normal(size=(2, b, heads, k_dim, v_dim)), jnp.float32)
    beta, g = (x if x is None else jnp.asarray(x, jnp.float32) for x in (beta, g))
    options = {"scale": scale, "chunk": 64, "precision": precision}

    def run() -> tuple:
        o, last, states = pallas_gpu.forward(q, k, v, beta, g, s0, save=True, **options)
        assert states is not None
        return o, last, *pallas_gpu.adjoint(q, k, v, beta, g, states, do, ds_last, **options)

    operands = (x if x is None else exact(x) for x in (q, k, v, beta, g, s0, do, ds_last))
    expected = oracles.linear_attention(*operands, scale)
    found = {}
    for name, got, want in zip(NAMES, interpreted(run), expected, strict=True):
        if want is not None:
            got, want = (exact(x).reshape(b, h, -1) for x in (got, want))
            found[name] = np.array([[error(got[i, j], want[i, j]) for j in range(h)] for i in range(b)])
    return found


def unit_keys(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    k = rng.normal(size=shape)
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


def mixed_decays(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Slow, fast and extreme decays and documents' starts, some of them one token long and some on chunks' borders."""
    g = rng.choice([0.0, -1e-4, -0.1, -2.0, -150.0, RESET], p=[0.3, 0.3, 0.3, 0.06, 0.02, 0.02], size=shape)
    g[..., 40:44] = RESET
    g[..., 64:65] = RESET
    return g


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k_dim", "v_dim", "group", "erases", "per_channel"),
    [
        pytest.param(64, 64, 2, True, False, marks=pytest.mark.slow),
        pytest.param(128, 128, 1, True, False, marks=pytest.mark.slow),
        pytest.param(64, 128, 2, False, False, marks=pytest.mark.slow),
        pytest.param(128, 64, 1, False, False, marks=pytest.mark.slow),
        (128, 64, 1, True, True),
        pytest.param(64, 128, 2, False, True, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_agree_with_a_loop(
    k_dim: int, v_dim: int, group: int, erases: bool, per_channel: bool, rng: np.random.Generator, interpreted: Run
) -> None:
    b, h, t = 1, 1, 128
    k = unit_keys(rng, (b, h, t, k_dim))
    g = mixed_decays(rng, (b, h * group, k_dim if per_channel else 1, t)).swapaxes(2, 3)
    beta = rng.uniform(0, 1, (b, h * group, t))
    for x in (k, g, beta[..., None]):
        x[:, :, 110:] = 0  # padding
    g = g if per_channel else g[..., 0]
    found = errors(interpreted, rng, k, v_dim, beta if erases else None, g)
    assert max(map(np.max, found.values())) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
def test_alike_keys_and_extreme_gates_stay_bounded(
    per_channel: bool, rng: np.random.Generator, interpreted: Run
) -> None:
    t, k_dim = 128, 64
    random = unit_keys(rng, (t, k_dim))
    identical = np.tile(
        rng.choice([-1.0, 1.0], k_dim) / 8, (t, 1)
    )  # of unit norm in bfloat16 too, else beta 2 diverges
    correlated = 0.9**0.5 * identical + 0.1**0.5 * random
    periodic = np.tile(random[:8], (t // 8, 1))
    some = rng.uniform(0, 2, t)
    always, twice = np.ones(t), np.full(t, 2.0)
    # Where keys are alike, what is rounded to bfloat16 (states, scores, u) adds up: in every tier at this precision.
    cases = {
        "identical, beta 2": (identical, twice, 0.0, 0.05),
        "identical, beta 1": (identical, always, 0.0, 0.05),
        "correlated": (correlated, some, -1e-3, 0.05),
        "period 8": (periodic, some, 0.0, 0.03),
        "forgotten at once": (random, always, -150.0, TOLERANCE),
        "one-token documents": (random, twice, RESET, TOLERANCE),
    }
    keys, betas, decays, limits = (np.stack([np.asarray(case[i]) for case in cases.values()]) for i in range(4))
    g = np.broadcast_to(decays[None, :, None, None], (1, len(cases), t, k_dim if per_channel else 1))
    found = errors(interpreted, rng, keys[None], 64, betas[None], g if per_channel else g[..., 0])
    for name, values in found.items():
        for case, value, limit in zip(cases, values[0], limits, strict=True):
            assert value < limit, (name, case, values)


@pytest.mark.slow
def test_more_pieces_are_more_precise(rng: np.random.Generator, interpreted: Run) -> None:
    shape = (1, 1, 128)
    found = errors(
        interpreted,
        rng,
        unit_keys(rng, (*shape, 64)),
        64,
        rng.uniform(0, 2, shape),
        mixed_decays(rng, shape),
        precision="high",
    )
    for name in ("s_last", "ds0", "dg", "dbeta"):  # float32, as the others are not
        assert np.max(found[name]) < 1e-4, found


@pytest.mark.slow
def test_scores_and_inverse_are_of_float32_grade(rng: np.random.Generator, interpreted: Run) -> None:
    t, k_dim = 64, 64
    k, g, beta = unit_keys(rng, (1, t, k_dim)), mixed_decays(rng, (1, 1, t)), rng.uniform(0, 2, (1, 1, t))
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in (rng.normal(size=k.shape), k))
    numbers = gates(jnp.asarray(beta, jnp.float32), jnp.asarray(g, jnp.float32))

    def run() -> tuple:
        chunks = prepare(q, k, numbers, scale=0.5, num_pieces=3, erases=True)
        return chunks.scores, chunks.inverse

    scores, inverse = (exact(result).sum(0) for result in interpreted(run))
    between = [[g[0, 0, j + 1 : i + 1].sum() if i >= j else -np.inf for j in range(t)] for i in range(t)]
    gamma, q, k = np.exp(between), exact(q[0]), exact(k[0])
    assert error(scores, 0.5 * q @ k.T * gamma) < 1e-6
    a = np.tril(np.asarray(beta, np.float32)[0, 0, :, None] * (k @ k.T) * gamma, -1)
    assert error(inverse, np.linalg.inv(np.eye(t) + a)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "k_dim", "v_dim", "gate_rank", "compute_capability", "reason"),
    [
        ("bfloat16", 64, 128, 3, 9.0, None),
        ("bfloat16", 64, 128, 3, None, "needs a Hopper GPU"),
        ("bfloat16", 64, 128, 3, 10.0, "needs a Hopper GPU"),
        ("float32", 64, 128, 3, 9.0, "float32 operands"),
        ("bfloat16", 96, 128, 3, 9.0, "key dim 96"),
        ("bfloat16", 64, 256, 3, 9.0, "value dim 256"),
        ("bfloat16", 64, 128, 4, 9.0, None),
    ],
)
def test_what_cannot_be_served_has_a_reason(
    dtype: str, k_dim: int, v_dim: int, gate_rank: int, compute_capability: float | None, reason: str | None
) -> None:
    q, v = (jax.ShapeDtypeStruct((1, 8, 2, dim), jnp.dtype(dtype)) for dim in (k_dim, v_dim))
    gate = jax.ShapeDtypeStruct((1, 8, 2, k_dim)[:gate_rank], jnp.float32)
    refusal = pallas_gpu.supports(q, q, v, gate, compute_capability=compute_capability)
    assert (refusal is None) if reason is None else (refusal is not None and reason in refusal)


@pytest.mark.parametrize(
    ("dim", "chunk", "precision", "reason"),
    [
        (64, None, "highest", None),
        (128, 64, "default", None),
        (128, None, "highest", "precision='highest': needs .* KiB of shared memory"),
        (64, 32, "default", "chunk_size=32: must be 64"),
    ],
)
def test_precision_beyond_shared_memory_and_other_chunks_are_refused(
    dim: int, chunk: int | None, precision: str, reason: str | None
) -> None:
    q, g = jnp.zeros((1, 64, 1, dim), jnp.bfloat16), jnp.zeros((1, 64, 1))
    refusal = pallas_gpu.refuses(q, q, q, g, g, erases=True, chunk=chunk, precision=precision)
    assert refusal == reason if reason is None else re.match(reason, refusal or "")


@pytest.mark.slow
def test_states_are_saved_for_the_adjoint_alone(rng: np.random.Generator, interpreted: Run) -> None:
    q, k, v = jnp.asarray(rng.normal(size=(3, 1, 1, 128, 64)), jnp.bfloat16)
    g, s0 = -jnp.abs(jnp.asarray(rng.normal(size=(1, 1, 128)), jnp.float32)), jnp.ones((1, 1, 64, 64))
    results = [
        interpreted(
            lambda save=save: pallas_gpu.forward(
                q, k, v, None, g, s0, scale=1.0, chunk=64, precision="default", save=save
            )
        )
        for save in (True, False)
    ]
    assert results[0][2] is not None and results[1][2] is None
    for saved, plain in zip(results[0][:2], results[1][:2], strict=True):
        np.testing.assert_array_equal(saved, plain)


# Bytes of a few registers, in and out: no more.
SPILL_BUDGET = {"linear_attention_channels_prepare": 32}


@pytest.mark.gpu_aot
@pytest.mark.parametrize(
    ("k_dim", "v_dim", "erases", "per_channel"),
    [
        (64, 64, True, False),
        (64, 128, False, False),
        (128, 64, True, False),
        (128, 128, True, False),
        (128, 128, True, True),
        (64, 128, False, True),
    ],
)
def test_kernels_compile_for_an_h200_without_spilling(k_dim: int, v_dim: int, erases: bool, per_channel: bool) -> None:
    if reason := static_gpu.missing():
        pytest.skip(reason)
    b, h, heads, t = 2, 8, 16, 2048
    q, v = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((b, h, t, k_dim), (b, heads, t, v_dim)))
    shapes = (b, heads, t), (b, heads, t, k_dim)[: 4 if per_channel else 3], (b, heads, k_dim, v_dim)
    beta, g, s = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def train(q: Any, k: Any, v: Any, beta: Any, g: Any, s: Any) -> Any:
        options = {"scale": 0.1, "chunk": 64, "precision": "default"}
        o, last, states = pallas_gpu.forward(q, k, v, beta, g, s, save=True, **options)
        assert states is not None
        return last, pallas_gpu.adjoint(q, k, v, beta, g, states, o, last, **options)

    kernels = static_gpu.analyze(train, [q, q, v, beta if erases else None, g, s])
    parts = ("channels_prepare", "channels_scores", "channels_keys") if per_channel else ("prepare", "gradients")
    assert {kernel.name for kernel in kernels} == {
        f"linear_attention_{part}" for part in (*parts, "forward", "backward")
    }
    for kernel in kernels:
        assert kernel.spilled_bytes <= SPILL_BUDGET.get(kernel.name, 0), kernel
