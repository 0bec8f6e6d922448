"""Llama, Mistral, Qwen2, Qwen3 and Gemma: attention and a gated MLP, under the same names of tensors."""

from collections.abc import Collection
from functools import partial
from typing import Any

from hybridlm.config import Attention, Block, GatedMLP, GeGLU, Model, SwiGLU
from hybridlm.config_check import ConfigError
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.fields import Fields, layer_kinds, layers, rotary, rotary_fields
from hybridlm.interop.rules import Rule, flat, linear, same, under

FULL, LOCAL = "full_attention", "sliding_attention"
TANH_GELU = ("gelu_pytorch_tanh", "gelu")
"""Gemma's first configs say `gelu` and mean the tanh form."""


def attention_rules(mixer: Attention) -> list[Rule]:
    """Of `self_attn`."""
    rules = []
    for letter in "qkv":
        rules.append(linear(f"w_{letter}", f"{letter}_proj.weight"))
        if mixer.qkv_bias:
            rules.append(flat(f"b_{letter}", f"{letter}_proj.bias"))
        if mixer.qk_norm and letter in "qk":
            rules.append(same(f"{letter}_norm.scale", f"{letter}_norm.weight"))
    rules.append(linear("w_o", "o_proj.weight", num_inputs=2))
    return rules + [same("b_o", "o_proj.bias")] * mixer.out_bias


def mlp_rules(ffn: GatedMLP) -> list[Rule]:
    """Of a gated MLP."""
    rules = []
    for name in ("gate", "up", "down"):
        rules.append(linear(f"{name}.w", f"{name}_proj.weight"))
        if ffn.bias:
            rules.append(same(f"{name}.b", f"{name}_proj.bias"))
    return rules


def outer_rules(model: Model, *, embedding: str = "model.embed_tokens", norm: str = "model.norm") -> list[Rule]:
    """Of embedding, last norm and head."""
    rules = [same("embedding", f"{embedding}.weight"), same("norm.scale", f"{norm}.weight")]
    return rules if model.tied_embedding else [*rules, linear("w_head", "lm_head.weight")]


def rules(model: Model, names: Collection[str]) -> list[Rule]:
    found = outer_rules(model)
    for i, block in enumerate(model.blocks()):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        assert isinstance(block.mixer, Attention) and isinstance(block.ffn, GatedMLP)
        norms = [("mixer_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")]
        found += [same(f"{ours}.{mine}.scale", f"{theirs}.{name}.weight") for mine, name in norms]
        found += under(f"{ours}.mixer", f"{theirs}.self_attn", attention_rules(block.mixer))
        found += under(f"{ours}.ffn", f"{theirs}.mlp", mlp_rules(block.ffn))
    return found


def sizes(fields: Fields) -> dict[str, Any]:
    """Arguments of `Attention`."""
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim", fields["hidden_size"] // heads)
    return {
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        **rotary(fields, head_dim),
    }


def outer(fields: Fields, *, norm_offset: bool = False, tied: bool = False) -> dict[str, Any]:
    """Arguments of `Model` that are not about its layers."""
    return {
        "vocab_size": fields["vocab_size"],
        "width": fields["hidden_size"],
        "tied_embedding": fields.get("tie_word_embeddings", tied),
        "scale_embedding": False,
        "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
        "norm_offset": norm_offset,
    }


def to_llama(fields: Fields) -> Model:
    fields.only("hidden_act", "silu", "swish")
    fields.only("pretraining_tp", 1)
    bias = fields.get("attention_bias", False)
    mixer = Attention(**sizes(fields), qkv_bias=bias, out_bias=bias)
    ffn = SwiGLU(hidden=fields["intermediate_size"], bias=fields.get("mlp_bias", False))
    return Model(**layers([Block(mixer=mixer, ffn=ffn)] * fields["num_hidden_layers"]), **outer(fields))


def to_mistral(fields: Fields) -> Model:
    fields.only("hidden_act", "silu", "swish")
    # Absent and null differ: configs before transformers 4.36 rely on the default.
    window = fields.values.get("sliding_window", 4096)
    block = Block(mixer=Attention(**sizes(fields), window=window), ffn=SwiGLU(hidden=fields["intermediate_size"]))
    return Model(**layers([block] * fields["num_hidden_layers"]), **outer(fields))


def to_qwen(fields: Fields, **norm_and_bias: Any) -> Model:
    fields.only("hidden_act", "silu", "swish")
    count, window = fields["num_hidden_layers"], fields.get("sliding_window", 4096)
    if not fields.get("use_sliding_window", False):
        window = None
    first = fields.get("max_window_layers", 28)
    default = [LOCAL if window is not None and i >= first else FULL for i in range(count)]
    ffn = SwiGLU(hidden=fields["intermediate_size"])
    blocks = [
        Block(mixer=Attention(**sizes(fields), window=window if kind == LOCAL else None, **norm_and_bias), ffn=ffn)
        for kind in layer_kinds(fields, default, (FULL, LOCAL))
    ]
    return Model(**layers(blocks), **outer(fields))


def to_qwen3(fields: Fields) -> Model:
    bias = fields.get("attention_bias", False)
    return to_qwen(Fields({"head_dim": 128, **fields.values}), qk_norm=True, qkv_bias=bias, out_bias=bias)


def to_gemma(fields: Fields) -> Model:
    # `hidden_activation` overrode `hidden_act` in transformers 4; both always stood for the tanh form.
    fields.only("hidden_act", *TANH_GELU)
    fields.only("hidden_activation", *TANH_GELU)
    fields.only("attention_bias", False)
    fields.only("use_bidirectional_attention", False)
    mixer = Attention(**sizes(Fields({"head_dim": 256, **fields.values})))
    block = Block(mixer=mixer, ffn=GeGLU(hidden=fields["intermediate_size"]))
    told: dict[str, Any] = {**outer(fields, norm_offset=True, tied=True), "scale_embedding": True}
    return Model(**layers([block] * fields["num_hidden_layers"]), **told)


def to_fields(model: Model, **special: Any) -> dict[str, Any]:
    """What all of them call the same."""
    block = model.blocks()[0]
    mixer, ffn = block.mixer, block.ffn
    if not isinstance(mixer, Attention) or not isinstance(ffn, GatedMLP):
        raise ConfigError("model.pattern.0", ": is not attention with a gated MLP")
    return {
        **outer_fields(model),
        **attention_fields(mixer, model.width),
        "hidden_act": "silu",
        "intermediate_size": ffn.hidden,
        **special,
    }


def outer_fields(model: Model) -> dict[str, Any]:
    """The inverse of `outer`, and the number of layers."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "tie_word_embeddings": model.tied_embedding,
        "rms_norm_eps": model.norm_eps,
    }


def attention_fields(mixer: Attention, width: int) -> dict[str, Any]:
    """The inverse of `sizes`."""
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim or width // mixer.num_heads,
        **rotary_fields(mixer.rope_theta, mixer.rope_fraction, mixer.rope_scaling),
    }


def first_attention(model: Model) -> Attention:
    """The first attention of a model; a plain one where it has none."""
    found = (block.mixer for block in model.blocks() if isinstance(block.mixer, Attention))
    return next(found, Attention(num_heads=1, num_kv_heads=1))


def llama_fields(model: Model) -> dict[str, Any]:
    ffn = model.blocks()[0].ffn
    bias = isinstance(ffn, GatedMLP) and ffn.bias
    return to_fields(model, attention_bias=first_attention(model).qkv_bias, mlp_bias=bias)


def mistral_fields(model: Model) -> dict[str, Any]:
    return to_fields(model, sliding_window=first_attention(model).window)


def qwen_fields(model: Model, **special: Any) -> dict[str, Any]:
    windows = [getattr(block.mixer, "window", None) for block in model.blocks()]
    window = next((w for w in windows if w is not None), None)
    first = next((i for i, w in enumerate(windows) if w is not None), model.num_layers)
    return to_fields(
        model,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=first,
        layer_types=[FULL if w is None else LOCAL for w in windows],
        **special,
    )


def qwen3_fields(model: Model) -> dict[str, Any]:
    return qwen_fields(model, attention_bias=first_attention(model).qkv_bias)


def gemma_fields(model: Model) -> dict[str, Any]:
    act = "gelu_pytorch_tanh"
    return to_fields(model, hidden_act=act, hidden_activation=act, attention_bias=False)


ARCHITECTURES = [
    Architecture(
        name=f"{name}ForCausalLM", model_type=name.lower(), to_model=to_model, to_fields=fields_of, rules=rules
    )
    for name, to_model, fields_of in (
        ("Llama", to_llama, llama_fields),
        ("Mistral", to_mistral, mistral_fields),
        ("Qwen2", partial(to_qwen, qkv_bias=True), qwen_fields),
        ("Qwen3", to_qwen3, qwen3_fields),
        ("Gemma", to_gemma, gemma_fields),
    )
]
