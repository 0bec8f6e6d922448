"""Layers of Hugging Face's Qwen3-Next and Kimi Linear, their weights in our mixers: the same outputs.

Letters: b batch, t time, d model width, h query-key heads, r value heads, k key dim, v value dim, w conv width.
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.mixers import MIXERS
from hybridlm.mixers.base import Context, Segments

torch = pytest.importorskip("torch", reason="Hugging Face's layers run on PyTorch")
pytest.importorskip("transformers", minversion="5.0", reason="needs its Qwen3-Next and Kimi Linear")

B, T, D = 2, 75, 24  # more than one of their chunks of 64
TOLERANCE = 1e-5  # relative L2, float32 against float32


@pytest.fixture(autouse=True)
def without_gpu_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where these are installed transformers calls their kernels, which fail on a CPU."""
    for name in ("fla", "causal_conv1d", "mamba_ssm"):
        monkeypatch.setitem(sys.modules, name, None)
    yield


def test_gated_deltanet_equals_qwen3_next(rng: np.random.Generator) -> None:
    """Its fused projections are split: per query-key head [q | k | values | gates], and [b | a]."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    h, r, k, v = 2, 4, 6, 5
    layer = qwen.Qwen3NextGatedDeltaNet(qwen3_next_config(qwen, h=h, r=r, k=k, v=v), layer_idx=0)
    p = randomised(layer, rng)
    qkvz = p["in_proj_qkvz.weight"].T.reshape(D, h, 2 * k + 2 * (r // h) * v)
    q, key, values, gates = np.split(qkvz, np.cumsum([k, k, r // h * v]), axis=2)
    b, a = np.split(p["in_proj_ba.weight"].T.reshape(D, h, 2 * r // h), 2, axis=2)
    taps = np.split(p["conv1d.weight"][:, 0].T, np.cumsum([h * k, h * k]), axis=1)
    params = {
        "q": {"w": q, "conv": taps[0].reshape(-1, h, k)},
        "k": {"w": key, "conv": taps[1].reshape(-1, h, k)},
        "v": {"w": values.reshape(D, r, v), "conv": taps[2].reshape(-1, r, v)},
        "g": {"w": gates.reshape(D, r, v)},
        "w_b": b.reshape(D, r),
        "decay": {"w": a.reshape(D, r), "A_log": p["A_log"], "dt_bias": p["dt_bias"]},
        "norm": {"scale": p["norm.weight"]},
        "w_o": p["out_proj.weight"].T.reshape(r, v, D),
    }
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    cfg = config.GatedDeltaNet(num_heads=h, num_value_heads=r, head_dim=k, value_head_dim=v)
    assert distance(ours(cfg, params, x), theirs(layer, x)) < TOLERANCE


def test_kimi_delta_attention_equals_kimi_linear(rng: np.random.Generator) -> None:
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    h, k = 3, 6
    cfg = kimi.KimiLinearConfig(
        hidden_size=D, linear_num_heads=h, linear_head_dim=k, num_hidden_layers=2, rms_norm_eps=1e-6
    )
    layer = kimi.KimiLinearDeltaAttention(cfg, layer_idx=0)
    p = randomised(layer, rng)
    taps = [part.reshape(-1, h, k) for part in np.split(p["conv1d.weight"][:, 0].T, 3, axis=1)]
    params = {
        name: {"w": p[f"{name}_proj.weight"].T.reshape(D, h, k), "conv": conv}
        for name, conv in zip("qkv", taps, strict=True)
    } | {
        "w_b": p["b_proj.weight"].T,
        "w_f1": p["forget_gate.f_a_proj.weight"].T,
        "w_f2": p["forget_gate.f_b_proj.weight"].T.reshape(k, h, k),
        "A_log": p["forget_gate.A_log"].reshape(h),
        "dt_bias": p["forget_gate.dt_bias"].reshape(h, k),
        "w_g1": p["g_a_proj.weight"].T,
        "w_g2": p["g_b_proj.weight"].T.reshape(k, h, k),
        "norm": {"scale": p["o_norm.weight"]},
        "w_o": p["o_proj.weight"].T.reshape(h, k, D),
    }
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    assert (
        distance(ours(config.KimiDeltaAttention(num_heads=h, head_dim=k, gate_bias=False), params, x), theirs(layer, x))
        < TOLERANCE
    )


def test_gated_attention_equals_qwen3_next(rng: np.random.Generator) -> None:
    """Its query projection holds [query | gate] per head."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    h, g, k = 4, 2, 8
    hf = qwen3_next_config(qwen, h=2, r=2, k=4, v=4, attention=(h, g, k))
    layer = qwen.Qwen3NextAttention(hf, layer_idx=1)
    p = randomised(layer, rng)
    queries, gates = np.split(p["q_proj.weight"].T.reshape(D, h, 2 * k), 2, axis=2)
    params = {
        "w_q": queries,
        "w_g": gates,
        "w_k": p["k_proj.weight"].T.reshape(D, g, k),
        "w_v": p["v_proj.weight"].T.reshape(D, g, k),
        "w_o": p["o_proj.weight"].T.reshape(h, k, D),
        "q_norm": {"scale": p["q_norm.weight"]},
        "k_norm": {"scale": p["k_norm.weight"]},
    }
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    cfg = config.Attention(
        num_heads=h, num_kv_heads=g, head_dim=k, rope_fraction=0.25, rope_theta=10_000.0, qk_norm=True, out_gate=True
    )
    positions = torch.arange(T)[None].expand(B, T)
    rotary = qwen.Qwen3NextRotaryEmbedding(hf)(torch.from_numpy(x), positions)
    causal = torch.full((T, T), float("-inf")).triu(1)[None, None]
    want = theirs(layer, x, position_embeddings=rotary, attention_mask=causal)[0]
    assert distance(ours(cfg, params, x), want) < TOLERANCE


def qwen3_next_config(qwen: Any, *, h: int, r: int, k: int, v: int, attention: tuple[int, int, int] = (2, 1, 8)) -> Any:
    return qwen.Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=h,
        linear_num_value_heads=r,
        linear_key_head_dim=k,
        linear_value_head_dim=v,
        num_attention_heads=attention[0],
        num_key_value_heads=attention[1],
        head_dim=attention[2],
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        attn_implementation="eager",
    )


def randomised(layer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Fill every parameter with numbers away from its constant, and return them by name."""
    filled = {}
    for name, parameter in layer.named_parameters():
        filled[name] = (0.4 * rng.standard_normal(tuple(parameter.shape))).astype(np.float32)
        parameter.data = torch.from_numpy(filled[name].copy())
    return filled


def theirs(layer: Any, x: np.ndarray, **options: Any) -> Any:
    with torch.no_grad():
        y = layer(torch.from_numpy(x), **options)
    return y.numpy() if isinstance(y, torch.Tensor) else [part.numpy() for part in y if part is not None]


def ours(cfg: Any, params: Any, x: np.ndarray) -> np.ndarray:
    context = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
    module = MIXERS.module_of(cfg)
    graphdef, state = nnx.split(jax.eval_shape(lambda: module(cfg, context, nnx.Rngs(params=jax.random.key(0)))))
    expected = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(jnp.shape, params) == expected
    segments = Segments(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1)))
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, segments, None, {})[0])(params, x))


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
