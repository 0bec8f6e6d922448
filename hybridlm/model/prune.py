"""Fewer experts: those stay whose router vectors changed most (Chowdhury et al., 2024, arXiv:2405.16646).

Letters: d model width, x experts.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.model import Params
from hybridlm.model.by_layer import field_of, layers_of, stack_of

LINEARLY_GATED = (
    config.TopK,
    config.NoisyTopK,
    config.Switch,
    config.GShardTop2,
    config.ExpertChoice,
    config.DenseToSparse,
    config.AdaptiveTopK,
)
"""Routers whose parameters all have one entry or column per expert, where their gate is linear."""


def prune(params: Params, start: Params, model: config.Model, keep: int) -> tuple[Params, config.Model]:
    """Parameters (NumPy arrays) and config of `model` with the `keep` best experts of every layer.

    An expert's score is | ||w_e|| - ||w_e at the start|| |, w_e its column of the gate: while fine-tuning, experts that
    learn what the task needs change it more than others. `start` are the parameters of the same model before training.

    Raises ConfigError where `keep` is out of range or a router has no vector per expert.
    """
    pruned = pruned_model(model, keep)
    layers, starts = layers_of(params["stack"], model), layers_of(start["stack"], model)
    for i, block in enumerate(model.blocks()):
        if isinstance(block.ffn, config.MoE):
            ffn = layers[i]["ffn"]
            kept = most_changed(ffn["router"]["gate"]["w"], starts[i]["ffn"]["router"]["gate"]["w"], keep)
            layers[i] = layers[i] | {"ffn": with_experts(ffn, kept)}
    others = {name: jax.device_get(part) for name, part in params.items() if name != "stack"}
    return others | {"stack": stack_of(layers, pruned)}, pruned


def most_changed(
    router: Float[np.ndarray, "d x"], start: Float[np.ndarray, "d x"], keep: int
) -> Int[np.ndarray, " keep"]:
    """The experts, ascending, whose vectors' norms changed most."""
    before, after = (np.linalg.norm(w.astype(np.float64), axis=0) for w in (start, router))
    return np.sort(np.argsort(-np.abs(after - before), kind="stable")[:keep])


def with_experts(ffn: Params, kept: Int[np.ndarray, " keep"]) -> Params:
    """A MoE's parameters with these experts alone."""
    return ffn | {
        "experts": jax.tree.map(lambda w: w[kept], ffn["experts"]),
        "router": jax.tree.map(lambda w: w[..., kept], ffn["router"]),
    }


def pruned_model(model: config.Model, keep: int) -> config.Model:
    """`model` with `keep` experts in every MoE. Raises ConfigError naming the field that forbids it."""
    moes = {i: block.ffn for i, block in enumerate(model.blocks()) if isinstance(block.ffn, config.MoE)}
    if not moes:
        raise ConfigError("pattern", ": no layer has experts")
    for i, moe in moes.items():
        at = f"{field_of(model, i)}.ffn"
        if not 1 <= keep <= moe.num_experts:
            raise ConfigError(f"{at}.num_experts", f"={moe.num_experts}: cannot keep {keep} of them")
        try:
            check_prunable(moe.router)
            replace(moe, num_experts=keep)
        except ConfigError as error:
            raise error.under(at) from None

    def fewer(blocks: tuple[config.Block, ...]) -> tuple[config.Block, ...]:
        return tuple(
            replace(block, ffn=replace(block.ffn, num_experts=keep)) if isinstance(block.ffn, config.MoE) else block
            for block in blocks
        )

    parts: dict[str, Any] = {name: fewer(getattr(model, name)) for name in ("prologue", "pattern", "epilogue")}
    return replace(model, **parts)


def check_prunable(router: config.Router) -> None:
    """Raise ConfigError where experts have no vector of their own in the router, or no place of their own."""
    if not isinstance(router, LINEARLY_GATED):
        raise ConfigError("router", f": {type(router).__name__} has no vector per expert, by whose change to prune")
    if not isinstance(router.gate, config.LinearGate):
        raise ConfigError(
            "router.gate", f": {type(router.gate).__name__} has no vector per expert; only LinearGate has"
        )
    if isinstance(router, config.TopK) and router.num_groups > 1:
        raise ConfigError("router.num_groups", f"={router.num_groups}: pruning would take experts to other groups")
