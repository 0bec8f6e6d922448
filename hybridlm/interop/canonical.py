"""What of a model's config is a matter of what it computes, in one way of saying it."""

from dataclasses import replace
from typing import Any

from hybridlm.config import (
    HGRN2,
    RGLRU,
    Attention,
    Block,
    DeltaNet,
    Dropless,
    GatedDeltaNet,
    Model,
    MoE,
    TopK,
)
from hybridlm.config_io import diff


def canonical(model: Model) -> Model:
    """The same function: defaults that depend on other fields written out, and without what is about training alone."""
    blocks = tuple(_block(block, model.width) for block in model.blocks())
    plain: dict[str, Any] = {"prologue": (), "pattern": blocks, "epilogue": (), "dtype": "auto", "remat": "none"}
    if model.scale_embedding:
        plain["embedding_scale"] = model.embedding_scale or model.width**0.5
    return replace(model, **plain)


def _block(block: Block, width: int) -> Block:
    mixer, ffn = block.mixer, block.ffn
    match mixer:
        case Attention():
            mixer = replace(mixer, head_dim=mixer.head_dim or width // mixer.num_heads)
        case RGLRU():
            mixer = replace(mixer, init="paper")
        case GatedDeltaNet():
            value_heads = mixer.num_value_heads or mixer.num_heads
            value_dim = mixer.value_head_dim or 2 * mixer.head_dim
            mixer = replace(mixer, num_value_heads=value_heads, value_head_dim=value_dim)
        case DeltaNet():
            mixer = replace(mixer, value_head_dim=mixer.value_head_dim or mixer.head_dim)
        case HGRN2() if mixer.lower_bound > 0:
            mixer = replace(mixer, lower_bound=0.5)
    if isinstance(ffn, MoE):
        router = ffn.router
        if isinstance(router, TopK):
            router = replace(router, balance_loss=0.0, sequence_balance_loss=0.0, z_loss=0.0)
        ffn = replace(ffn, dispatch=Dropless(), router=router)
    return replace(block, mixer=mixer, ffn=ffn)


def differences(model: Model, other: Model) -> list[str]:
    """What they compute differently, a line for each field: `layers.2.mixer.window: 512 -> none`."""
    lines = diff(canonical(model), canonical(other), "model")
    return [line.replace("model.pattern.", "layers.") for line in lines]
