"""Liger attention against its equations, token by token in float64, and against the attention whose weights it has.

Lan et al., 2025, arXiv:2503.01496.

Letters: b batch, t time, d model width, h query heads, g key-value heads, k head dim.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.mixers import MIXERS
from hybridlm.mixers.base import Context, Segments
from hybridlm.model import build

D = 10
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2, against float64
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
DOCUMENTS = [[3, 20, 17], [1, 39]]  # tokens of the documents of two rows of 40, over chunks of the kernels
PLAIN = config.Liger(num_heads=4, num_kv_heads=2, head_dim=6, window=5)
FULL = config.Liger(
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    window=4,
    window_weight=0.3,
    decay_temperature=4.0,
    rope_fraction=0.5,
    logit_soft_cap=3.0,
    qk_norm=True,
    out_gate=True,
    out_bias=True,
)
RECURRENCES = ("gla", "simple_gla", "gated_deltanet")


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def unit(x: Any) -> Any:
    return x / np.sqrt(np.sum(x * x) + 1e-6)


def normed(x: Any, scale: Any) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + CONTEXT.norm_eps) * (1 + scale)


def rotated(x: Any, t: int, cfg: config.Liger) -> Any:
    """The pairs (x_j, x_{j + m/2}) of the first m channels as complex numbers, times e^(i t theta^(-2j/m))."""
    m = round(cfg.rope_fraction * len(x))
    z = (x[: m // 2] + 1j * x[m // 2 : m]) * np.exp(1j * t * cfg.rope_theta ** (-np.arange(0, m, 2) / m))
    return np.concatenate([z.real, z.imag, x[m:]])


def oracle(cfg: config.Liger, p: Any, x: Any) -> Any:
    """One document [t, d]: each head on its own, each token after the other."""
    q, k, v = (np.einsum("td,dhk->thk", x, p[name]) for name in ("w_q", "w_k", "w_v"))
    if cfg.qk_norm:
        q, k = normed(q, p["q_norm"]["scale"]), normed(k, p["k_norm"]["scale"])
    o = np.zeros(q.shape)
    for h in range(cfg.num_heads):
        g = h // (cfg.num_heads // cfg.num_kv_heads)
        state = np.zeros((q.shape[2], q.shape[2]))
        for t in range(len(x)):
            seen = range(max(0, t - cfg.window + 1), t + 1)
            scores = np.array([rotated(q[t, h], t, cfg) @ rotated(k[i, g], i, cfg) for i in seen]) * q.shape[2] ** -0.5
            if cfg.logit_soft_cap is not None:
                scores = cfg.logit_soft_cap * np.tanh(scores / cfg.logit_soft_cap)
            near = softmax(scores) @ v[list(seen), g]
            query, key = softmax(q[t, h]), softmax(k[t, g])
            match cfg.recurrence:
                case "gla":
                    state = sigmoid(k[t, g])[:, None] ** (1 / cfg.decay_temperature) * state + np.outer(key, v[t, g])
                case "simple_gla":
                    state = sigmoid(k[t, g].mean()) ** (1 / cfg.decay_temperature) * state + np.outer(key, v[t, g])
                case "gated_deltanet":
                    query, key, pooled = unit(query), unit(key), k[t, g].mean()
                    state = sigmoid(pooled) ** (1 / cfg.decay_temperature) * state
                    state = state + sigmoid(pooled) * np.outer(key, v[t, g] - state.T @ key)
            o[t, h] = cfg.window_weight * near + (1 - cfg.window_weight) * (state.T @ query)
    if cfg.out_gate:
        o = o * sigmoid(np.einsum("td,dhk->thk", x, p["w_g"]))
    y = np.einsum("thk,hkd->td", o, p["w_o"])
    return y + p["b_o"] if cfg.out_bias else y


def packed(function: Callable[[Any], Any], x: Any) -> Any:
    """`function` of each document on its own."""
    rows = []
    for row, lengths in zip(x, DOCUMENTS, strict=True):
        rows.append(np.concatenate([function(part) for part in np.split(row, np.cumsum(lengths)[:-1])]))
    return np.stack(rows)


def segments() -> Segments:
    ids = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in DOCUMENTS])
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in DOCUMENTS])
    return Segments(jnp.asarray(ids, jnp.int32), jnp.asarray(positions, jnp.int32))


@functools.cache
def made(cfg: config.Mixer) -> tuple[Any, Callable[..., Any]]:
    """Parameters, none of them where a mistake would not show, and the mixer as a function of them."""
    module = MIXERS.module_of(cfg)
    graphdef, state = nnx.split(jax.eval_shape(lambda: module(cfg, CONTEXT, nnx.Rngs(params=jax.random.key(0)))))
    draw = np.random.default_rng(3).standard_normal
    params = jax.tree.map(lambda x: np.float32(0.5) * draw(x.shape, np.float32), nnx.to_pure_dict(state))
    return params, jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, segments(), None, {})[0])


def distance(got: Any, want: Any) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("cfg", [PLAIN, FULL], ids=["plain", "full"])
def test_forward_equals_the_oracle(cfg: config.Liger, recurrence: Any, rng: np.random.Generator) -> None:
    cfg = replace(cfg, recurrence=recurrence)
    params, apply = made(cfg)
    x = rng.standard_normal((2, 40, D)).astype(np.float32)
    wide = jax.tree.map(np.float64, params)
    assert distance(apply(params, x), packed(lambda part: oracle(cfg, wide, part), np.float64(x))) < FORWARD_TOLERANCE


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_gradient_equals_differences_of_the_oracle(recurrence: Any, rng: np.random.Generator) -> None:
    """Along random directions of each parameter and of the input, central differences of 1e-5 in float64."""
    cfg = replace(FULL, recurrence=recurrence)
    params, apply = made(cfg)
    x, cotangent = rng.standard_normal((2, 2, 40, D)).astype(np.float32)
    grads = jax.jit(jax.grad(lambda both: jnp.sum(apply(*both) * cotangent)))((params, x))
    leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, (params, x)))

    def objective(leaves: Any) -> float:
        params, x = jax.tree.unflatten(tree, leaves)
        return float(np.sum(packed(lambda part: oracle(cfg, params, part), x) * cotangent))

    got, want = [], []
    for i, grad in enumerate(jax.tree.leaves(grads)):
        # Half the gradient, half noise: a direction in which the derivative is not near 0.
        noise = rng.standard_normal(grad.shape)
        step = np.asarray(grad, np.float64) / np.linalg.norm(grad) + noise / np.linalg.norm(noise)
        up, down = ([*leaves[:i], leaves[i] + sign * 1e-5 * step, *leaves[i + 1 :]] for sign in (1, -1))
        got.append(np.sum(grad * step))
        want.append((objective(up) - objective(down)) / 2e-5)
    np.testing.assert_allclose(got, want, rtol=GRADIENT_TOLERANCE)


def test_with_the_whole_weight_on_the_window_it_is_the_attention(rng: np.random.Generator) -> None:
    """And its parameters are the attention's, by name and shape."""
    same = {
        name: value for name, value in vars(FULL).items() if name in vars(config.Attention(num_heads=1, num_kv_heads=1))
    }
    attention_params, attention = made(config.Attention(**same))
    params, apply = made(replace(FULL, window_weight=1.0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, attention_params)
    x = rng.standard_normal((2, 40, D)).astype(np.float32)
    assert distance(apply(params, x), np.asarray(attention(params, x), np.float64)) < FORWARD_TOLERANCE


def test_heads_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ConfigError, match="num_heads=3: must divide by num_kv_heads=2"):
        config.Liger(num_heads=3, num_kv_heads=2)
    with pytest.raises(ConfigError, match="pattern.0.mixer.num_heads=3: model.width=16 must divide by it"):
        block = config.Block(mixer=config.Liger(num_heads=3, num_kv_heads=1), ffn=None)
        config.Model(vocab_size=8, width=16, num_layers=1, pattern=(block,))


def test_state_does_not_grow_with_the_length() -> None:
    block = config.Block(mixer=replace(PLAIN, window=4), ffn=None)
    model = config.Model(vocab_size=8, width=8, num_layers=1, pattern=(block,))
    init, bind = build(model, config.Kernels())
    shapes = [
        jax.tree.map(np.shape, jax.eval_shape(lambda n=n: bind(init(jax.random.key(0))).init_state(2, n)))
        for n in (16, 1024)
    ]
    assert shapes[0] == shapes[1]
