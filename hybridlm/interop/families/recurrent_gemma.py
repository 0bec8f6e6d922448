"""RecurrentGemma (Botev et al., 2024, arXiv:2404.07839), 2B and 9B, as transformers has it."""

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np

from hybridlm.config import RGLRU, Attention, Block, GatedMLP, GeGLU, Model
from hybridlm.config_check import ConfigError
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.families.llama import (
    TANH_GELU,
    attention_rules,
    first_attention,
    mlp_rules,
    outer,
    outer_fields,
    outer_rules,
)
from hybridlm.interop.fields import Fields, layers, rotary, rotary_fields
from hybridlm.interop.rules import Rule, linear, same, taps, under

RECURRENT, ATTENTION = "recurrent", "attention"


def rounded_scale(width: int) -> float:
    """sqrt(width) in bfloat16, which embeddings are multiplied by in every dtype."""
    return float(ml_dtypes.bfloat16(np.float32(width**0.5)))


def to_model(fields: Fields) -> Model:
    fields.only("hidden_activation", *TANH_GELU)
    fields.only("embeddings_scale_by_sqrt_dim", True)
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    bias = fields.get("attention_bias", False)
    attention = Attention(
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", heads),
        head_dim=width // heads,
        window=fields.get("attention_window_size", 2048),
        qkv_bias=bias,
        out_bias=True,
        **rotary(fields, width // heads, fraction=0.5),
    )
    recurrent = RGLRU(
        width=fields.get("lru_width", width),
        num_heads=heads,
        conv_width=fields.get("conv1d_width", 4),
        init="recurrentgemma",
        bias=True,
    )
    mixers = {RECURRENT: recurrent, ATTENTION: attention}
    kinds = fields.get("block_types", (RECURRENT, RECURRENT, ATTENTION))
    for kind in kinds:
        if kind not in mixers:
            raise ConfigError("block_types", f": {kind!r} is not supported; known: {', '.join(mixers)}")
    ffn = GeGLU(hidden=fields["intermediate_size"] // 2, bias=True)
    blocks = [Block(mixer=mixers[kinds[i % len(kinds)]], ffn=ffn) for i in range(fields["num_hidden_layers"])]
    return Model(
        **layers(blocks),
        **outer(fields, norm_offset=True, tied=True)
        | {"scale_embedding": True, "embedding_scale": rounded_scale(width)},
        logit_soft_cap=fields.get("logits_soft_cap", 30.0),
    )


def to_fields(model: Model) -> dict[str, Any]:
    blocks = model.blocks()
    recurrent = next((block.mixer for block in blocks if isinstance(block.mixer, RGLRU)), None)
    ffn = blocks[0].ffn
    if recurrent is None or not isinstance(ffn, GatedMLP):
        raise ConfigError("model.pattern", ": has no RGLRU with a gated MLP")
    attention = first_attention(model)
    act = "gelu_pytorch_tanh"
    kinds = layers([Block(mixer=block.mixer, ffn=None) for block in blocks])["pattern"]
    return {
        **outer_fields(model),
        **rotary_fields(attention.rope_theta, attention.rope_fraction, attention.rope_scaling),
        "num_attention_heads": recurrent.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": model.width // recurrent.num_heads,
        "attention_bias": attention.qkv_bias,
        "attention_window_size": attention.window,
        "lru_width": recurrent.width,
        "conv1d_width": recurrent.conv_width,
        "block_types": [RECURRENT if isinstance(block.mixer, RGLRU) else ATTENTION for block in kinds],
        "intermediate_size": 2 * ffn.hidden,
        "hidden_activation": act,
        "logits_soft_cap": model.logit_soft_cap,
    }


def recurrent_rules() -> list[Rule]:
    """Of a recurrent `temporal_block`."""
    rules = [taps("w_conv", "conv_1d.weight"), same("b_conv", "conv_1d.bias"), same("decay", "rg_lru.recurrent_param")]
    for mine, theirs in (("in_x", "linear_x"), ("in_y", "linear_y"), ("out", "linear_out")):
        rules += [linear(f"{mine}.w", f"{theirs}.weight"), same(f"{mine}.b", f"{theirs}.bias")]
    # Block-diagonal maps are x W on both sides.
    for mine, theirs in (("a", "recurrent"), ("x", "input")):
        rules.append(same(f"w_gate_{mine}", f"rg_lru.{theirs}_gate_weight"))
        rules.append(same(f"b_gate_{mine}", f"rg_lru.{theirs}_gate_bias"))
    return rules


def rules(model: Model, names: Collection[str]) -> list[Rule]:
    found = outer_rules(model, norm="model.final_norm")
    for i, block in enumerate(model.blocks()):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        assert isinstance(block.ffn, GatedMLP)
        norms = [("mixer_norm", "temporal_pre_norm"), ("ffn_norm", "channel_pre_norm")]
        found += [same(f"{ours}.{mine}.scale", f"{theirs}.{name}.weight") for mine, name in norms]
        mixer = attention_rules(block.mixer) if isinstance(block.mixer, Attention) else recurrent_rules()
        found += under(f"{ours}.mixer", f"{theirs}.temporal_block", mixer)
        found += under(f"{ours}.ffn", f"{theirs}.mlp_block", mlp_rules(block.ffn))
    return found


ARCHITECTURES = [
    Architecture(
        name="RecurrentGemmaForCausalLM",
        model_type="recurrent_gemma",
        to_model=to_model,
        to_fields=to_fields,
        rules=rules,
    )
]
