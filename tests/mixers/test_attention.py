"""Attention against a float64 oracle: the block with every option, the blocked and the TPU path, the ring cache.

Letters: b batch, t time, d model width, h query heads, g key-value heads, k head dim.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.mixers.attend import attended_tokens, blocked_attention, splash_attention
from hybridlm.mixers.attention import Attention
from hybridlm.mixers.base import Context, Segments

FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2, against float64


def visible_keys(ids: np.ndarray, window: int | None) -> np.ndarray:
    """[b t s]: key s is of the document of query t, not after it, and within the window. By definition, slowly."""
    b, t = ids.shape
    visible = np.zeros((b, t, t), bool)
    for row in range(b):
        for query in range(t):
            for key in range(query, max(-1, -1 if window is None else query - window), -1):
                if ids[row, key] == 0 or ids[row, key] != ids[row, query]:
                    break
                visible[row, query, key] = True
    return visible


def attention_oracle(q: Any, k: Any, v: Any, visible: np.ndarray, soft_cap: float | None, xp: Any) -> Any:
    """Outputs [b t h k] in float64, zero where nothing is visible. One batch row and one head at a time."""
    h, g = q.shape[2], k.shape[2]
    rows = []
    for row in range(q.shape[0]):
        heads = []
        for head in range(h):
            of = head * g // h  # consecutive query heads share a key-value head
            scores = q[row, :, head] @ k[row, :, of].T / np.sqrt(q.shape[3])
            scores = scores if soft_cap is None else soft_cap * xp.tanh(scores / soft_cap)
            weights = xp.where(visible[row], xp.exp(scores - xp.max(scores)), 0.0)
            heads.append(weights @ v[row, :, of] / xp.maximum(weights.sum(1, keepdims=True), 1e-300))
        rows.append(xp.stack(heads, axis=1))
    return xp.stack(rows)


def block_oracle(p: Any, cfg: config.Attention, x: np.ndarray, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The whole block, token by token where positions matter; x and p float64."""

    def normed(z: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return z / np.sqrt(np.mean(z**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale)

    def rotated(z: np.ndarray) -> np.ndarray:
        out, half = z.copy(), int(z.shape[-1] * cfg.rope_fraction) // 2
        for row, t, head, j in np.ndindex(*z.shape[:3], half):
            pair = complex(z[row, t, head, j], z[row, t, head, j + half])
            turned = pair * np.exp(1j * positions[row, t] * frequency(cfg, cfg.rope_theta ** (-j / half)))
            out[row, t, head, j], out[row, t, head, j + half] = turned.real, turned.imag
        return out

    q, k, v = (np.einsum("btd,dhk->bthk", x, p[f"w_{name}"]) + p.get(f"b_{name}", 0.0) for name in "qkv")
    if cfg.qk_norm:
        q, k = normed(q, p["q_norm"]["scale"]), normed(k, p["k_norm"]["scale"])
    o = attention_oracle(rotated(q), rotated(k), v, visible_keys(ids, cfg.window), cfg.logit_soft_cap, np)
    if cfg.out_gate:
        o = o / (1 + np.exp(-np.einsum("btd,dhk->bthk", x, p["w_g"])))
    return np.einsum("bthk,hkd->btd", o, p["w_o"]) + p.get("b_o", 0.0)


def frequency(cfg: config.Attention, plain: float) -> float:
    """Radians per token; Llama 3.1 stretches those of long wavelengths."""
    scaling = cfg.rope_scaling
    if scaling is None:
        return plain
    wavelength = 2 * np.pi / plain
    if wavelength < scaling.original_length / scaling.high_frequency:
        return plain
    if wavelength > scaling.original_length / scaling.low_frequency:
        return plain / scaling.factor
    smooth = scaling.original_length / wavelength - scaling.low_frequency
    smooth /= scaling.high_frequency - scaling.low_frequency
    return (1 - smooth) * plain / scaling.factor + smooth * plain


@pytest.mark.parametrize(
    "cfg",
    [
        config.Attention(num_heads=4, num_kv_heads=4),
        config.Attention(num_heads=6, num_kv_heads=2, head_dim=8, rope_fraction=0.5),
        config.Attention(num_heads=3, num_kv_heads=1, head_dim=10, window=6, logit_soft_cap=2.0, rope_fraction=0.4),
        config.Attention(num_heads=2, num_kv_heads=1, window=1, rope_fraction=0.0),
        config.Attention(num_heads=2, num_kv_heads=2, window=40, qk_norm=True, out_bias=True, rope_theta=100.0),
        config.Attention(num_heads=4, num_kv_heads=2, head_dim=6, rope_fraction=0.34, qk_norm=True, out_gate=True),
        # Wavelengths of 6 to 114 tokens: one of the four stays, one is in between, two are stretched.
        config.Attention(
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            qkv_bias=True,
            rope_theta=50.0,
            rope_scaling=config.Llama3Rope(original_length=32),
        ),
    ],
    ids=["mha", "gqa", "mqa-window-cap", "window-of-one", "norm-bias", "gate", "biases-stretched"],
)
def test_block_equals_the_oracle(cfg: config.Attention, rng: np.random.Generator) -> None:
    t, d = 23, 20
    context = Context(width=d, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
    graphdef, state = nnx.split(jax.eval_shape(lambda: Attention(cfg, context, nnx.Rngs(params=jax.random.key(0)))))
    params = jax.tree.map(lambda a: 0.4 * rng.standard_normal(a.shape).astype(np.float32), nnx.to_pure_dict(state))
    x = rng.standard_normal((2, t, d)).astype(np.float32)
    ids = np.array([[1] * 9 + [2] * 14, [0] * 2 + [5] * 1 + [6] * 16 + [0] * 4], np.int32)
    positions = np.array([[*range(9), *range(14)], [0, 1, 0, *range(16), *range(4)]], np.int32)

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        return nnx.merge(graphdef, params)(x, Segments(jnp.asarray(ids), jnp.asarray(positions)), None, {})[0]

    wide, wide_x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    real = (ids != 0)[:, :, None]
    want = block_oracle(wide, cfg, wide_x, ids, positions)
    assert distance(run(params, x) * real, want * real) < FORWARD_TOLERANCE


@pytest.mark.parametrize(
    ("t", "window", "soft_cap"),
    [(257, None, None), (600, 100, None), (600, 300, 5.0), (512, 257, None), (700, 2000, None), (513, 2, None)],
)
def test_blocks_of_queries_equal_the_oracle(
    t: int, window: int | None, soft_cap: float | None, rng: np.random.Generator
) -> None:
    q, k, v, cotangent = operands(rng, 1, t, 2, 1, 6)
    segments = packed(t)
    check(partial(blocked_attention, window=window, soft_cap=soft_cap), q, k, v, cotangent, segments, window, soft_cap)


@pytest.mark.parametrize(("t", "window", "soft_cap"), [(256, None, None), (200, 70, 5.0)])
def test_splash_equals_the_oracle(t: int, window: int | None, soft_cap: float | None, rng: np.random.Generator) -> None:
    """The TPU kernel, interpreted."""
    q, k, v, cotangent = operands(rng, 1, t, 2, 1, 16)
    segments = packed(t)
    run = partial(splash_attention, window=window, soft_cap=soft_cap, interpret=True)
    check(run, q, k, v, cotangent, segments, window, soft_cap)


def test_memory_of_windowed_attention_grows_linearly() -> None:
    """A buffer of all pairs would make it grow 16-fold from 2,048 to 8,192 tokens."""

    def temporary_bytes(t: int) -> int:
        shape = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, t), jnp.int32)

        def objective(q: Any, k: Any, v: Any, ids: Any, positions: Any) -> Any:
            return jnp.sum(blocked_attention(q, k, v, Segments(ids, positions), window=256, soft_cap=None))

        lowered = jax.jit(jax.grad(objective, argnums=(0, 1, 2))).lower(shape, shape, shape, ids, ids)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(8192)
    assert long < 4.5 * short
    assert long < 8192 * 8192  # bytes: less than even one byte a pair


def test_cache_is_a_ring_of_the_window(rng: np.random.Generator) -> None:
    window, t, d = 5, 23, 8
    cfg = config.Attention(num_heads=2, num_kv_heads=1, window=window)
    context = Context(width=d, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
    model = Attention(cfg, context, nnx.Rngs(params=jax.random.key(0)))
    graphdef, params = nnx.split(model)
    x = rng.standard_normal((1, t, d)).astype(np.float32)
    state = model.init_state(1, 1000)
    assert state["k"].shape == (1, window, 1, 4)

    @jax.jit
    def step(params: Any, x: Any, position: Any, state: Any) -> Any:
        segments = Segments(jnp.ones((1, 1), jnp.int32), position[None, None])
        return nnx.merge(graphdef, params)(x, segments, state, {})[:2]

    outputs = []
    for i in range(t):
        y, state = step(params, x[:, i : i + 1], np.int32(i), state)
        outputs.append(y)
    assert sorted(np.asarray(state["order"][0])) == list(range(t - window, t))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(params))
    ids, positions = np.ones((1, t), np.int32), np.arange(t)[None]
    want = block_oracle(wide, cfg, x.astype(np.float64), ids, positions)
    assert distance(np.concatenate(outputs, axis=1), want) < FORWARD_TOLERANCE


@pytest.mark.parametrize(("t", "window"), [(1, None), (37, None), (37, 1), (37, 8), (37, 37), (37, 100)])
def test_attended_tokens_are_the_visible_pairs(t: int, window: int | None) -> None:
    visible = visible_keys(np.ones((1, t), np.int32), window)
    assert attended_tokens(t, window) == pytest.approx(visible.sum() / t)


def test_flops_grow_with_the_pairs() -> None:
    cfg = config.Attention(num_heads=4, num_kv_heads=2, head_dim=8, window=16)
    context = Context(width=32, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
    pairs = visible_keys(np.ones((1, 50), np.int32), 16).sum() / 50
    products = 2 * 2 * 4 * 8 * pairs  # q k^T and weights times v, a multiply-add being two
    projections = 2 * 32 * 8 * (4 + 2 + 2 + 4)
    assert Attention.flops(cfg, context, 50) == pytest.approx(projections + products, abs=1)


def operands(rng: np.random.Generator, b: int, t: int, h: int, g: int, k: int) -> list[np.ndarray]:
    """q, k, v and a cotangent of the output."""
    return [rng.standard_normal((b, t, heads, k)).astype(np.float32) for heads in (h, g, g, h)]


def packed(t: int) -> Segments:
    """Padding, a document, one of a single token, a long one, padding."""
    lengths = [3, t // 3, 1, t - t // 3 - 24, 20]
    ids = np.concatenate([np.full(n, i) for i, n in zip([0, 1, 2, 3, 0], lengths, strict=True)])
    positions = np.concatenate([np.arange(n) for n in lengths])
    return Segments(jnp.asarray(ids[None], jnp.int32), jnp.asarray(positions[None], jnp.int32))


def check(run: Any, q: Any, k: Any, v: Any, cotangent: Any, segments: Segments, window: Any, soft_cap: Any) -> None:
    """Outputs and gradients of `run` at the real tokens are the oracle's."""
    visible = visible_keys(np.asarray(segments.ids), window)
    real = np.asarray(segments.ids != 0)[:, :, None, None]

    def objective(q: Any, k: Any, v: Any) -> Any:
        o = run(q, k, v, segments) * real
        return jnp.sum(o * cotangent), o

    def oracle_objective(q: Any, k: Any, v: Any) -> Any:
        o = attention_oracle(q, k, v, visible, soft_cap, jnp)
        return jnp.sum(o * cotangent), o

    grads, o = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (q, k, v)]
        want_grads, want = jax.jit(jax.grad(oracle_objective, argnums=(0, 1, 2), has_aux=True))(*wide)
    assert want.dtype == np.float64
    assert distance(o, want) < FORWARD_TOLERANCE
    for got, wanted in zip(grads, want_grads, strict=True):
        assert distance(got, wanted) < GRADIENT_TOLERANCE


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
