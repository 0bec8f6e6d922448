"""Tiny published models with random weights, written by the libraries that define their formats, and their logits."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import config
from hybridlm.config import Config
from hybridlm.interop.runs import import_config
from hybridlm.interop.safetensors import Tensors
from hybridlm.interop.weights import read_params
from hybridlm.model import Params, build
from hybridlm.sharding import make_mesh
from tests.interop import fla_oracle

VOCABULARY = 61
LENGTH, PROMPT = 19, 7
"""Tokens; where transformers uses a cache, those of the prompt come at once and the others one by one. Windows are
shorter."""
TOLERANCE = 1e-4
"""Of logits, absolute."""

ROPE = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
ATTENTION = SMALL | dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "Llama": ATTENTION
    | dict(rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, **ROPE), max_position_embeddings=128),
    "Mistral": ATTENTION | dict(head_dim=12, sliding_window=5),
    "Qwen2": ATTENTION | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "Qwen3": ATTENTION | dict(head_dim=12, tie_word_embeddings=True),
    "Gemma": ATTENTION | dict(num_key_value_heads=1, head_dim=12),
    # The pattern ends in its middle, and the recurrence is wider than the model.
    "RecurrentGemma": ATTENTION
    | dict(num_hidden_layers=4, num_key_value_heads=1, lru_width=40, intermediate_size=96, attention_window_size=6),
    "Mamba2": SMALL | dict(num_heads=8, head_dim=8, state_size=12, n_groups=2, chunk_size=8),
    "Qwen3Next": ATTENTION
    | dict(
        num_hidden_layers=4,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[1],
    ),
}
FLA_SMALL = SMALL | dict(intermediate_size=48, norm_eps=1e-6, hidden_act="swish")
HYBRID = dict(layers=[1], num_heads=4, num_kv_heads=2, window_size=5)
FLA: dict[str, dict[str, Any]] = {
    "GatedDeltaNet": FLA_SMALL
    | dict(model_type="gated_deltanet", num_heads=2, num_v_heads=4, head_dim=8, expand_v=1.5, conv_size=4)
    | dict(num_hidden_layers=3, attn=HYBRID),
    "DeltaNet": FLA_SMALL | dict(model_type="delta_net", num_heads=4, expand_k=1.0, expand_v=1.0, conv_size=3),
    "GLA": FLA_SMALL
    | dict(model_type="gla", num_heads=4, expand_k=0.5, expand_v=1.0)
    | dict(gate_low_rank_dim=6, gate_logit_normalizer=4),
    "HGRN2": FLA_SMALL | dict(model_type="hgrn2", num_heads=4, expand_ratio=8, num_hidden_layers=4),
}
FAMILIES = (*HUGGING_FACE, *FLA)


@dataclass(frozen=True)
class Published:
    """A model in `directory`, and its logits [b, t, v] for ids [b, t], at once and with a cache."""

    directory: Path
    forward: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]


def publish(family: str, directory: Path) -> Published:
    """Write the tiny model of a family."""
    return publish_fla(family, directory) if family in FLA else publish_hugging_face(family, directory)


def publish_hugging_face(family: str, directory: Path, changes: dict[str, Any] | None = None, **save: Any) -> Published:
    """`changes` are fields of its config, `save` arguments of `save_pretrained`."""
    import torch
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**HUGGING_FACE[family] | (changes or {}))
    cls = getattr(transformers, f"{family}ForCausalLM")
    model = cls._from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # Far from where training starts, so that biases, norms and gates count.
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(directory, **save)

    @torch.no_grad()
    def forward(ids: np.ndarray) -> np.ndarray:
        return model(torch.tensor(ids), use_cache=False).logits.numpy()

    @torch.no_grad()
    def decode(ids: np.ndarray) -> np.ndarray:
        name = "cache_params" if family == "Mamba2" else "past_key_values"
        cache = {name: transformers.DynamicCache(config=model.config), "use_cache": True}
        ends = (0, *range(PROMPT, ids.shape[1] + 1))
        parts = [
            model(torch.tensor(ids[:, first:last]), **cache).logits.numpy()
            for first, last in zip(ends, ends[1:], strict=False)
        ]
        return np.concatenate(parts, axis=1)

    return Published(directory, forward, decode)


def publish_fla(family: str, directory: Path) -> Published:
    from safetensors.numpy import save_file

    made, draw = FLA[family], np.random.default_rng(0).standard_normal
    tensors = {}
    for name, shape in fla_oracle.shapes(made).items():
        scale = 1.0 if len(shape) == 1 or "embeddings" in name or "bounds" in name else shape[-1] ** -0.5
        # Norms are near 1, and so are the rates of decays.
        tensors[name] = (scale * draw(shape) * (0.3 if len(shape) == 1 else 1) + ("norm" in name)).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    described = made | {"architectures": [f"{family}ForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")

    def forward(ids: np.ndarray) -> np.ndarray:
        return np.stack([fla_oracle.logits(made, tensors, row) for row in ids])

    return Published(directory, forward, forward)


def load(directory: Path) -> tuple[Config, Params]:
    """Config and parameters, on one device."""
    architecture, found = import_config(directory, ["data.tokenizer=byte"])
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    return found, read_params(Tensors(directory), architecture, found.model, found.kernels, mesh)


def ours(found: Config, params: Params, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Our logits at once, and with a state, one token after another."""
    _, bind = build(found.model, found.kernels)
    params = jax.device_get(params)
    tokens = jnp.asarray(ids, jnp.int32)
    at_once = jax.jit(lambda params, tokens: bind(params)(tokens)[0])(params, tokens)
    step = jax.jit(lambda params, tokens, state: bind(params)(tokens, None, state))
    state, parts = bind(params).init_state(*ids.shape), []
    for t in range(ids.shape[1]):
        logits, state = step(params, tokens[:, t : t + 1], state)
        parts.append(logits)
    return np.asarray(at_once), np.concatenate(parts, axis=1)


def largest_errors(published: Published) -> tuple[float, float, float]:
    """Of our logits, at once and with a state, each against theirs of the same kind; and the largest of theirs."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH))
    at_once, one_by_one = ours(*load(published.directory), ids)
    theirs, cached = published.forward(ids), published.decode(ids)
    return (
        float(np.abs(at_once - theirs).max()),
        float(np.abs(one_by_one - cached).max()),
        float(np.abs(theirs).max()),
    )
