"""A mixture of experts from a trained dense model (sparse upcycling; Komatsuzaki et al., 2022, arXiv:2212.05055).

Letters: d model width, f FFN width, x experts, m slices of an MLP.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.model import Params, build
from hybridlm.model.by_layer import drawn, field_of, layers_of, stack_of

SAME_FIELDS = (
    "vocab_size",
    "width",
    "num_layers",
    "tied_embedding",
    "scale_embedding",
    "embedding_scale",
    "logit_soft_cap",
    "norm_eps",
    "norm_offset",
)
NEW_PARTS = ("router", "shared_expert", "w_shared_gate", "shared")
"""What a dense model has not: of a MoE, and of the routers of all layers together."""


def upcycle(
    params: Params, dense: config.Model, sparse: config.Model, key: Key[Array, ""], *, mask_fraction: float = 0.0
) -> Params:
    """Parameters of `sparse` that go on from those of `dense`, as NumPy arrays.

    What both models have is copied. Where `sparse` has a MoE and `dense` a GatedMLP, experts are copies of the MLP, or,
    where they are m times narrower, its m slices over and over; their output weights are scaled so that a token's
    experts add up to the MLP where the sum of its routing weights is known. The shared expert begins with output
    weights of 0, the router as in a new model; but for slices, a linear gate has equal columns for the m experts that
    make up one MLP, so that they are chosen together (virtual groups; He et al., 2024, arXiv:2410.07524).

    `mask_fraction` is the share of each expert's weights that is set to 0, drawn for each expert: they diversify (Nie
    et al., 2021, arXiv:2112.14397). Without it the model computes what it did where `same_function` says
    so, else it merely starts near.

    Raises ConfigError where the models do not fit layer by layer.
    """
    check_pair(dense, sparse)
    if not 0 <= mask_fraction < 1:
        raise ConfigError("mask_fraction", f"={mask_fraction}: must be at least 0 and below 1")
    init_key, mask_key = jax.random.split(key)
    init, _ = build(sparse, config.Kernels())
    fresh = drawn(init, init_key, NEW_PARTS)
    old, new = layers_of(params["stack"], dense), layers_of(fresh["stack"], sparse)
    for i, (before, after) in enumerate(zip(dense.blocks(), sparse.blocks(), strict=True)):
        copied = overlaid(new[i], old[i])
        if isinstance(before.ffn, config.GatedMLP) and isinstance(after.ffn, config.MoE):
            copied["ffn"] = experts_of(old[i]["ffn"], new[i]["ffn"], before.ffn, after.ffn)
            if mask_fraction:
                masked(copied["ffn"]["experts"], mask_fraction, jax.random.fold_in(mask_key, i))
        new[i] = copied
    new_others, old_others = ({k: v for k, v in tree.items() if k != "stack"} for tree in (fresh, params))
    return overlaid(new_others, jax.device_get(old_others)) | {"stack": stack_of(new, sparse)}


def check_pair(dense: config.Model, sparse: config.Model) -> None:
    """Raise ConfigError, naming the field of `sparse`, where it cannot be upcycled from `dense`."""
    for name in SAME_FIELDS:
        was, wanted = getattr(dense, name), getattr(sparse, name)
        if was != wanted:
            raise ConfigError(name, f"={wanted}: the dense model has {was}; upcycling keeps it")
    for i, (before, after) in enumerate(zip(dense.blocks(), sparse.blocks(), strict=True)):
        at = field_of(sparse, i)
        if before.mixer != after.mixer:
            kinds = [type(block.mixer).__name__ for block in (after, before)]
            what = "another mixer" if kinds[0] != kinds[1] else "the same mixer with other fields"
            raise ConfigError(f"{at}.mixer", f": layer {i} is {kinds[0]}, {what} than the dense model's {kinds[1]}")
        if before.ffn == after.ffn:
            continue
        try:
            check_experts(before.ffn, after.ffn)
        except ConfigError as error:
            raise error.under(f"{at}.ffn") from None
    if all(before.ffn == after.ffn for before, after in zip(dense.blocks(), sparse.blocks(), strict=True)):
        raise ConfigError("pattern", ": is the dense model's; give some of its MLPs' blocks a MoE")


def check_experts(before: config.FFN | None, after: config.FFN | None) -> None:
    """Raise ConfigError where the experts of `after` cannot be made of the MLP `before`."""
    if not (isinstance(before, config.GatedMLP) and isinstance(after, config.MoE)):
        names = ["none" if ffn is None else type(ffn).__name__ for ffn in (after, before)]
        raise ConfigError(
            "", f": is {names[0]}, the dense model's {names[1]}; a GatedMLP can become a MoE, and no other"
        )
    if before.bias:
        raise ConfigError("", ": the dense model's MLP has biases, which experts have not")
    if type(before).__name__ != after.activation:
        raise ConfigError("activation", f"={after.activation!r}: the dense model has {type(before).__name__}")
    if before.hidden % after.hidden:
        raise ConfigError("hidden", f"={after.hidden}: must divide the dense model's hidden={before.hidden}")
    if after.num_experts % (m := before.hidden // after.hidden):
        raise ConfigError(
            "num_experts",
            f"={after.num_experts}: must divide by the {m} slices that experts of hidden={after.hidden} are",
        )


def same_function(dense: config.Model, sparse: config.Model) -> bool:
    """Whether `upcycle` without a mask computes what `dense` does, outside training and up to rounding.

    So it is where in every new MoE the routing weights of a token have the same known sum, and its experts are the
    whole MLP each, or the router is TopK with a linear gate, which chooses slices in whole sets (k divides by m).
    """
    pairs = zip(dense.blocks(), sparse.blocks(), strict=True)
    return all(
        _same_output(before.ffn.hidden // after.ffn.hidden, after.ffn)
        for before, after in pairs
        if isinstance(before.ffn, config.GatedMLP) and isinstance(after.ffn, config.MoE)
    )


def _same_output(m: int, moe: config.MoE) -> bool:
    if m == 1:
        return sum_of_weights(moe.router) is not None
    router = _chooser(moe.router)
    chooses_sets = (
        isinstance(router, config.TopK)
        and isinstance(router.gate, config.LinearGate)
        and router.k % m == 0
        and moe.num_experts // router.num_groups % m == 0
    )
    return chooses_sets and sum_of_weights(router) is not None


def sum_of_weights(router: config.Router) -> float | None:
    """That of a token's routing weights outside training; None where it differs between tokens."""
    match _chooser(router):
        case config.TopK(renormalize=True, scale=scale):
            return scale
        case config.NoisyTopK() | config.GShardTop2() | config.HashRouter() | config.DSelectK() | config.Comet():
            return 1.0
        case _:
            return None


def _chooser(router: config.Router) -> config.Router:
    return router.router if isinstance(router, config.PreGated) else router


def experts_of(mlp: Params, fresh: Params, before: config.GatedMLP, after: config.MoE) -> Params:
    """A MoE's parameters: experts from the MLP's, the others from `fresh`."""
    x, m = after.num_experts, before.hidden // after.hidden
    scale = m / (sum_of_weights(after.router) or 1.0)
    made = dict(fresh)
    made["experts"] = {
        "w_gate": repeated(np.split(mlp["gate"]["w"], m, axis=1), x),
        "w_up": repeated(np.split(mlp["up"]["w"], m, axis=1), x),
        "w_down": repeated([np.float32(scale) * part for part in np.split(mlp["down"]["w"], m, axis=0)], x),
    }
    if "shared_expert" in fresh:
        shared = fresh["shared_expert"]
        made["shared_expert"] = shared | {"down": {"w": np.zeros_like(shared["down"]["w"])}}
    router = _chooser(after.router)
    if m > 1 and isinstance(getattr(router, "gate", None), config.LinearGate):
        made["router"] = with_equal_columns(fresh["router"], m)
    return made


def repeated(slices: list[np.ndarray], num_experts: int) -> Float[np.ndarray, "x _ _"]:
    """The slices as experts 0, 1, ..., again and again."""
    return np.tile(np.stack(slices), (num_experts // len(slices), 1, 1))


def with_equal_columns(router: Params, m: int) -> Params:
    """The router whose gate has the same logit for m neighbouring experts, that of the first of them."""
    if "router" in router:
        return router | {"router": with_equal_columns(router["router"], m)}
    return router | {"gate": {"w": np.repeat(router["gate"]["w"][:, ::m], m, axis=1)}}


def masked(experts: Params, fraction: float, key: Key[Array, ""]) -> None:
    """Set a random `fraction` of every expert's weights to 0, in place."""
    for name, name_key in zip(sorted(experts), jax.random.split(key, len(experts)), strict=True):
        keep = jax.random.bernoulli(name_key, 1.0 - fraction, experts[name].shape)
        experts[name] = np.where(np.asarray(keep), experts[name], np.float32(0.0))


def overlaid(tree: dict[Any, Any], by: dict[Any, Any]) -> dict[Any, Any]:
    """`tree` with every leaf of `by` that it has too, or has None for."""
    made = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            made[name] = overlaid(value, by.get(name, {}))
        else:
            made[name] = by.get(name, value)
    return made
