"""Gated DeltaNet, DeltaNet, GLA and HGRN2 as flash-linear-attention 0.6 lays them out, hybrids with attention included.

The layers are those of arXiv:2412.06464, 2406.06484, 2312.06635 and 2404.07904.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from hybridlm.config import (
    HGRN2,
    Attention,
    Block,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    GatedMLP,
    Mixer,
    Model,
    SwiGLU,
)
from hybridlm.config_check import ConfigError
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.families.llama import attention_rules, mlp_rules, outer_rules
from hybridlm.interop.families.lower_bounds import lower_bounds
from hybridlm.interop.fields import Fields, layers
from hybridlm.interop.rules import Rule, flat, linear, same, taps, under

START_BOUND = 0.5
"""Of `HGRN2.lower_bound`: any number above 0 says that a layer has bounds; a checkpoint says which."""


def to_model(fields: Fields, mixer_of: Callable[[Fields, int], Mixer]) -> Model:
    """`mixer_of(fields, layer)` is the config of a linear layer."""
    fields.only("hidden_act", "swish", "silu")
    width, count = fields["hidden_size"], fields["num_hidden_layers"]
    ratio = fields.get("hidden_ratio", 4)
    hidden = fields.get("intermediate_size", 256 * -(-int(width * ratio * 2 / 3) // 256))
    ffn = SwiGLU(hidden=hidden)
    told, mixers = fields.get("attn", {}), [mixer_of(fields, i) for i in range(count)]
    if not isinstance(told, dict):
        raise ConfigError("attn", ": several kinds of attention are not supported")
    if told:
        told = Fields(told)
        for i in told["layers"]:
            mixers[i] = _attention(told, width)
    return Model(
        **layers([Block(mixer=mixer, ffn=ffn) for mixer in mixers]),
        vocab_size=fields["vocab_size"],
        width=width,
        tied_embedding=fields.get("tie_word_embeddings", False),
        scale_embedding=False,
        norm_eps=float(fields.get("norm_eps", 1e-6)),
        norm_offset=False,
    )


def _attention(told: Fields, width: int) -> Attention:
    heads = told["num_heads"]
    return Attention(
        num_heads=heads,
        num_kv_heads=told.get("num_kv_heads", heads),
        head_dim=width // heads,
        window=told.get("window_size"),
        rope_theta=float(told.get("rope_theta", 10_000.0)),
        qkv_bias=told.get("qkv_bias", False),
    )


def to_fields(model: Model, kind: type[Mixer], fields_of: Callable[[Any, Model], dict[str, Any]]) -> dict[str, Any]:
    """`fields_of(mixer, model)` are those of the linear layers, of which the last one is shown."""
    blocks = model.blocks()
    mixer = next((block.mixer for block in reversed(blocks) if isinstance(block.mixer, kind)), None)
    ffn = blocks[0].ffn
    if mixer is None or not isinstance(ffn, GatedMLP):
        raise ConfigError("model.pattern", f": has no {kind.__name__} with a gated MLP")
    places = [i for i, block in enumerate(blocks) if isinstance(block.mixer, Attention)]
    attn: dict[str, Any] | None = None
    if places:
        attention = blocks[places[0]].mixer
        assert isinstance(attention, Attention)
        attn = {
            "layers": places,
            "num_heads": attention.num_heads,
            "num_kv_heads": attention.num_kv_heads,
            "qkv_bias": attention.qkv_bias,
            "window_size": attention.window,
            "rope_theta": attention.rope_theta,
        }
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "tie_word_embeddings": model.tied_embedding,
        "norm_eps": model.norm_eps,
        "hidden_act": "swish",
        "intermediate_size": ffn.hidden,
        "attn": attn,
        **fields_of(mixer, model),
    }


def rules(model: Model, names: Collection[str], mixer_rules: Callable[[Any, str, Collection[str]], list[Rule]]) -> Any:
    """`mixer_rules(mixer, prefix, names)` are those of a linear layer's `attn`."""
    found = outer_rules(model, embedding="model.embeddings")
    for i, block in enumerate(model.blocks()):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        assert isinstance(block.ffn, GatedMLP)
        norms = [("mixer_norm", "attn_norm"), ("ffn_norm", "mlp_norm")]
        found += [same(f"{ours}.{mine}.scale", f"{theirs}.{name}.weight") for mine, name in norms]
        if isinstance(block.mixer, Attention):
            mixer = attention_rules(block.mixer)
        else:
            mixer = mixer_rules(block.mixer, f"{theirs}.attn", names)
        found += under(f"{ours}.mixer", f"{theirs}.attn", mixer)
        found += under(f"{ours}.ffn", f"{theirs}.mlp", mlp_rules(block.ffn))
    return found


def convolved(conv_width: int | None) -> list[Rule]:
    """Queries, keys and values with their convolutions."""
    projections = [linear(f"{letter}.w", f"{letter}_proj.weight") for letter in "qkv"]
    convolutions = [taps(f"{letter}.conv", f"{letter}_conv1d.weight") for letter in "qkv"]
    return projections + convolutions * (conv_width is not None)


def gated_deltanet(fields: Fields, layer: int) -> Mixer:
    activation = fields.only("output_gate_activation", "swish", "silu", "sigmoid")
    gate = "sigmoid" if activation == "sigmoid" else "silu"
    head_dim = fields.get("head_dim", 256)
    return GatedDeltaNet(
        num_heads=fields.get("num_heads", 6),
        num_value_heads=fields.get("num_v_heads", fields.get("num_heads", 6)),
        head_dim=head_dim,
        value_head_dim=int(head_dim * fields.get("expand_v", 2)),
        conv_width=fields.get("conv_size", 4) if fields.get("use_short_conv", True) else None,
        allow_neg_eigval=fields.get("allow_neg_eigval", False),
        output_gate=gate if fields.get("use_gate", True) else None,
    )


def gated_deltanet_fields(mixer: GatedDeltaNet, model: Model) -> dict[str, Any]:
    return {
        "num_heads": mixer.num_heads,
        "num_v_heads": mixer.num_value_heads or mixer.num_heads,
        "head_dim": mixer.head_dim,
        "expand_v": (mixer.value_head_dim or 2 * mixer.head_dim) / mixer.head_dim,
        "use_short_conv": mixer.conv_width is not None,
        "conv_size": mixer.conv_width or 4,
        "allow_neg_eigval": mixer.allow_neg_eigval,
        "use_gate": mixer.output_gate is not None,
        "output_gate_activation": {"silu": "swish", "sigmoid": "sigmoid", None: "swish"}[mixer.output_gate],
    }


def gated_deltanet_rules(mixer: GatedDeltaNet, prefix: str, names: Collection[str]) -> list[Rule]:
    return [
        *convolved(mixer.conv_width),
        linear("w_b", "b_proj.weight"),
        linear("decay.w", "a_proj.weight"),
        same("decay.A_log", "A_log"),
        same("decay.dt_bias", "dt_bias"),
        *[linear("g.w", "g_proj.weight")] * (mixer.output_gate is not None),
        same("norm.scale", "o_norm.weight"),
        linear("w_o", "o_proj.weight", num_inputs=2),
    ]


def delta_net(fields: Fields, layer: int) -> Mixer:
    fields.only("use_output_norm", True)
    heads, width = fields.get("num_heads", 16), fields["hidden_size"]
    activation: Any = fields.only("qk_activation", "silu", "relu", "elu", "identity")
    return DeltaNet(
        num_heads=heads,
        head_dim=int(width * fields.get("expand_k", 1)) // heads,
        value_head_dim=int(width * fields.get("expand_v", 1)) // heads,
        conv_width=fields.get("conv_size", 4) if fields.get("use_short_conv", True) else None,
        qk_activation=None if activation == "identity" else activation,
        qk_norm=fields.only("qk_norm", "l2", "sum"),
        use_beta=fields.get("use_beta", True),
        allow_neg_eigval=fields.get("allow_neg_eigval", False),
        output_gate="silu" if fields.get("use_gate", False) else None,
    )


def delta_net_fields(mixer: DeltaNet, model: Model) -> dict[str, Any]:
    return {
        "num_heads": mixer.num_heads,
        "expand_k": mixer.num_heads * mixer.head_dim / model.width,
        "expand_v": mixer.num_heads * (mixer.value_head_dim or mixer.head_dim) / model.width,
        "use_short_conv": mixer.conv_width is not None,
        "conv_size": mixer.conv_width or 4,
        "qk_activation": mixer.qk_activation or "identity",
        "qk_norm": mixer.qk_norm,
        "use_beta": mixer.use_beta,
        "allow_neg_eigval": mixer.allow_neg_eigval,
        "use_gate": mixer.output_gate is not None,
        "use_output_norm": True,
    }


def delta_net_rules(mixer: DeltaNet, prefix: str, names: Collection[str]) -> list[Rule]:
    norm = "norm" if f"{prefix}.norm.weight" in names else "o_norm"  # the former was its name until 2025
    return [
        *convolved(mixer.conv_width),
        *[linear("w_b", "b_proj.weight")] * mixer.use_beta,
        *[linear("g.w", "g_proj.weight")] * (mixer.output_gate is not None),
        same("norm.scale", f"{norm}.weight"),
        linear("w_o", "o_proj.weight", num_inputs=2),
    ]


def gla(fields: Fields, layer: int) -> Mixer:
    for name, supported in (("use_short_conv", False), ("use_output_gate", True), ("use_gk", True), ("use_gv", False)):
        fields.only(name, supported)
    heads, width = fields.get("num_heads", 4), fields["hidden_size"]
    fields.only("num_kv_heads", heads)
    fields.only("feature_map", None)
    fields.only("clamp_min", None)
    return GatedLinearAttention(
        num_heads=heads,
        head_dim=int(width * fields.get("expand_k", 0.5)) // heads,
        value_head_dim=int(width * fields.get("expand_v", 1)) // heads,
        gate_rank=fields.get("gate_low_rank_dim", 16),
        decay_temperature=float(fields.get("gate_logit_normalizer", 16)),
    )


def gla_fields(mixer: GatedLinearAttention, model: Model) -> dict[str, Any]:
    return {
        "num_heads": mixer.num_heads,
        "expand_k": mixer.num_heads * mixer.head_dim / model.width,
        "expand_v": mixer.num_heads * mixer.value_head_dim / model.width,
        "gate_low_rank_dim": mixer.gate_rank,
        "gate_logit_normalizer": mixer.decay_temperature,
        "use_short_conv": False,
        "use_output_gate": True,
        "use_gk": True,
        "use_gv": False,
    }


def gla_rules(mixer: GatedLinearAttention, prefix: str, names: Collection[str]) -> list[Rule]:
    norm = "g_norm" if f"{prefix}.g_norm.weight" in names else "g_norm_swish_gate"  # the former with fuse_norm=False
    return [
        *convolved(None),
        linear("gate.w", "g_proj.weight"),
        linear("w_decay1", "gk_proj.0.weight"),
        linear("w_decay2", "gk_proj.1.weight"),
        flat("b_decay", "gk_proj.1.bias"),
        same("norm.scale", f"{norm}.weight"),
        linear("w_o", "o_proj.weight", num_inputs=2),
    ]


def hgrn2(fields: Fields, layer: int) -> Mixer:
    fields.only("use_short_conv", False)
    width, ratio, heads = fields["hidden_size"], fields.get("expand_ratio"), fields.get("num_heads")
    if heads is None:
        heads = width // (ratio or 128)
    is_bounded = layer > 0 and fields.get("use_lower_bound", True)
    return HGRN2(
        num_heads=heads,
        head_dim=ratio or width // heads,
        value_head_dim=width // heads,
        lower_bound=START_BOUND if is_bounded else 0.0,
    )


def hgrn2_fields(mixer: HGRN2, model: Model) -> dict[str, Any]:
    return {
        "num_heads": mixer.num_heads,
        "expand_ratio": mixer.head_dim,
        "use_short_conv": False,
        "use_lower_bound": mixer.lower_bound > 0,
    }


def hgrn2_rules(mixer: HGRN2, prefix: str, names: Collection[str]) -> list[Rule]:
    return [
        linear("q.w", "q_proj.weight"),
        linear("w_f", "f_proj.weight"),
        linear("v.w", "i_proj.weight"),
        flat("norm.scale", "g_norm.weight"),
        linear("w_o", "o_proj.weight", num_inputs=2),
    ]


def hgrn2_model_rules(model: Model, names: Collection[str]) -> list[Rule]:
    mixers = [block.mixer for block in model.blocks()]
    bounded = [i for i, mixer in enumerate(mixers) if isinstance(mixer, HGRN2) and mixer.lower_bound > 0]
    found = rules(model, names, hgrn2_rules)
    if not bounded:
        return found
    first = mixers[bounded[0]]
    assert isinstance(first, HGRN2)
    ours = [f"layers.{i}.mixer.lower_bound" for i in bounded]
    return [*found, lower_bounds(ours, bounded, "model.lower_bounds", len(mixers), first.num_heads * first.head_dim)]


def _architecture(name: str, model_type: str, mixer_of: Any, kind: Any, fields_of: Any, rules_of: Any) -> Architecture:
    return Architecture(
        name=name,
        model_type=model_type,
        to_model=partial(to_model, mixer_of=mixer_of),
        to_fields=partial(to_fields, kind=kind, fields_of=fields_of),
        rules=rules_of,
    )


ARCHITECTURES = [
    _architecture(
        "GatedDeltaNetForCausalLM",
        "gated_deltanet",
        gated_deltanet,
        GatedDeltaNet,
        gated_deltanet_fields,
        partial(rules, mixer_rules=gated_deltanet_rules),
    ),
    _architecture(
        "DeltaNetForCausalLM",
        "delta_net",
        delta_net,
        DeltaNet,
        delta_net_fields,
        partial(rules, mixer_rules=delta_net_rules),
    ),
    _architecture(
        "GLAForCausalLM",
        "gla",
        gla,
        GatedLinearAttention,
        gla_fields,
        partial(rules, mixer_rules=gla_rules),
    ),
    _architecture("HGRN2ForCausalLM", "hgrn2", hgrn2, HGRN2, hgrn2_fields, hgrn2_model_rules),
]
