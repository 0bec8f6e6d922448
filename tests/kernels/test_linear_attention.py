"""Gated linear attention and the gated delta rule, in plain JAX, against a token loop in float64.

Letters: b batch, t time, h query-key heads, Hv value heads, k key dim, v value dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybridlm_kernels import check_values, gated_delta_rule, gated_linear_attention
from hybridlm_kernels.bench import oracles
from hybridlm_kernels.bench.peers import solve_triangular_delta_rule
from hybridlm_kernels.linear_attention import chunked
from hybridlm_kernels.linear_attention.inverse import inverse

# Most of the time goes into compiling what its tests share.
pytestmark = pytest.mark.xdist_group("linear_attention")

B, T, H, HV, K, V = 2, 77, 2, 4, 16, 24
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 1e-4, 1e-2  # relative L2, against float64
NAMES = ("q", "k", "v", "beta", "log_decay", "s0")

IDS = np.ones((B, T), np.int32)
IDS[0, 20:], IDS[0, 64:70], IDS[0, 70:] = 2, np.arange(3, 9), 9  # a border inside a chunk, one-token documents
IDS[1, :3], IDS[1, 15:18], IDS[1, 18:50], IDS[1, 66:] = 0, 0, 2, 0  # padding all around

KEYS = ("random", "identical", "correlated", "period 8")
SETTINGS = {  # keys, beta, decay of the adversarial inputs
    "random": ("random", None, "mild"),
    "identical, beta 2, no decay": ("identical", 2.0, "none"),
    "identical, beta 1": ("identical", 1.0, "mild"),
    "correlated": ("correlated", None, "mild"),
    "correlated, beta 2, no decay": ("correlated", 2.0, "none"),
    "period 8, beta 2, no decay": ("period 8", 2.0, "none"),
    "decay -150": ("random", None, "all"),
    "decay 0 and -150 mixed": ("correlated", 1.0, "mixed"),
    "decay -20": ("random", 2.0, "strong"),
}


def inputs(rng, setting="random", *, per_channel=False, t=T):
    """Float32 operands in the order of NAMES."""
    kind, beta, decay = SETTINGS[setting]
    k = rng.normal(size=(B, t, H, K))
    match kind:
        case "identical":
            k = np.broadcast_to(k[:, :1], k.shape)
        case "correlated":
            k = 0.9**0.5 * rng.normal(size=(B, 1, H, K)) + 0.1**0.5 * k
        case "period 8":
            k = np.tile(k[:, :8], (1, t // 8 + 1, 1, 1))[:, :t]
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    q, v, s0 = (rng.normal(size=shape) for shape in ((B, t, H, K), (B, t, HV, V), (B, HV, K, V)))
    betas = rng.uniform(0, 2, (B, t, HV)) if beta is None else np.full((B, t, HV), beta)
    g = -rng.uniform(0, 0.3, (B, t, HV, K) if per_channel else (B, t, HV))
    match decay:
        case "none":
            g = 0 * g
        case "all":
            g = np.full_like(g, -150.0)
        case "mixed":
            g = np.where(rng.random(g.shape) < 0.3, -150.0, 0.0)
        case "strong":
            g = 70 * g
    return [x.astype(np.float32) for x in (q, k, v, betas, g, s0)]


def call(delta, q, k, v, beta, log_decay, s0, **options):
    """The operation; without `delta` beta counts for nothing."""
    if delta:
        return gated_delta_rule(q, k, v, beta, log_decay, s0=s0, **options)
    return gated_linear_attention(q, k, v, log_decay, s0=s0, **options)


def oracle(delta, ids, q, k, v, beta, g, s0):
    """o and the last state, token by token in float64."""
    q, k, v, beta, g, state = (np.asarray(x, np.float64) for x in (q, k, v, beta, g, s0))
    ids = np.ones(q.shape[:2], int) if ids is None else ids
    q, k = (np.repeat(x, HV // H, axis=2) for x in (q, k))
    o = np.zeros(v.shape)
    for b in range(len(q)):
        last = 0
        s = state[b].copy()
        for t in range(q.shape[1]):
            if ids[b, t]:
                if last not in (0, ids[b, t]):
                    s[:] = 0
                last = ids[b, t]
                s = s * np.exp(g[b, t] if g.ndim == 4 else g[b, t, :, None])[..., None]
                u = v[b, t]
                if delta:
                    u = beta[b, t, :, None] * (u - np.einsum("hkv,hk->hv", s, k[b, t]))
                s = s + k[b, t][:, :, None] * u[:, None]
            o[b, t] = K**-0.5 * np.einsum("hkv,hk->hv", s, q[b, t])
        state[b] = s
    return o, state


@partial(jax.jit, static_argnums=(0, 1, 2))
def values_and_gradients(delta, impl, chunk, ids, weights, operands):
    """((o, the last state), the cotangents of the operands) for the cotangents `weights`."""
    run = partial(call, delta, segment_ids=ids, impl=impl, chunk_size=chunk)
    out, vjp = jax.vjp(run, *operands)
    return out, vjp(weights)


def exact_gradients(delta, ids, weights, operands):
    """By automatic differentiation of the token-by-token form in float64, which `oracle` checks."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in operands]
        (o, s_last), gradients = values_and_gradients(
            delta, "reference", None, ids, tuple(jnp.asarray(w, jnp.float64) for w in weights), wide
        )
        return (np.asarray(o), np.asarray(s_last)), [np.asarray(x) for x in gradients]


def distance(got, want):
    want = np.asarray(want, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30))


def cotangents(rng, t=T):
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((B, t, HV, V), (B, HV, K, V)))


both_ops = pytest.mark.parametrize("delta", [False, True], ids=["attention", "delta"])
both_decays = pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])


@both_ops
@both_decays
@pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "packed"])
def test_reference_is_the_token_loop(delta, per_channel, ids, rng):
    operands = inputs(rng, per_channel=per_channel)
    o, s_last = call(delta, *operands, segment_ids=ids, impl="reference")
    want_o, want_s = oracle(delta, ids, *operands)
    assert distance(o, want_o) < OUTPUT_TOLERANCE
    assert distance(s_last, want_s) < OUTPUT_TOLERANCE


@both_ops
@both_decays
@pytest.mark.parametrize("setting", SETTINGS)
def test_chunked_is_exact_on_adversarial_inputs(delta, per_channel, setting, rng):
    operands, weights = inputs(rng, setting, per_channel=per_channel), cotangents(rng)
    ids = jnp.asarray(IDS)
    (want_o, want_s), want = exact_gradients(delta, ids, weights, operands)
    assert distance(want_o, oracle(delta, IDS, *operands)[0]) < 1e-12
    (o, s_last), gradients = values_and_gradients(delta, "chunked", None, ids, weights, operands)
    assert distance(o, want_o) < OUTPUT_TOLERANCE
    assert distance(s_last, want_s) < OUTPUT_TOLERANCE
    largest = max(np.linalg.norm(x) for x in want)
    for name, got, exact in zip(NAMES, gradients, want, strict=True):
        scale = max(np.linalg.norm(exact), 1e-6 * largest)  # the cotangent of a decay of exp(-150) is 0
        assert np.linalg.norm(np.asarray(got, np.float64) - exact) / scale < GRADIENT_TOLERANCE, name


@both_ops
@both_decays
@pytest.mark.parametrize(("chunk", "t"), [(16, 77), (32, 33), (128, 300), (64, 1), (64, 700)])
def test_any_chunk_and_length(delta, per_channel, chunk, t, rng):
    operands = inputs(rng, per_channel=per_channel, t=t)
    o, s_last = jax.jit(partial(call, delta, impl="chunked", chunk_size=chunk))(*operands)
    want_o, want_s = oracle(delta, None, *operands)
    assert distance(o, want_o) < OUTPUT_TOLERANCE
    assert distance(s_last, want_s) < OUTPUT_TOLERANCE


@both_ops
@both_decays
def test_bfloat16_operands_within_a_hundredth(delta, per_channel, rng):
    operands, weights = inputs(rng, per_channel=per_channel), cotangents(rng)
    operands[3] /= 2
    narrow = [x.astype(jnp.bfloat16) if name in "qkv" else x for name, x in zip(NAMES, operands, strict=True)]
    weights = weights[0].astype(jnp.bfloat16), weights[1]
    (want_o, _), want = exact_gradients(delta, None, weights, narrow)
    (o, _), gradients = values_and_gradients(delta, "chunked", None, None, weights, narrow)
    assert o.dtype == jnp.bfloat16
    assert distance(o.astype(jnp.float32), want_o) < BFLOAT16_TOLERANCE
    for name, got, exact in zip(NAMES, gradients, want, strict=True):
        assert distance(got.astype(jnp.float32), exact) < BFLOAT16_TOLERANCE, name


@both_ops
def test_a_sequence_in_two_parts_equals_the_whole(delta, rng):
    *operands, s0 = inputs(rng)
    whole, last = call(delta, *operands, s0)
    first, state = call(delta, *(x[:, :30] for x in operands), s0)
    second, end = call(delta, *(x[:, 30:] for x in operands), state)
    assert distance(np.concatenate([first, second], axis=1), whole) < OUTPUT_TOLERANCE
    assert distance(end, last) < OUTPUT_TOLERANCE


@both_ops
def test_documents_do_not_leak(delta, rng):
    *operands, _ = inputs(rng)
    s0 = np.zeros((B, HV, K, V), np.float32)
    packed, _ = call(delta, *operands, s0, segment_ids=IDS)
    for row, start, end in ((0, 20, 64), (0, 66, 67), (1, 18, 50)):
        alone, _ = call(delta, *(x[row : row + 1, start:end] for x in operands), s0[:1])
        assert distance(packed[row, start:end], alone[0]) < OUTPUT_TOLERANCE
    other = [np.where((IDS == 2).reshape(B, T, *[1] * (x.ndim - 2)), x, rng.permuted(x)) for x in operands]
    changed, _ = call(delta, *other, s0, segment_ids=IDS)
    np.testing.assert_array_equal(np.asarray(packed)[IDS == 2], np.asarray(changed)[IDS == 2])


@both_ops
def test_padding_gets_no_gradient(delta, rng):
    operands, weights = inputs(rng), cotangents(rng)
    weights = weights[0] * (IDS != 0)[:, :, None, None], weights[1]
    _, gradients = values_and_gradients(delta, "chunked", None, jnp.asarray(IDS), weights, operands)
    for gradient in gradients[:5]:
        np.testing.assert_array_equal(np.asarray(gradient)[IDS == 0], 0)


def test_positions_begin_documents_where_ids_come_back(rng):
    operands = inputs(rng)
    ids, positions = np.ones((B, T), np.int32), np.concatenate([np.arange(1, 41), np.arange(T - 40)])
    got, _ = call(True, *operands, segment_ids=ids, positions=np.broadcast_to(positions, (B, T)))
    renamed = np.where(np.arange(T) < 40, ids, 2)
    np.testing.assert_array_equal(got, call(True, *operands, segment_ids=renamed)[0])


def test_one_document_per_token_is_plain_reading(rng):
    """Nothing is remembered: o_t = scale beta_t (k_t . q_t) v_t."""
    q, k, v, beta, g, s0 = inputs(rng)
    o, _ = gated_delta_rule(q, k, v, beta, g, segment_ids=np.broadcast_to(1 + np.arange(T), (B, T)))
    dots = np.repeat((q * k).sum(-1), HV // H, axis=2)
    assert distance(o, K**-0.5 * (beta * dots)[..., None] * v) < OUTPUT_TOLERANCE


@pytest.mark.parametrize("setting", [name for name, (_, beta, decay) in SETTINGS.items() if decay in ("none", "mild")])
def test_the_inverse_is_about_as_accurate_as_a_triangular_solve(setting, rng):
    """The error next to that of XLA's triangular solve on the same operands."""
    q, k, v, beta, g, _ = inputs(rng, setting)
    operands = (*(np.repeat(x, HV // H, axis=2) for x in (q, k)), v, beta, g)
    wide = [x.astype(np.float64) for x in operands]
    want = oracles.gated_delta_rule(*wide, np.zeros(v.shape))[0]
    ours = distance(gated_delta_rule(*operands, impl="chunked")[0], want)
    theirs = distance(solve_triangular_delta_rule(*operands), want)
    print(f"{setting}: {ours:.1e}, triangular solve {theirs:.1e}")
    assert ours < max(3 * theirs, 1e-6)


def test_inverse_of_the_worst_triangle():
    """All entries 2: identical keys, beta 2, no decay. The inverse's entries are 2 (-1)^(i-j)."""
    c = 64
    sign = (-1.0) ** (np.arange(c)[:, None] - np.arange(c))
    want = np.tril(2 * sign, -1) + np.eye(c)
    np.testing.assert_allclose(inverse(jnp.tril(2 * jnp.ones((c, c)), -1)), want, rtol=1e-6)


def test_training_keeps_operands_and_states_between_groups_of_chunks():
    """Temporaries per token and head at k = v = 128, forward and gradient: 4 kB, of the plain form 17 kB."""
    t, h = 4096, 2
    q = jax.ShapeDtypeStruct((1, t, h, 128), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((1, t, h), jnp.float32)

    def step(q, k, v, beta, g, do):
        o, vjp = jax.vjp(lambda *x: gated_delta_rule(*x, impl="chunked")[0], q, k, v, beta, g)
        return o, vjp(do)

    memory = jax.jit(step).lower(q, q, q, gate, gate, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes / (t * h) < 5_000


@pytest.mark.parametrize("traced", [False, True])
def test_values_out_of_range_are_named_when_asked_for(traced, rng):
    q, k, v, beta, g, _ = inputs(rng)
    delta = jax.jit(gated_delta_rule) if traced else gated_delta_rule
    gated_delta_rule(q, k, v, beta + 2, -g)  # not asked for: nothing is read
    error = jax.errors.JaxRuntimeError if traced else ValueError
    with check_values():
        jax.block_until_ready(delta(q, k, v, beta, g))
        with pytest.raises(error, match=r"log_decay: values from 0.* to 0.* must be at most 0"):
            jax.block_until_ready(delta(q, k, v, beta, -g))
        with pytest.raises(error, match=r"beta: values from 2.* to 3.* must be in \[0, 2\]"):
            jax.block_until_ready(delta(q, k, v, beta + 2, g))


def test_chunks_of_a_group_are_the_same_as_chunks_alone(rng, monkeypatch):
    operands = inputs(rng, t=300)
    want, _ = call(True, *operands, chunk_size=16)
    monkeypatch.setattr(chunked, "GROUP", 3)
    assert distance(call(True, *operands, chunk_size=16)[0], want) < OUTPUT_TOLERANCE
