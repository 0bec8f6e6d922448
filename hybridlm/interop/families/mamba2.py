"""Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060), as transformers and flash-linear-attention have it."""

import math
from collections.abc import Collection
from typing import Any

from hybridlm.config import Block, Mamba2, Model
from hybridlm.config_check import ConfigError
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.families.llama import outer_rules
from hybridlm.interop.fields import Fields, layers, number
from hybridlm.interop.rules import Rule, flat, linear, same, taps, under


def to_model(fields: Fields) -> Model:
    fields.only("hidden_act", "silu", "swish")
    fields.only("use_bias", False)
    fields.only("use_conv_bias", True)
    low, high = (number(bound) for bound in fields.get("time_step_limit", (0.0, math.inf)))
    mixer = Mamba2(
        num_heads=fields["num_heads"],
        head_dim=fields.get("head_dim", 64),
        state_dim=fields.get("state_size", 128),
        num_groups=fields.get("n_groups", 1),
        conv_width=fields.get("conv_kernel", 4),
        dt_low=low,
        dt_high=None if math.isinf(high) else high,
    )
    width, expand = fields["hidden_size"], fields.get("expand", 2)
    if mixer.num_heads * mixer.head_dim != expand * width:
        inner = f"{mixer.num_heads} x {mixer.head_dim}"
        raise ConfigError("num_heads", f" x head_dim is {inner}, not expand x hidden_size = {expand} x {width}")
    return Model(
        **layers([Block(mixer=mixer, ffn=None)] * fields["num_hidden_layers"]),
        vocab_size=fields["vocab_size"],
        width=width,
        tied_embedding=fields.get("tie_word_embeddings", False),
        scale_embedding=False,
        norm_eps=float(fields.get("layer_norm_epsilon", fields.get("norm_eps", 1e-5))),
        norm_offset=False,
    )


def to_fields(model: Model) -> dict[str, Any]:
    mixer = model.blocks()[0].mixer
    if not isinstance(mixer, Mamba2):
        raise ConfigError("model.pattern.0.mixer", ": is not Mamba2")
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "tie_word_embeddings": model.tied_embedding,
        "layer_norm_epsilon": model.norm_eps,
        "hidden_act": "silu",
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "expand": mixer.num_heads * mixer.head_dim // model.width,
        "state_size": mixer.state_dim,
        "n_groups": mixer.num_groups,
        "conv_kernel": mixer.conv_width,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [mixer.dt_low, math.inf if mixer.dt_high is None else mixer.dt_high],
    }


MIXER = [
    linear(("z.w", "x.w", "w_bc", "w_dt"), "in_proj.weight"),
    taps(("x.conv", "conv_bc"), "conv1d.weight"),
    flat(("x.conv_bias", "conv_bc_bias"), "conv1d.bias"),
    same("dt_bias", "dt_bias"),
    same("log_rate", "A_log"),
    same("skip", "D"),
    flat("norm.scale", "norm.weight"),
    linear("w_o", "out_proj.weight", num_inputs=2),
]


def rules(model: Model, names: Collection[str]) -> list[Rule]:
    found = outer_rules(model, embedding="backbone.embeddings", norm="backbone.norm_f")
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"backbone.layers.{i}"
        found.append(same(f"{ours}.mixer_norm.scale", f"{theirs}.norm.weight"))
        found += under(f"{ours}.mixer", f"{theirs}.mixer", MIXER)
    return found


ARCHITECTURES = [
    Architecture(name="Mamba2ForCausalLM", model_type="mamba2", to_model=to_model, to_fields=to_fields, rules=rules)
]
