"""Models of flash-linear-attention, written down plainly: float64, one token after another, its names of tensors.

Equations: Gated DeltaNet arXiv:2412.06464, DeltaNet 2406.06484, GLA 2312.06635, HGRN2 2404.07904.

Letters: t time, d model width, h heads, k key dim, v value dim, c channels, w taps.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]
Mixer = Callable[[dict[str, Any], Tensors, str, np.ndarray, int], np.ndarray]
"""(config, tensors, prefix of names, [t, d], layer) -> [t, d]."""


def logits(config: dict[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """[t, vocabulary] in float64 for one sequence."""
    tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
    mixer, eps = MIXERS[config["model_type"]], config["norm_eps"]
    x = tensors["model.embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        normed = rms_norm(x, tensors[f"{name}.attn_norm.weight"], eps)
        is_attention = layer in (config.get("attn") or {"layers": ()})["layers"]
        x = x + (attention if is_attention else mixer)(config, tensors, f"{name}.attn", normed, layer)
        normed = rms_norm(x, tensors[f"{name}.mlp_norm.weight"], eps)
        hidden = silu(normed @ tensors[f"{name}.mlp.gate_proj.weight"].T)
        hidden = hidden * (normed @ tensors[f"{name}.mlp.up_proj.weight"].T)
        x = x + hidden @ tensors[f"{name}.mlp.down_proj.weight"].T
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    return x @ tensors["lm_head.weight"].T


def gated_deltanet(config: dict[str, Any], tensors: Tensors, name: str, x: np.ndarray, layer: int) -> np.ndarray:
    q, k, v = (convolved(tensors, name, letter, x) for letter in "qkv")
    num_values = config["num_v_heads"]
    q, k = (unit(heads(a, config["num_heads"])).repeat(num_values // config["num_heads"], axis=1) for a in (q, k))
    v = heads(v, num_values)
    beta = sigmoid(project(tensors, name, "b", x))
    decay = project(tensors, name, "a", x) + tensors[f"{name}.dt_bias"]
    decay = np.exp(-np.exp(tensors[f"{name}.A_log"]) * np.log1p(np.exp(decay)))
    o = np.empty_like(v)
    state = np.zeros((num_values, k.shape[2], v.shape[2]))
    for t in range(len(x)):
        state = decay[t][:, None, None] * state
        error = v[t] - np.einsum("hkv,hk->hv", state, k[t])
        state = state + beta[t][:, None, None] * k[t][:, :, None] * error[:, None, :]
        o[t] = np.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(k.shape[2])
    gate = heads(project(tensors, name, "g", x), num_values)
    o = rms_norm(o, tensors[f"{name}.o_norm.weight"], config["norm_eps"]) * silu(gate)
    return project(tensors, name, "o", o.reshape(len(x), -1))


def delta_net(config: dict[str, Any], tensors: Tensors, name: str, x: np.ndarray, layer: int) -> np.ndarray:
    q, k, v = (heads(convolved(tensors, name, letter, x), config["num_heads"]) for letter in "qkv")
    q, k = unit(q), unit(k)
    beta = sigmoid(project(tensors, name, "b", x))
    o = np.empty_like(v)
    state = np.zeros((config["num_heads"], k.shape[2], v.shape[2]))
    for t in range(len(x)):
        error = v[t] - np.einsum("hkv,hk->hv", state, k[t])
        state = state + beta[t][:, None, None] * k[t][:, :, None] * error[:, None, :]
        o[t] = np.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(k.shape[2])
    o = rms_norm(o, tensors[f"{name}.o_norm.weight"], config["norm_eps"])
    return project(tensors, name, "o", o.reshape(len(x), -1))


def gla(config: dict[str, Any], tensors: Tensors, name: str, x: np.ndarray, layer: int) -> np.ndarray:
    q, k, v, gate = (heads(project(tensors, name, letter, x), config["num_heads"]) for letter in "qkvg")
    low = x @ tensors[f"{name}.gk_proj.0.weight"].T
    low = low @ tensors[f"{name}.gk_proj.1.weight"].T + tensors[f"{name}.gk_proj.1.bias"]
    decay = heads(sigmoid(low) ** (1 / config["gate_logit_normalizer"]), config["num_heads"])
    o = forgetting(q, k, v, decay)
    o = rms_norm(o, tensors[f"{name}.g_norm_swish_gate.weight"], config["norm_eps"]) * silu(gate)
    return project(tensors, name, "o", o.reshape(len(x), -1))


def hgrn2(config: dict[str, Any], tensors: Tensors, name: str, x: np.ndarray, layer: int) -> np.ndarray:
    raw = tensors["model.lower_bounds"]
    share = np.exp(raw) / np.exp(raw).sum(axis=0)
    bound = np.cumsum(share, axis=0)[layer] - share[0] if layer else 0.0
    decay = heads(bound + (1 - bound) * sigmoid(project(tensors, name, "f", x)), config["num_heads"])
    q = heads(silu(project(tensors, name, "q", x)), config["num_heads"])
    v = heads(project(tensors, name, "i", x), config["num_heads"])
    o = forgetting(q, 1 - decay, v, decay).reshape(len(x), -1)
    # Its norm has an epsilon of its own, whatever the model's is.
    return project(tensors, name, "o", rms_norm(o, tensors[f"{name}.g_norm.weight"], 1e-5))


def forgetting(q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """S_t = Diag(decay_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(k)."""
    o = np.empty_like(v)
    state = np.zeros((v.shape[1], k.shape[2], v.shape[2]))
    for t in range(len(q)):
        state = decay[t][:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
        o[t] = np.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(k.shape[2])
    return o


def attention(config: dict[str, Any], tensors: Tensors, name: str, x: np.ndarray, layer: int) -> np.ndarray:
    attn = config["attn"]
    num = attn["num_heads"]
    q, k, v = (project(tensors, name, letter, x) for letter in "qkv")
    q, k, v = rotated(heads(q, num)), rotated(heads(k, attn["num_kv_heads"])), heads(v, attn["num_kv_heads"])
    k, v = (a.repeat(num // attn["num_kv_heads"], axis=1) for a in (k, v))
    o = np.empty_like(q)
    for t in range(len(x)):
        first = max(0, t + 1 - (attn["window_size"] or len(x)))
        scores = np.einsum("hk,shk->hs", q[t], k[first : t + 1]) / math.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        o[t] = np.einsum("hs,shk->hk", weights / weights.sum(axis=1, keepdims=True), v[first : t + 1])
    return project(tensors, name, "o", o.reshape(len(x), -1))


def rotated(x: np.ndarray) -> np.ndarray:
    half = x.shape[2] // 2
    angle = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )


def convolved(tensors: Tensors, name: str, letter: str, x: np.ndarray) -> np.ndarray:
    """silu(conv(x W)): tap w - 1 is of the token itself."""
    x, weight = project(tensors, name, letter, x), tensors[f"{name}.{letter}_conv1d.weight"][:, 0]
    padded = np.concatenate([np.zeros((weight.shape[1] - 1, x.shape[1])), x])
    return silu(np.stack([(padded[t : t + weight.shape[1]] * weight.T).sum(axis=0) for t in range(len(x))]))


def project(tensors: Tensors, name: str, letter: str, x: np.ndarray) -> np.ndarray:
    return x @ tensors[f"{name}.{letter}_proj.weight"].T


def heads(x: np.ndarray, num: int) -> np.ndarray:
    return x.reshape(len(x), num, -1)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


MIXERS: dict[str, Mixer] = {"gated_deltanet": gated_deltanet, "delta_net": delta_net, "gla": gla, "hgrn2": hgrn2}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a checkpoint."""
    d, vocabulary, hidden = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {
        "model.embeddings.weight": (vocabulary, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (vocabulary, d),
    }
    if config["model_type"] == "hgrn2":
        found["model.lower_bounds"] = (config["num_hidden_layers"], config["num_heads"] * config["expand_ratio"])
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        attn = config.get("attn") or {"layers": ()}
        if layer in attn["layers"]:
            kv = attn["num_kv_heads"] * d // attn["num_heads"]
            mixer = {f"{letter}_proj.weight": (kv if letter in "kv" else d, d) for letter in "qkvo"}
        else:
            mixer = MIXER_SHAPES[config["model_type"]](config)
        found |= {f"{name}.attn.{key}": shape for key, shape in mixer.items()}
        found |= {f"{name}.{norm}.weight": (d,) for norm in ("attn_norm", "mlp_norm")}
        found |= {f"{name}.mlp.{part}_proj.weight": (hidden, d) for part in ("gate", "up")}
        found[f"{name}.mlp.down_proj.weight"] = (d, hidden)
    return found


def gated_deltanet_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, keys, num = config["hidden_size"], config["num_heads"] * config["head_dim"], config["num_v_heads"]
    value_dim = int(config["head_dim"] * config["expand_v"])
    values = num * value_dim
    widths = {"q": keys, "k": keys, "v": values, "g": values, "a": num, "b": num}
    return {
        **{f"{letter}_proj.weight": (width, d) for letter, width in widths.items()},
        **{f"{letter}_conv1d.weight": (widths[letter], 1, config["conv_size"]) for letter in "qkv"},
        "A_log": (num,),
        "dt_bias": (num,),
        "o_norm.weight": (value_dim,),
        "o_proj.weight": (d, values),
    }


def delta_net_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, num = config["hidden_size"], config["num_heads"]
    keys, values = int(d * config["expand_k"]), int(d * config["expand_v"])
    widths = {"q": keys, "k": keys, "v": values, "b": num}
    return {
        **{f"{letter}_proj.weight": (width, d) for letter, width in widths.items()},
        **{f"{letter}_conv1d.weight": (widths[letter], 1, config["conv_size"]) for letter in "qkv"},
        "o_norm.weight": (values // num,),
        "o_proj.weight": (d, values),
    }


def gla_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, rank = config["hidden_size"], config["gate_low_rank_dim"]
    keys, values = int(d * config["expand_k"]), int(d * config["expand_v"])
    widths = {"q": keys, "k": keys, "v": values, "g": values}
    return {
        **{f"{letter}_proj.weight": (width, d) for letter, width in widths.items()},
        "gk_proj.0.weight": (rank, d),
        "gk_proj.1.weight": (keys, rank),
        "gk_proj.1.bias": (keys,),
        "g_norm_swish_gate.weight": (values // config["num_heads"],),
        "o_proj.weight": (d, values),
    }


def hgrn2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, keys = config["hidden_size"], config["num_heads"] * config["expand_ratio"]
    widths = {"q": keys, "f": keys, "i": d}
    return {
        **{f"{letter}_proj.weight": (width, d) for letter, width in widths.items()},
        "g_norm.weight": (d,),
        "o_proj.weight": (d, d),
    }


MIXER_SHAPES = {
    "gated_deltanet": gated_deltanet_shapes,
    "delta_net": delta_net_shapes,
    "gla": gla_shapes,
    "hgrn2": hgrn2_shapes,
}
