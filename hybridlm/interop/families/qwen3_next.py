"""Qwen3-Next: Gated DeltaNet and gated attention over mixtures of experts, as transformers has it."""

from collections.abc import Collection
from typing import Any

from hybridlm.config import FFN, Attention, Block, GatedDeltaNet, Model, MoE, SwiGLU, TopK
from hybridlm.config_check import ConfigError
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.families.llama import (
    attention_fields,
    attention_rules,
    mlp_rules,
    outer,
    outer_fields,
    outer_rules,
)
from hybridlm.interop.fields import Fields, layer_kinds, layers, rotary
from hybridlm.interop.rules import Rule, expert_matrices, linear, same, stacked_experts, taps, under

LINEAR, FULL = "linear_attention", "full_attention"


def to_model(fields: Fields) -> Model:
    fields.only("hidden_act", "silu", "swish")
    fields.only("attention_bias", False)
    count, every = fields["num_hidden_layers"], fields.get("full_attention_interval", 4)
    head_dim = fields.get("head_dim", 256)
    attention = Attention(
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=head_dim,
        qk_norm=True,
        out_gate=True,
        **rotary(fields, head_dim, fraction=0.25),
    )
    delta = GatedDeltaNet(
        num_heads=fields.get("linear_num_key_heads", 16),
        num_value_heads=fields.get("linear_num_value_heads", 32),
        head_dim=fields.get("linear_key_head_dim", 128),
        value_head_dim=fields.get("linear_value_head_dim", 128),
        conv_width=fields.get("linear_conv_kernel_dim", 4),
    )
    default = [LINEAR if (i + 1) % every else FULL for i in range(count)]
    mixer_of = {LINEAR: delta, FULL: attention}
    mixers = [mixer_of[kind] for kind in layer_kinds(fields, default, mixer_of)]
    return Model(
        **layers([Block(mixer=mixer, ffn=_ffn(fields, i)) for i, mixer in enumerate(mixers)]),
        **outer(fields, norm_offset=True),
    )


def _ffn(fields: Fields, layer: int) -> FFN:
    num_experts = fields.get("num_experts", 512)
    is_sparse = num_experts > 0 and (layer + 1) % fields.get("decoder_sparse_step", 1) == 0
    if not is_sparse or layer in fields.get("mlp_only_layers", ()):
        return SwiGLU(hidden=fields["intermediate_size"])
    router = TopK(
        k=fields.get("num_experts_per_tok", 10),
        renormalize=fields.get("norm_topk_prob", True),
        balance_loss=fields.get("router_aux_loss_coef", 0.001),
        z_loss=0.0,
    )
    return MoE(
        num_experts=num_experts,
        hidden=fields.get("moe_intermediate_size", 512),
        router=router,
        shared_hidden=fields.get("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


def to_fields(model: Model) -> dict[str, Any]:
    blocks = model.blocks()
    delta = next((block.mixer for block in blocks if isinstance(block.mixer, GatedDeltaNet)), None)
    attention = next((block.mixer for block in blocks if isinstance(block.mixer, Attention)), None)
    if delta is None or attention is None:
        raise ConfigError("model.pattern", ": must hold GatedDeltaNet and Attention")
    found: dict[str, Any] = {
        **outer_fields(model),
        **attention_fields(attention, model.width),
        "hidden_act": "silu",
        "linear_num_key_heads": delta.num_heads,
        "linear_num_value_heads": delta.num_value_heads or delta.num_heads,
        "linear_key_head_dim": delta.head_dim,
        "linear_value_head_dim": delta.value_head_dim or 2 * delta.head_dim,
        "linear_conv_kernel_dim": delta.conv_width,
        "layer_types": [FULL if isinstance(block.mixer, Attention) else LINEAR for block in blocks],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, block in enumerate(blocks) if not isinstance(block.ffn, MoE)],
    }
    found["partial_rotary_factor"] = attention.rope_fraction
    found["rope_parameters"]["partial_rotary_factor"] = attention.rope_fraction
    dense = next((block.ffn for block in blocks if isinstance(block.ffn, SwiGLU)), None)
    sparse = next((block.ffn for block in blocks if isinstance(block.ffn, MoE)), None)
    found["intermediate_size"] = dense.hidden if dense else 4 * model.width
    if sparse is None:
        return found | {"num_experts": 0}
    if not isinstance(sparse.router, TopK):
        raise ConfigError("model.pattern.0.ffn.router", f"={type(sparse.router).__name__}: must be TopK")
    return found | {
        "num_experts": sparse.num_experts,
        "moe_intermediate_size": sparse.hidden,
        "shared_expert_intermediate_size": sparse.shared_hidden,
        "num_experts_per_tok": sparse.router.k,
        "norm_topk_prob": sparse.router.renormalize,
        "router_aux_loss_coef": sparse.router.balance_loss,
    }


def delta_rules(mixer: GatedDeltaNet) -> list[Rule]:
    """Of `linear_attn`: rows of its projections go by query-key head, channels of its convolution do not."""
    return [
        linear(("q.w", "k.w", "v.w", "g.w"), "in_proj_qkvz.weight", groups=mixer.num_heads),
        linear(("w_b", "decay.w"), "in_proj_ba.weight", groups=mixer.num_heads),
        taps(("q.conv", "k.conv", "v.conv"), "conv1d.weight"),
        same("decay.A_log", "A_log"),
        same("decay.dt_bias", "dt_bias"),
        same("norm.scale", "norm.weight"),
        linear("w_o", "out_proj.weight", num_inputs=2),
    ]


def gated_attention_rules(mixer: Attention) -> list[Rule]:
    """Of `self_attn`: rows of q_proj are a head's query, then its gate, head by head."""
    gated = linear(("w_q", "w_g"), "q_proj.weight", groups=mixer.num_heads)
    return [gated, *(rule for rule in attention_rules(mixer) if rule.ours != ("w_q",))]


def moe_rules(ffn: MoE, prefix: str, names: Collection[str]) -> list[Rule]:
    """Of `mlp` with experts, which have matrices of their own in files, or one for all where it was saved so."""
    found = [
        linear("router.gate.w", "gate.weight"),
        linear("w_shared_gate", "shared_expert_gate.weight"),
        *under("shared_expert", "shared_expert", mlp_rules(SwiGLU(hidden=1))),
    ]
    if f"{prefix}.experts.gate_up_proj" in names:
        both = ("experts.w_gate", "experts.w_up")
        return [
            *found,
            stacked_experts(both, "experts.gate_up_proj"),
            stacked_experts("experts.w_down", "experts.down_proj"),
        ]
    for name in ("gate", "up", "down"):
        theirs = [f"experts.{e}.{name}_proj.weight" for e in range(ffn.num_experts)]
        found.append(expert_matrices(f"experts.w_{name}", theirs))
    return found


def rules(model: Model, names: Collection[str]) -> list[Rule]:
    found = outer_rules(model)
    for i, block in enumerate(model.blocks()):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        norms = [("mixer_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")]
        found += [same(f"{ours}.{mine}.scale", f"{theirs}.{name}.weight") for mine, name in norms]
        if isinstance(block.mixer, Attention):
            found += under(f"{ours}.mixer", f"{theirs}.self_attn", gated_attention_rules(block.mixer))
        else:
            assert isinstance(block.mixer, GatedDeltaNet)
            found += under(f"{ours}.mixer", f"{theirs}.linear_attn", delta_rules(block.mixer))
        if isinstance(block.ffn, MoE):
            found += under(f"{ours}.ffn", f"{theirs}.mlp", moe_rules(block.ffn, f"{theirs}.mlp", names))
        else:
            assert isinstance(block.ffn, SwiGLU)
            found += under(f"{ours}.ffn", f"{theirs}.mlp", mlp_rules(block.ffn))
    return found


ARCHITECTURES = [
    Architecture(
        name="Qwen3NextForCausalLM",
        model_type="qwen3_next",
        to_model=to_model,
        to_fields=to_fields,
        rules=rules,
        not_read=r"mtp\..*",  # multi-token prediction, which transformers does not read either
    )
]
